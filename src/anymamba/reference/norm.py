"""Root-mean-square normalisation (Zhang & Sennrich, arXiv 1910.07467)."""

import torch


def rms_norm(x, weight, *, eps=1e-5):
    """x / sqrt(mean(x²) + eps) · weight over the last axis, computed in at least float32, returned in x's dtype."""
    real = torch.promote_types(x.dtype, torch.float32)
    v = x.to(real)
    return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * weight.to(real)).to(x.dtype)


def add_rms_norm(x, residual, weight, *, eps=1e-5, dtype=None):
    """The step between two blocks: total = x + residual (float32 at least), and its norm in `dtype` (x's if None)."""
    real = torch.promote_types(x.dtype, torch.float32)
    total = x.to(real) if residual is None else x.to(real) + residual.to(real)
    return rms_norm(total, weight, eps=eps).to(dtype or x.dtype), total
