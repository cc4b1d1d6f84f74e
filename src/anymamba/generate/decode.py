"""The decode step: one token for every row of a batch, again and again.

`model(ids, state)` looks everything up and makes a new state at each call. Here that is done once: whole blocks are
computed by kernels of their own, the state is advanced in place, and on a GPU a step is one replay of a CUDA graph.

Axis letters: b rows of the batch, v vocabulary.
"""

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from anymamba.backends import explain
from anymamba.generate.rows import read
from anymamba.layers.linear import is_watched
from anymamba.layers.loss import is_bare
from anymamba.layers.quantized import QuantizedLinear
from anymamba.layers.step import Integers, block_weights, is_plain, matrix
from anymamba.model import MambaLM
from anymamba.state import MambaState


class Decoder:
    """Decodes with one model. Not for several threads at a time.

    model: a MambaLM; anything else that is called and answers like one is just called.
    state_dtype: in what the SSM states are kept between tokens. Below float32 saves memory and, for large batches,
        time; what it costs is in docs/inference.md. The recurrence itself always runs in float32.

    It has looked at the model's parameters and hooks when a step begins a batch of another size; parameters that change
    in place and hooks that are set or removed are seen only from then on.
    """

    def __init__(self, model: torch.nn.Module, *, state_dtype: torch.dtype = torch.float32):
        self.model, self.state_dtype = model, state_dtype
        self._batch: _Batch | None = None

    @torch.no_grad()
    def step(self, ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """The next logits (b,v) in float32, -inf where the vocabulary is padded, and the state after `ids` (b,).

        Both are the decoder's own memory, which its next step writes over: copy, `select` or `fork` what is to stay.
        Passing the state back as it is costs nothing, any other is copied in. On a GPU nothing waits for the device.
        """
        if self._batch is None or not self._batch.fits(len(ids)):
            self._batch = None  # its memory first
            self._batch = _batch_for(self.model, len(ids), self.state_dtype)
        return self._batch.step(ids, state)


class _Steps(Protocol):
    def step(self, ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]: ...
    def fits(self, rows: int) -> bool: ...


def _batch_for(model, rows, state_dtype) -> _Steps:
    """What decodes `rows` rows."""
    if not isinstance(model, MambaLM):
        return _Called(model, rows, None)
    if any(map(is_watched, model.modules())):  # who listens must be called at every step, and a graph calls nobody
        return _Called(model, rows, state_dtype)
    kernels = _kernels_for(model)
    if model.device.type == "cuda":
        return _Recorded(model, kernels, rows, state_dtype)
    if kernels is None or rows > kernels.MAX_ROWS:
        return _Called(model, rows, state_dtype)
    return _Batch(model, kernels, rows, state_dtype)


def _kernels_for(model: MambaLM) -> ModuleType | None:
    """The module whose `Step` computes whole blocks of this model, None where the model's own forward has to do it."""
    dtypes = {p.dtype for name, p in model.named_parameters() if p.dim() == 2 and not name.endswith("A_log")}
    backbone, head = model.backbone, model.lm_head
    bare = is_bare(head) or (type(head) is QuantizedLinear and head.bias is None and is_plain(head))
    plain = is_plain(backbone.embedding) and is_plain(backbone.norm_f) and bare
    own = getattr(model.forward, "__func__", None) is not MambaLM.forward
    drops = model.dropout and model.training
    if own or not plain or drops or len(dtypes) > 1 or torch.is_autocast_enabled(model.device.type):
        return None
    blocks = [block_weights(block) for block in backbone.layers]
    if None in blocks or len({tuple(v.dtype for v in block.matrices) for block in blocks}) > 1:
        return None
    integers = any(isinstance(v, Integers) for v in (*blocks[0].matrices, matrix(head)))
    backend, _ = explain(model.device, *dtypes, "decode")
    if backend == "cuda" and not integers:
        from anymamba.kernels import cuda_decode as kernels
    elif backend == "numba":
        from anymamba.kernels import numba_decode as kernels
    else:
        return None
    return kernels if kernels.supports(model.config, *dtypes, model.device) else None


class _Called:
    """The model as it is. For other rows there may be kernels."""

    def __init__(self, model, rows: int, state_dtype: torch.dtype | None):
        self.model, self.rows, self.state_dtype = model, rows, state_dtype

    def fits(self, rows: int) -> bool:
        return rows == self.rows

    def step(self, ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        logits, state = read(self.model, ids[:, None], state)
        return logits, state if self.state_dtype in (None, torch.float32) else state.to(ssm_dtype=self.state_dtype)


class _Batch:
    """A state of `rows` rows that is advanced in place, the first b of them in use."""

    def __init__(self, model: MambaLM, kernels: ModuleType | None, rows: int, state_dtype: torch.dtype):
        self.model, self.rows = model, rows
        dtype, device = model.backbone.norm_f.weight.dtype, model.device
        kept = torch.float64 if dtype == torch.float64 else state_dtype
        self.state = MambaState.zeros(model.config, rows, device=device, dtype=dtype).to(ssm_dtype=kept)
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.out: MambaState | None = None  # what the last step returned
        self._kernel = None if kernels is None else kernels.Step(*_weights(model), model.config, self.state.layers)

    def fits(self, rows: int) -> bool:
        return self.rows // 4 < rows <= self.rows

    def step(self, ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        b = len(ids)
        self.model._check_ids(ids[:, None])
        if state is not self.out or state.batch_size != b:
            self.model._check_state(state, b)
            self.out = MambaState(tuple(type(layer)(*(v[:b] for v in layer)) for layer in self.state.layers),
                                  self.state.seen[:b])  # fmt: skip
            torch._foreach_copy_(_tensors(self.out), _tensors(state))
        self.ids[:b].copy_(ids, non_blocking=True)
        return self.advance(b)[:b], self.out

    def advance(self, b: int) -> Tensor:
        """One step of the first b rows, or of all: their logits."""
        if self._kernel is None:
            logits, after = read(self.model, self.ids[:, None], self.state)
            torch._foreach_copy_(_tensors(self.state), _tensors(after))
            return logits
        logits = self._kernel(self.ids[:b])
        self.state.seen[:b].add_(1)
        return logits


class _Recorded(_Batch):
    """The same as a CUDA graph. A batch that shrinks or grows a little keeps the graph of the next larger size."""

    def __init__(self, model: MambaLM, kernels: ModuleType | None, rows: int, state_dtype: torch.dtype):
        super().__init__(model, kernels, bucket(rows), state_dtype)
        stream = torch.cuda.Stream(model.device)
        stream.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(stream):  # kernels compile and libraries allocate before anything is recorded
            super().advance(self.rows)
        torch.cuda.current_stream(model.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(model.device), torch.cuda.graph(self.graph):
            self.logits = super().advance(self.rows)

    def advance(self, b: int) -> Tensor:
        self.graph.replay()
        return self.logits


def bucket(rows: int) -> int:
    """The size of graph for a batch: a power of two, or one and a half times one, from 16 on of eights."""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power >= 32 and rows <= power * 3 // 4 else power


def _weights(model):
    backbone = model.backbone
    return [block_weights(block) for block in backbone.layers], backbone.embedding.weight, backbone.norm_f.weight, \
        matrix(model.lm_head)  # fmt: skip


def _tensors(state):
    return [state.seen, *(v for layer in state.layers for v in layer)]
