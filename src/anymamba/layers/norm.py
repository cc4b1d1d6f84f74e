import torch
from torch import Tensor, nn

from anymamba.ops import add_rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (arXiv 1910.07467), computed in float32.

    forward(x (…,m), residual (…,m) or None) → (normed, total): total = x + residual is the residual stream in float32,
    normed is in the dtype of the weight, or of autocast.
    """

    def __init__(self, m: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(m, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.weight.dtype
        return add_rms_norm(x, residual, self.weight, eps=self.eps, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
