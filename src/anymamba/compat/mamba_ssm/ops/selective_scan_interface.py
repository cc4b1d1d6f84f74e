"""mamba-ssm's scans on `ops`. Axes: b batch, d channels, t time, n state, g groups, r dt_rank; channels come first."""

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_ref
from anymamba.errors import AnymambaError
from anymamba.ops import add_rms_norm, selective_scan


def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                      z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                      return_last_state: bool = False):  # fmt: skip
    """The selective scan (arXiv 2312.00752, algorithm 2).

    Args:
        u, delta, z: (b,d,t); D, delta_bias: (d,).
        A: (d,n), real or complex.
        B, C: (d,n), (b,n,t) or (b,g,n,t). With a complex A complex too; those that change over time also as reals with
            the two parts of a number side by side, (b,n,2t) or (b,g,n,2t).

    Returns y (b,d,t), or (y, last state (b,d,n)), through which gradients flow, too. Raises AnymambaError for shapes
    that do not fit.
    """
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, None)


def selective_scan_ref(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                       z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                       return_last_state: bool = False):  # fmt: skip
    """`selective_scan_fn` by plain torch."""
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, "reference")


def mamba_inner_fn(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
                   delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
                   B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
                   delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
                   C_proj_bias: Tensor | None = None, delta_softplus: bool = True, checkpoint_lvl: int = 1,
                   b_rms_weight: Tensor | None = None, c_rms_weight: Tensor | None = None,
                   dt_rms_weight: Tensor | None = None, b_c_dt_rms_eps: float = 1e-6) -> Tensor:  # fmt: skip
    """A Mamba mixer from after in_proj to after out_proj: convolution, x_proj, scan, gate.

    Args:
        xz: (b,2d,t); conv1d_weight: (d,1,w); conv1d_bias: (d,); x_proj_weight: (r+2n,d), rows [delta; B; C];
            delta_proj_weight: (d,r); out_proj_weight: (m,d); out_proj_bias: (m,).
        A, B, C, D, delta_bias, delta_softplus: as `selective_scan_fn`; B or C None takes that of x_proj, plus
            B_proj_bias or C_proj_bias. With a complex A x_proj has 4n rows for them, the two parts of a number
            side by side.
        b_rms_weight, c_rms_weight: (n,); dt_rms_weight: (d,): weights of RMS norms of B, C and delta_proj's output.
        checkpoint_lvl: 0 or 1; how much is recomputed in backward there. The result does not depend on it.

    Returns (b,t,m). Raises AnymambaError for shapes that do not fit.
    """
    if checkpoint_lvl not in (0, 1):
        raise AnymambaError(f"mamba_inner_fn: checkpoint_lvl={checkpoint_lvl!r}, but it must be 0 or 1")
    for name, given, weight in (("B", B, b_rms_weight), ("C", C, c_rms_weight)):
        if given is not None and weight is not None:
            raise AnymambaError(f"mamba_inner_fn: {name.lower()}_rms_weight is for a {name} of x_proj, and {name} is "
                                "given: normalise it before")  # fmt: skip
    weights = (b_rms_weight, c_rms_weight, dt_rms_weight)
    return _inner(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A,
                  B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus, weights, b_c_dt_rms_eps,
                  causal_conv1d_fn, selective_scan_fn)  # fmt: skip


def mamba_inner_ref(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
                    delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
                    B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
                    delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
                    C_proj_bias: Tensor | None = None, delta_softplus: bool = True) -> Tensor:  # fmt: skip
    """`mamba_inner_fn` by plain torch."""
    return _inner(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A,
                  B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus, (None, None, None), 0.0,
                  causal_conv1d_ref, selective_scan_ref)  # fmt: skip


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, backend):
    for name, v in {"u": u, "delta": delta, "z": z}.items():
        if v is not None and (v.dim() != 3 or v.shape != u.shape):
            raise AnymambaError(f"selective_scan_fn: {name} is {tuple(v.shape)}, but it must be (batch, dim, seqlen)"
                                f"{'' if name == 'u' else f' like u, {tuple(u.shape)}'}")  # fmt: skip
    u, delta, z = (v if v is None else v.transpose(1, 2) for v in (u, delta, z))
    B, C = (_channels_last(name, v, A, u.shape[1]) for name, v in (("B", B), ("C", C)))
    y, h = selective_scan(u, delta, A, B, C, D, z, dt_bias=delta_bias, dt_softplus=delta_softplus, backend=backend)
    return (y.transpose(1, 2), h) if return_last_state else y.transpose(1, 2)


def _channels_last(name, v, A, t):
    """B or C as `ops.selective_scan` takes it: (d,n), (b,t,n) or (b,t,g,n)."""
    if v.dim() == 2:
        return v
    if A.is_complex() and not v.is_complex():
        if v.shape[-1] != 2 * t:
            raise AnymambaError(f"selective_scan_fn: {name} is {tuple(v.shape)} {v.dtype}, but with a complex A it "
                                f"must be complex, or end in 2 · seqlen = {2 * t}: real, imaginary")  # fmt: skip
        real = torch.promote_types(v.dtype, torch.float32)
        v = torch.view_as_complex(v.to(real).unflatten(-1, (t, 2)))
    if v.dim() not in (3, 4) or v.shape[-1] != t:
        raise AnymambaError(f"selective_scan_fn: {name} is {tuple(v.shape)}, but it must be (dim, dstate), (batch, "
                            f"dstate, seqlen) or (batch, groups, dstate, seqlen) with seqlen = {t}")  # fmt: skip
    return v.movedim(-1, 1)


def _inner(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
           delta_bias, B_proj_bias, C_proj_bias, delta_softplus, rms_weights, eps, convolve, scan):  # fmt: skip
    x, z = xz.chunk(2, dim=1)
    x = convolve(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    n, r = A.shape[1] * (2 if A.is_complex() else 1), delta_proj_weight.shape[1]
    if x_proj_weight.shape[0] < r + n * ((B is None) + (C is None)):
        raise AnymambaError(f"mamba_inner_fn: x_proj_weight is {tuple(x_proj_weight.shape)}, but it needs rows for "
                            f"delta, {r}, and {n} each for B and C where they are None")  # fmt: skip
    projected = F.linear(x.transpose(1, 2), x_proj_weight)
    delta = F.linear(projected[..., :r], delta_proj_weight)
    b_weight, c_weight, dt_weight = rms_weights
    if B is None:
        B = _varying(projected[..., r : r + n], B_proj_bias, b_weight, eps, A.is_complex())
    if C is None:
        C = _varying(projected[..., -n:], C_proj_bias, c_weight, eps, A.is_complex())
    delta = _normed(delta, dt_weight, eps)
    y = scan(x, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _varying(v, bias, rms_weight, eps, is_complex):
    """(b,t,n) of x_proj as B or C (b,n,t); of a complex number the two parts stood side by side."""
    v = _normed(v if bias is None else v + bias.to(v.dtype), rms_weight, eps)
    if is_complex:
        v = torch.view_as_complex(v.to(torch.promote_types(v.dtype, torch.float32)).unflatten(-1, (-1, 2)))
    return v.transpose(1, 2)


def _normed(v, weight, eps):
    return v if weight is None else add_rms_norm(v, None, weight, eps=eps)[0]
