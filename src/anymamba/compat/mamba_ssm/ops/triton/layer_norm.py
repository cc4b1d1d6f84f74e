"""mamba-ssm's norms, on `ops.add_rms_norm` where that fits. Axes: m features; … any axes before them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.errors import AnymambaError
from anymamba.ops import add_rms_norm


def layer_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None,
                  x1: Tensor | None = None, weight1: Tensor | None = None, bias1: Tensor | None = None,
                  eps: float = 1e-6, dropout_p: float = 0.0, rowscale: Tensor | None = None, prenorm: bool = False,
                  residual_in_fp32: bool = False, is_rms_norm: bool = False,
                  return_dropout_mask: bool = False):  # fmt: skip
    """total = dropout(rowscale · x) + dropout(x1) + residual, and its layer norm, or RMS norm.

    Args:
        x, x1, residual: (…,m); weight, bias, weight1, bias1: (m,); rowscale: (…), not with x1.
        weight1, bias1: of a second norm of the same total.
        prenorm: also gives the total, in residual's dtype; without a residual in float32 if `residual_in_fp32`, else
            in x's.
        return_dropout_mask: also gives which entries of x and of x1 (None without) were kept; (None, None) without
            dropout.

    Returns the norm in x's dtype, or a tuple (norm, second norm, total, masks) of those asked for. Raises
    AnymambaError for shapes that do not fit.
    """
    _check(x, residual, x1, rowscale, weight=weight, bias=bias, weight1=weight1, bias1=bias1)
    dtype = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    real = torch.promote_types(x.dtype, torch.float32)
    if is_rms_norm and bias is None and weight1 is None and x1 is None and rowscale is None and dropout_p == 0:
        out, total = add_rms_norm(x, residual, weight, eps=eps)
        outs, masks = [out], (None, None)
    else:
        scaled = x.to(real) if rowscale is None else x.to(real) * rowscale[..., None].to(real)
        total, mask = _dropped(scaled, dropout_p)
        other, mask1 = (None, None) if x1 is None else _dropped(x1.to(real), dropout_p)
        total = sum((v.to(real) for v in (other, residual) if v is not None), total)
        pairs = [(weight, bias)] if weight1 is None else [(weight, bias), (weight1, bias1)]
        outs, masks = [_norm(total, w, b, eps, is_rms_norm).to(x.dtype) for w, b in pairs], (mask, mask1)
    found = (*outs, *([total.to(dtype)] if prenorm else []), *(masks if return_dropout_mask else []))
    return found if len(found) > 1 else found[0]


def rms_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None,
                x1: Tensor | None = None, weight1: Tensor | None = None, bias1: Tensor | None = None, eps: float = 1e-6,
                dropout_p: float = 0.0, rowscale: Tensor | None = None, prenorm: bool = False,
                residual_in_fp32: bool = False, return_dropout_mask: bool = False):  # fmt: skip
    """`layer_norm_fn` with is_rms_norm."""
    return layer_norm_fn(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
                         residual_in_fp32, True, return_dropout_mask)  # fmt: skip


class RMSNorm(nn.Module):
    """`rms_norm_fn` with its weight; dropout in training mode only."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False):
        """x (…,m) → its norm, or with `prenorm` (norm, total)."""
        dropout = self.drop.p if self.drop is not None and self.training else 0.0
        return rms_norm_fn(x, self.weight, self.bias, residual=residual, eps=self.eps, dropout_p=dropout,
                           prenorm=prenorm, residual_in_fp32=residual_in_fp32)  # fmt: skip


def _dropped(v, p):
    if p == 0:
        return v, None
    mask = torch.rand_like(v) >= p
    return v * mask / (1 - p), mask


def _norm(v, weight, bias, eps, is_rms_norm):
    weight, bias = weight.to(v.dtype), None if bias is None else bias.to(v.dtype)
    if not is_rms_norm:
        return F.layer_norm(v, v.shape[-1:], weight, bias, eps)
    out = F.rms_norm(v, v.shape[-1:], weight, eps)
    return out if bias is None else out + bias


def _check(x, residual, x1, rowscale, **weights):
    wanted = {"residual": (residual, x.shape), "x1": (x1, x.shape), "rowscale": (rowscale, x.shape[:-1])}
    wanted |= {name: (v, x.shape[-1:]) for name, v in weights.items()}
    for name, (v, shape) in wanted.items():
        if v is not None and v.shape != shape:
            raise AnymambaError(f"layer_norm_fn: {name} is {tuple(v.shape)}, but for x {tuple(x.shape)} it must be "
                                f"{tuple(shape)}")  # fmt: skip
    if x1 is not None and rowscale is not None:
        raise AnymambaError("layer_norm_fn: rowscale scales x only, and there is an x1: multiply x before")
    if weights["bias1"] is not None and weights["weight1"] is None:
        raise AnymambaError("layer_norm_fn: bias1 without weight1: the second norm needs both")
