"""Linear layers that decode fast on a CPU."""

import torch
from torch import Tensor, nn

from anymamba.ops import linear


class Linear(nn.Linear):
    """nn.Linear through `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class StepProjection(Linear):
    """The linear layer from rank r to the step sizes. Its bias is added inside the scan, in float32, not here.

    Still a Linear that is called, so that adapters (LoRA) on it work.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def is_watched(module: nn.Module) -> bool:
    """Whether hooks listen to a module, or a forward pass of its own replaces that of its class: it must be called."""
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(own) or "forward" in module.__dict__ or torch.nn.modules.module._has_any_global_hook()
