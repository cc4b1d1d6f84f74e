"""The kernels as torch operators: schemas, CPU implementations, shapes for tracing, and derivatives.

Being operators is what lets `torch.compile(fullgraph=True)`, `torch.export` and autograd see one node, not a loop.
Arguments come checked from `ops`: activations x, dt, z of one dtype, the rest float32.
"""

import functools

import torch
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake

from anymamba.errors import AnymambaError
from anymamba.kernels import LANES, chunk_length

SCAN_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias"
CONV_INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? cu_seqlens"

define(
    "anymamba::selective_scan",
    f"({SCAN_INPUTS}, bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens, bool save)"
    " -> (Tensor y, Tensor final_state, Tensor saved)",
)
define(
    "anymamba::selective_scan_backward",
    f"(Tensor dy, Tensor? dfinal_state, {SCAN_INPUTS}, bool dt_softplus, Tensor? cu_seqlens, Tensor saved)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
define("anymamba::causal_conv1d", f"({CONV_INPUTS}) -> (Tensor y, Tensor final_state)")
define(
    "anymamba::causal_conv1d_backward",
    f"(Tensor dy, Tensor? dfinal_state, {CONV_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)

define(
    "anymamba::add_rms_norm",
    "(Tensor x, Tensor? residual, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
)
define(
    "anymamba::add_rms_norm_backward",
    "(Tensor dy, Tensor? dtotal, Tensor total, Tensor inverse, Tensor weight, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
)


# ---- shapes ----------------------------------------------------------------------------------------------------


def bounds_of(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Offsets (s+1,) int64 of the sequences in the rows of x (b,t,d) laid end to end."""
    b, t, _ = x.shape
    if cu_seqlens is None:
        return _even_bounds(b, t)
    check_bounds(cu_seqlens, t)
    return cu_seqlens.to("cpu", torch.int64).contiguous()


@functools.lru_cache(maxsize=64)
def _even_bounds(b: int, t: int) -> Tensor:
    with torch.inference_mode(False):  # kept, and used in any mode; nothing writes to it
        return torch.arange(b + 1) * t


def check_bounds(cu_seqlens: Tensor, t: int) -> None:
    """Raise AnymambaError unless the offsets start at 0, never fall and end at t."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != t or any(i > j for i, j in zip(ends, ends[1:], strict=False)):
        shown = f"{ends[:6]} …" if len(ends) > 6 else f"{ends}"
        raise AnymambaError(f"cu_seqlens is {shown}, but it must start at 0, never fall, and end at seqlen = {t}")


def _sequences(x, cu_seqlens):
    return x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _flatten_scan(x, dt, B, C, z):
    """Activations as (rows, d); B and C as (rows, g, n), one g for both, unless constant."""
    from anymamba.kernels.numba_launch import rows

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


def _or_empty(v, like):
    return like.new_empty(0) if v is None else v


def _dense(*tensors):
    return [v if v is None else v.contiguous() for v in tensors]


# ---- selective scan --------------------------------------------------------------------------------------------


@impl("anymamba::selective_scan", "cpu")
def _scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, save):
    from anymamba.kernels import numba_scan, numba_step

    flat_x, dt, B, C, z = _flatten_scan(x, dt, B, C, z)
    A, D, dt_bias, initial_state = _dense(A, D, dt_bias, initial_state)
    if x.shape[1] == 1 and cu_seqlens is None and not save and B.dim() == C.dim() == 3:
        y, final_state = numba_step.selective_step(flat_x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state)
        return y.view(x.shape), final_state, final_state.new_empty(0)
    y, final_state, saved = numba_scan.selective_scan(
        flat_x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, bounds_of(x, cu_seqlens), save
    )
    return y.view(x.shape), final_state, _or_empty(saved, final_state)


@register_fake("anymamba::selective_scan")
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, save):
    final_state = A.new_empty(_sequences(x, cu_seqlens), *A.shape)
    return torch.empty_like(x, memory_format=torch.contiguous_format), final_state, _fake_saved(x, A, B, C, cu_seqlens, save)  # noqa: E501  # fmt: skip


def _fake_saved(x, A, B, C, cu_seqlens, save):
    if not save:
        return A.new_empty(0)
    groups = max(v.shape[2] if v.dim() == 4 else 1 for v in (B, C))
    blocks = groups * -(-(x.shape[2] // groups) // LANES)
    slots = x.shape[0] * x.shape[1] // chunk_length(A.shape[1]) + _sequences(x, cu_seqlens) + 1
    return A.new_empty(slots, blocks, A.shape[1], LANES)


@impl("anymamba::selective_scan_backward", "cpu")
def _scan_backward(dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens, saved):
    from anymamba.kernels import numba_scan_backward
    from anymamba.kernels.numba_launch import rows

    shapes = [x.shape, dt.shape, A.shape, B.shape, C.shape]
    groups = [v.dim() == 3 for v in (B, C)]
    flat_x, flat_dt, flat_B, flat_C, flat_z = _flatten_scan(x, dt, B, C, z)
    dfinal_state, A, D, dt_bias = _dense(dfinal_state, A, D, dt_bias)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = numba_scan_backward.selective_scan_backward(
        rows(dy, x.shape[2]), dfinal_state, flat_x, flat_dt, A, flat_B, flat_C, D, flat_z, dt_bias, dt_softplus,
        bounds_of(x, cu_seqlens), saved,
    )  # fmt: skip
    dB, dC = (v.sum(1) if one and v.shape[1] > 1 else v for v, one in zip((dB, dC), groups, strict=True))
    dx, ddt, dA, dB, dC = (v.reshape(s) for v, s in zip((dx, ddt, dA, dB, dC), shapes, strict=True))
    optional = (_or_empty(dD, A), _or_empty(None if dz is None else dz.view(x.shape), x), _or_empty(dbias, A))
    return dx, ddt, dA, dB, dC, *optional, dinitial


@register_fake("anymamba::selective_scan_backward")
def _(dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens, saved):
    dense = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, A, B, C)]
    optional = [like.new_empty(0 if v is None else v.shape) for v, like in ((D, A), (z, x), (dt_bias, A))]
    return *dense, *optional, A.new_empty(_sequences(x, cu_seqlens), *A.shape)


def _scan_setup(ctx, inputs, output):
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, _, cu_seqlens, save = inputs
    ctx.set_materialize_grads(False)
    ctx.dt_softplus, ctx.save = dt_softplus, save
    ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, output[2])


