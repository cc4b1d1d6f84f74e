"""One update of the weights: gradient clipped, AdamW, and numbers to report, none of which waits for the device."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from anymamba.model import MambaLM
from anymamba.state import MambaState
from anymamba.train.config import TrainConfig


class Reading:
    """Numbers on their way from the device. To read them is to wait for it, so ask as late as possible."""

    def __init__(self, values: Tensor):
        self._values, self._arrived = values.to("cpu", non_blocking=True), None
        if values.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def get(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


@dataclass(frozen=True)
class Step:
    """A step that has been handed to the device."""

    number: int
    lr: float
    begin: float  # when the host began with it, and when it had handed it over
    end: float
    starts: list[tuple[int, MambaState | None]]  # of each pass: its batch, and the state that it went on from
    reading: Reading  # losses …, norm of the gradient


class Update:
    """Clips the gradient of a model to a norm of at most `config.clip`, and steps."""

    def __init__(self, model: MambaLM, config: TrainConfig):
        self.parameters, self.clip = list(model.parameters()), config.clip
        groups = model.param_groups(config.weight_decay)
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        # 1 from the first loss or gradient on that is not finite. Then AdamW leaves everything as it is, so that the
        # weights are still good when the host learns of it, some steps later.
        self.broken = self.adamw.found_inf = torch.zeros((), device=model.device)

    def __call__(self, losses: list[Tensor], lr: float) -> Reading:
        """Use the gradients that are there; a reading of (losses …, norm of the gradient before it was clipped)."""
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        clip_grads_with_norm_(self.parameters, self.clip, norm)
        numbers = torch.stack([v.detach().float() for v in (*losses, norm)])
        torch.maximum(self.broken, (~numbers.isfinite()).any().float(), out=self.broken)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        return Reading(numbers)
