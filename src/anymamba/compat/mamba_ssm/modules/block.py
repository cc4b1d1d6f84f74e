"""mamba-ssm's residual block. Axes: b batch, t time, m width."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anymamba.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn
from anymamba.errors import AnymambaError


class Block(nn.Module):
    """Add to the residual stream → norm → mixer (→ add → norm → MLP). The last output is added by what comes next.

    Args:
        mixer_cls, mlp_cls, norm_cls: called with `dim`; nn.Identity as mlp_cls means none.
        fused_add_norm: add and normalise in one pass; the norm must be a LayerNorm or RMSNorm.
        residual_in_fp32: keep the residual stream in float32.
    """

    def __init__(self, dim: int, mixer_cls: Callable[[int], nn.Module], mlp_cls: Any = nn.Identity,
                 norm_cls: Callable[[int], nn.Module] = nn.LayerNorm, fused_add_norm: bool = False,
                 residual_in_fp32: bool = False):  # fmt: skip
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm, self.mixer = norm_cls(dim), mixer_cls(dim)
        self.mlp = None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            raise AnymambaError(
                f"Block: fused_add_norm with a {type(self.norm).__name__}: it must be a LayerNorm or RMSNorm"
            )

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None, inference_params=None, **mixer_kwargs):
        """hidden_states (b,t,m), what is still to be added to `residual` (b,t,m) → the same two after this block."""
        hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_norm(self, norm, x, residual):
        return add_norm(norm, x, residual, self.fused_add_norm, self.residual_in_fp32)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs):
        """That of the mixer."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor | None, fused: bool, in_fp32: bool) -> tuple[Tensor, Tensor]:
    """x + residual, normed, and as it is."""
    if fused:
        return layer_norm_fn(x, norm.weight, norm.bias, residual=residual, eps=norm.eps, prenorm=True,
                             residual_in_fp32=in_fp32, is_rms_norm=isinstance(norm, RMSNorm))  # fmt: skip
    total = x if residual is None else x + residual
    return norm(total.to(norm.weight.dtype)), total.to(torch.float32) if in_fp32 else total
