"""Linear layers that decode fast on a CPU."""

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
