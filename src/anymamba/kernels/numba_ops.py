"""The Numba kernels behind the interface that all backends have: tensors in the shapes of the ops, and back.

The kernels themselves see rows: the batch laid end to end as (rows, channels), cut into sequences by int64 offsets.
"""

import functools

import torch

from anymamba.kernels import LANES, chunk_length, numba_conv, numba_norm, numba_scan, numba_scan_backward, numba_step
from anymamba.kernels.numba_launch import rows


def bounds_of(x, cu_seqlens):
    """Offsets (s+1,) int64 of the sequences in the rows of x (b,t,d) laid end to end."""
    if cu_seqlens is None:
        return _even_bounds(*x.shape[:2])
    return cu_seqlens.to("cpu", torch.int64).contiguous()


@functools.lru_cache(maxsize=64)
def _even_bounds(b, t):
    with torch.inference_mode(False):  # kept, and used in any mode; nothing writes to it
        return torch.arange(b + 1) * t


def _dense(*tensors):
    return [v if v is None else v.contiguous() for v in tensors]


def _float32(v):
    return v if v is None else v.float()


# ---- selective scan --------------------------------------------------------------------------------------------


def _flatten_scan(x, dt, B, C, z):
    """Activations as (rows, d); B and C as (rows, g, n), one g for both, unless constant."""
    d = x.shape[2]
    groups = max(v.shape[2] if v.dim() == 4 else 1 for v in (B, C))
    B, C = (_grouped(v, groups) for v in (B, C))
    return rows(x, d), rows(dt, d), B, C, rows(z, d)


def _grouped(v, groups):
    if v.dim() == 2:
        return v.contiguous()
    if v.dim() == 3:
        v = v.unsqueeze(2)
    return v.expand(-1, -1, groups, -1).reshape(-1, groups, v.shape[-1]).contiguous()


def saved_shape(x_shape, A_shape, groups, sequences):
    """Shape of `saved`, the states that the forward leaves for the backward."""
    (b, t, d), n = x_shape, A_shape[1]
    blocks = groups * -(-(d // groups) // LANES)
    return b * t // chunk_length(n) + sequences + 1, blocks, n, LANES


def selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, save):
    flat_x, dt, B, C, z = _flatten_scan(x, dt, B, C, z)
    A, D, dt_bias, initial_state = _dense(A, D, dt_bias, initial_state)
    if x.shape[1] == 1 and cu_seqlens is None and not save and B.dim() == C.dim() == 3:
        y, final_state = numba_step.selective_step(flat_x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state)
        return y.view(x.shape), final_state, None
    y, final_state, saved = numba_scan.selective_scan(
        flat_x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, bounds_of(x, cu_seqlens), save
    )
    return y.view(x.shape), final_state, saved


def selective_scan_backward(dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens, saved,
                            dz_out=None):  # fmt: skip
    shapes = [x.shape, dt.shape, A.shape, B.shape, C.shape]
    one_group = [v.dim() == 3 for v in (B, C)]
    flat_x, flat_dt, flat_B, flat_C, flat_z = _flatten_scan(x, dt, B, C, z)
    dfinal_state, A, D, dt_bias = _dense(dfinal_state, A, D, dt_bias)
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial = numba_scan_backward.selective_scan_backward(
        rows(dy, x.shape[2]), dfinal_state, flat_x, flat_dt, A, flat_B, flat_C, D, flat_z, dt_bias, dt_softplus,
        bounds_of(x, cu_seqlens), saved, rows(dz_out, x.shape[2]),
    )  # fmt: skip
    dB, dC = (v.sum(1) if one and v.shape[1] > 1 else v for v, one in zip((dB, dC), one_group, strict=True))
    dx, ddt, dA, dB, dC = (v.reshape(s) for v, s in zip((dx, ddt, dA, dB, dC), shapes, strict=True))
    return dx, ddt, dA, dB, dC, dD, None if dz is None else dz.view(x.shape), ddt_bias, dinitial


# ---- causal convolution ----------------------------------------------------------------------------------------


def causal_conv1d(x, weight, bias, silu, initial_state, cu_seqlens):
    weight, bias, initial_state = _dense(weight, bias, initial_state)
    y, final_state = numba_conv.causal_conv1d(
        rows(x, x.shape[2]), weight, bias, silu, initial_state, bounds_of(x, cu_seqlens)
    )
    return y.view(x.shape), final_state.to(x.dtype)


def causal_conv1d_backward(dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens, dx_out=None):
    dfinal_state, weight, bias, initial_state = _dense(_float32(dfinal_state), weight, bias, initial_state)
    dx, dweight, dbias, dinitial = numba_conv.causal_conv1d_backward(
        rows(dy, x.shape[2]), dfinal_state, rows(x, x.shape[2]), weight, bias, silu, initial_state,
        bounds_of(x, cu_seqlens), rows(dx_out, x.shape[2]),
    )  # fmt: skip
    return dx.view(x.shape), dweight, None if bias is None else dbias, None if initial_state is None else dinitial


# ---- residual add + norm ---------------------------------------------------------------------------------------


def add_rms_norm(x, residual, weight, eps, dtype):
    flat = [v if v is None else v.reshape(-1, v.shape[-1]).contiguous() for v in (x, residual)]
    out, total, inverse = numba_norm.add_rms_norm(*flat, weight.contiguous(), eps, dtype)
    return out.view(x.shape), total.view(x.shape), inverse


def add_rms_norm_backward(dy, dtotal, total, inverse, weight, dtype):
    flat = [v if v is None else v.reshape(-1, v.shape[-1]).contiguous() for v in (dy, dtotal, total)]
    dx, dresidual, dweight = numba_norm.add_rms_norm_backward(*flat, inverse, weight.contiguous(), dtype)
    return dx.view(total.shape), None if dtype == torch.float32 else dresidual.view(total.shape), dweight
