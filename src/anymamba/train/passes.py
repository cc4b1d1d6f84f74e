"""A pass over one batch, forward and backward: as Python issues it, or on a GPU replayed as a CUDA graph.

A small model's kernels take less time than Python needs to launch them; a graph launches all of them at once.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from anymamba.data import Batches, cu_seqlens_at_eos
from anymamba.model import MambaLM
from anymamba.state import MambaState
from anymamba.train.config import TrainConfig
from anymamba.train.hardware import autocast, random_numbers, to_device


class Passes:
    """The passes of a run. Which batch it is (`index`) and the state before it decide everything that a pass does."""

    def __init__(self, model: MambaLM, config: TrainConfig, batches: Batches, eos_id: int):
        self.model, self.config, self.batches, self.eos_id = model, config, batches, eos_id
        self._recorded: _Recorded | None = None

    def loss(self, index: int, state: MambaState | None, precision: str) -> tuple[Tensor, MambaState]:
        """The loss and the state after the batch."""
        ids, labels = self.batches.batch(index)
        cu_seqlens = None
        if self.config.packed:
            cu_seqlens = cu_seqlens_at_eos(ids, self.eos_id)  # on the CPU: nobody waits for them
            ids, labels = ids.view(1, -1), labels.view(1, -1)
        ids, labels = (to_device(v, self.model.device) for v in (ids, labels))
        with self._random_numbers(index):
            return self.forward(ids, labels, state, precision, cu_seqlens)

    def backward(self, index: int, state: MambaState | None, precision: str) -> tuple[Tensor, MambaState]:
        """`loss`, and its gradients added to those of the parameters."""
        if self._recorded is not None:
            with self._random_numbers(index):
                return self._recorded(*self.batches.batch(index), state)
        loss, after = self.loss(index, state, precision)
        (loss / self.config.accumulate).backward()
        return loss, after

    def record(self, precision: str) -> str | None:
        """From now on replay `backward` as a CUDA graph, if it can be; why not, if that was to be expected to work."""
        config = self.config
        # several passes add up gradients, documents differ in number, recomputation looks at the random state
        fixed = config.accumulate == 1 and not config.packed and not config.recompute
        if not (config.graph and fixed and self.model.device.type == "cuda"):
            return None
        try:
            with self._random_numbers(0):
                self._recorded = _Recorded(self, precision)
        except RuntimeError as error:  # out of memory too
            self.model.zero_grad(set_to_none=True)
            return f"no CUDA graph ({str(error).splitlines()[0]}): small models will wait for Python"

    def release(self) -> None:
        """Give back the graph's memory."""
        self._recorded = None

    def forward(self, ids: Tensor, labels: Tensor, state: MambaState | None, precision: str, cu_seqlens=None):
        """`loss` of ids and labels that are on the device."""
        with autocast(precision, self.model.device):
            out = self.model(ids, state=state, cu_seqlens=cu_seqlens, labels=labels)
        return out.loss, out.state

    def _random_numbers(self, index):
        config = self.config
        return random_numbers(config.seed, index, self.model.device) if config.dropout else nullcontext()


class _Recorded:
    """A pass with its own memory for what goes in and comes out. Gradients are set, not added."""

    def __init__(self, passes: Passes, precision: str):
        model, config = passes.model, passes.config
        self.parameters = list(model.parameters())
        self.ids, self.labels = (to_device(v, model.device) for v in passes.batches.batch(0))
        dtype = torch.bfloat16 if precision == "bf16" else None
        self.state = MambaState.zeros(model.config, config.batch_size, device=model.device, dtype=dtype)
        model.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            loss, after = passes.forward(self.ids, self.labels, self.state, precision)
            loss.backward()
        self.loss, self.after = loss.detach(), after.detach()
        self.gradients = [p.grad for p in self.parameters]

    def __call__(self, ids: Tensor, labels: Tensor, state: MambaState | None) -> tuple[Tensor, MambaState]:
        for to, v in ((self.ids, ids), (self.labels, labels)):
            to.copy_(v.pin_memory(), non_blocking=True)
        inputs = _tensors(self.state)
        if state is None:
            torch._foreach_zero_(inputs)
        else:
            torch._foreach_copy_(inputs, _tensors(state))
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        return self.loss, self.after.copy()  # of its own: the next replay writes over this one


def _tensors(state):
    return [state.seen, *(v for layer in state.layers for v in layer)]
