import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (arXiv 1910.07467), computed in float32.

    (…, m) in any dtype → (…, m) in the dtype of the weight.
    """

    def __init__(self, m: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(m, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        real = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(real), (x.shape[-1],), self.weight.to(real), self.eps).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