def _scan_vjp(ctx, dy, dfinal_state, _):
    x, dt, A, B, C, D, z, dt_bias, cu_seqlens, saved = ctx.saved_tensors
    if not ctx.save:
        raise AnymambaError("torch.ops.anymamba.selective_scan was called with save=False; call ops.selective_scan")
    dy = torch.zeros_like(x) if dy is None else dy
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = torch.ops.anymamba.selective_scan_backward(
        dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, cu_seqlens, saved
    )
    dD, dz, dbias = (None if v is None else g for v, g in ((D, dD), (z, dz), (dt_bias, dbias)))
    return dx, ddt, dA, dB, dC, dD, dz, dbias, None, dinitial if ctx.needs_input_grad[9] else None, None, None


register_autograd("anymamba::selective_scan", _scan_vjp, setup_context=_scan_setup)


# ---- causal convolution ----------------------------------------------------------------------------------------


@impl("anymamba::causal_conv1d", "cpu")
def _conv(x, weight, bias, silu, initial_state, cu_seqlens):
    from anymamba.kernels import numba_conv
    from anymamba.kernels.numba_launch import rows

    weight, bias, initial_state = _dense(weight, bias, initial_state)
    flat = rows(x, x.shape[2])
    y, final_state = numba_conv.causal_conv1d(flat, weight, bias, silu, initial_state, bounds_of(x, cu_seqlens))
    return y.view(x.shape), final_state


