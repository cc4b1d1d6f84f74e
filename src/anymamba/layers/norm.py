import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.ops import add_rms_norm

AUTOCAST = ("cpu", "cuda", "xpu", "mps")  # torch would tell, but its compiler cannot see through that in all versions


def compute_dtype(device_type: str, default: torch.dtype) -> torch.dtype:
    """The dtype that autocast asks for on such a device, or `default` outside of it."""
    autocast = device_type in AUTOCAST and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocast else default


def inner_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last axis, without a weight: what Falcon-Mamba (arXiv 2410.05355, section 3)
    does to dt, B and C. Computed in at least float32, returned in the dtype of x."""
    real = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(real), x.shape[-1:], eps=eps).to(x.dtype)


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
        dtype = compute_dtype(x.device.type, self.weight.dtype)
        return add_rms_norm(x, residual, self.weight, eps=self.eps, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