@register_fake("anymamba::causal_conv1d")
def _(x, weight, bias, silu, initial_state, cu_seqlens):
    final_state = weight.new_empty(_sequences(x, cu_seqlens), weight.shape[0], weight.shape[1] - 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format), final_state


@impl("anymamba::causal_conv1d_backward", "cpu")
def _conv_backward(dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens):
    from anymamba.kernels import numba_conv
    from anymamba.kernels.numba_launch import rows

    dfinal_state, weight, bias, initial_state = _dense(dfinal_state, weight, bias, initial_state)
    dx, dweight, dbias, dinitial = numba_conv.causal_conv1d_backward(
        rows(dy, x.shape[2]), dfinal_state, rows(x, x.shape[2]), weight, bias, silu, initial_state,
        bounds_of(x, cu_seqlens),
    )  # fmt: skip
    return dx.view(x.shape), dweight, dbias, dinitial


@register_fake("anymamba::causal_conv1d_backward")
def _(dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens):
    d, w = weight.shape
    dinitial = weight.new_empty(_sequences(x, cu_seqlens), d, w - 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format), weight.new_empty(d, w), weight.new_empty(d), dinitial  # noqa: E501  # fmt: skip


def _conv_setup(ctx, inputs, output):
    x, weight, bias, silu, initial_state, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.silu = silu
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)


def _conv_vjp(ctx, dy, dfinal_state):
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dinitial = torch.ops.anymamba.causal_conv1d_backward(
        dy, dfinal_state, x, weight, bias, ctx.silu, initial_state, cu_seqlens
    )
    needs_state = ctx.needs_input_grad[4]
    return dx, dweight, None if bias is None else dbias, None, dinitial if needs_state else None, None


register_autograd("anymamba::causal_conv1d", _conv_vjp, setup_context=_conv_setup)


# ---- residual add + norm ---------------------------------------------------------------------------------------


@impl("anymamba::add_rms_norm", "cpu")
def _norm(x, residual, weight, eps, dtype):
    from anymamba.kernels import numba_norm

    flat = [v if v is None else v.reshape(-1, v.shape[-1]).contiguous() for v in (x, residual)]
    out, total, inverse = numba_norm.add_rms_norm(*flat, weight.contiguous(), eps, dtype)
    return out.view(x.shape), total.view(x.shape), inverse


@register_fake("anymamba::add_rms_norm")
def _(x, residual, weight, eps, dtype):
    count = x.numel() // x.shape[-1]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=torch.float32), weight.new_empty(count)


@impl("anymamba::add_rms_norm_backward", "cpu")
def _norm_backward(dy, dtotal, total, inverse, weight, dtype):
    from anymamba.kernels import numba_norm

    flat = [v if v is None else v.reshape(-1, v.shape[-1]).contiguous() for v in (dy, dtotal, total)]
    dx, dresidual, dweight = numba_norm.add_rms_norm_backward(*flat, inverse, weight.contiguous(), dtype)
    return dx.view(total.shape), dresidual.view(total.shape), dweight


@register_fake("anymamba::add_rms_norm_backward")
def _(dy, dtotal, total, inverse, weight, dtype):
    return total.new_empty(total.shape, dtype=dtype), total.new_empty(total.shape), weight.new_empty(weight.shape)


def _norm_setup(ctx, inputs, output):
    x, residual, weight, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.has_residual = x.dtype, residual is not None
    ctx.save_for_backward(output[1], output[2], weight)


def _norm_vjp(ctx, dy, dtotal, _):
    total, inverse, weight = ctx.saved_tensors
    dy = torch.zeros_like(total) if dy is None else dy
    dx, dresidual, dweight = torch.ops.anymamba.add_rms_norm_backward(dy, dtotal, total, inverse, weight, ctx.dtype)
    return dx, dresidual if ctx.has_residual else None, dweight, None, None


register_autograd("anymamba::add_rms_norm", _norm_vjp, setup_context=_norm_setup)
