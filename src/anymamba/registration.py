"""The kernels as torch operators: schemas, implementations, shapes for tracing, and derivatives.

Being operators is what lets `torch.compile(fullgraph=True)`, `torch.export` and autograd see one node, not a loop.
One operator serves all backends: its last argument names the one that runs, and that backend's module does the work.
Arguments come checked from `ops`: x, dt, z of one dtype, A and the scan's state float32, a gradient has its input's.
"""

import functools
import importlib

import torch
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake
from torch.utils.weak import WeakTensorKeyDictionary

from anymamba.errors import AnymambaError

DEVICES = ("cpu", "cuda", "xpu")
SCAN_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias"
RULE = 'str rule="mamba"'  # of discretisation: others than Mamba's are asked of CUDA kernels only, see `discretized`
CONV_INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? cu_seqlens, str backend"

define(
    "anymamba::selective_scan",
    f"({SCAN_INPUTS}, bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens, bool save, str backend, {RULE})"
    " -> (Tensor y, Tensor final_state, Tensor saved)",
)
define(
    "anymamba::selective_scan_backward",
    f"(Tensor dy, Tensor? dfinal_state, {SCAN_INPUTS}, bool dt_softplus, Tensor? cu_seqlens, Tensor saved, "
    f"str backend, {RULE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
define("anymamba::causal_conv1d", f"({CONV_INPUTS}) -> (Tensor y, Tensor final_state)")
define(
    "anymamba::causal_conv1d_backward",
    f"(Tensor dy, Tensor? dfinal_state, {CONV_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
define(
    "anymamba::add_rms_norm",
    "(Tensor x, Tensor? residual, Tensor weight, float eps, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor)",
)
define(
    "anymamba::add_rms_norm_backward",
    "(Tensor dy, Tensor? dtotal, Tensor total, Tensor inverse, Tensor weight, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)

FILES = {"selective_scan": "scan", "saved_shape": "scan", "selective_scan_backward": "scan_backward",
         "causal_conv1d": "conv", "causal_conv1d_backward": "conv",
         "add_rms_norm": "norm", "add_rms_norm_backward": "norm"}  # fmt: skip


@functools.cache
def kernel(backend: str, name: str):
    """The function of that name of a backend."""
    file = {"numba": "numba_ops", "cuda": "cuda_scan"}.get(backend, f"{backend}_{FILES[name]}")
    return getattr(importlib.import_module(f"anymamba.kernels.{file}"), name)


# ---- shapes ----------------------------------------------------------------------------------------------------


def check_bounds(cu_seqlens: Tensor, t: int) -> None:
    """Raise AnymambaError unless the offsets start at 0, never fall and end at t."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != t or any(i > j for i, j in zip(ends, ends[1:], strict=False)):
        shown = f"{ends[:6]} …" if len(ends) > 6 else f"{ends}"
        raise AnymambaError(f"cu_seqlens is {shown}, but it must start at 0, never fall, and end at seqlen = {t}")


_known_bounds = WeakTensorKeyDictionary()  # cu_seqlens → (version, t, device, stream, what kernels take; None: itself)


def bounds(cu_seqlens, x, backend):
    """cu_seqlens on the device of x, checked. To read values from a GPU is to wait for it: once for each tensor."""
    if cu_seqlens is None or backend == "numba":  # whose operator checks
        return cu_seqlens
    t, device = x.shape[1], x.device
    if backend == "reference":
        check_bounds(cu_seqlens, t)
        return cu_seqlens
    if torch.compiler.is_compiling():
        return _placed(cu_seqlens, device)
    here = cu_seqlens.device == device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if not here:
            raise AnymambaError(f"capture of a CUDA graph: cu_seqlens is on {cu_seqlens.device}, but it must be on "
                                f"{device} like x: move it there")  # fmt: skip
        return _placed(cu_seqlens, device)  # checked by the warm-up
    counted = not cu_seqlens.is_inference()  # tensors made in inference_mode have no version
    version = cu_seqlens._version if counted else 0
    stream = (
        torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    )  # whose order a copy keeps
    known = _known_bounds.get(cu_seqlens)
    if known is None or known[:4] != (version, t, device, stream) or not (counted or here):
        check_bounds(cu_seqlens, t)
        with torch.inference_mode(False):  # kept, and used in any mode
            placed = _placed(cu_seqlens, device)
        known = (version, t, device, stream, None if placed is cu_seqlens else placed)
        _known_bounds[cu_seqlens] = known
    return cu_seqlens if known[4] is None else known[4]


def _placed(cu_seqlens, device):
    dtype = cu_seqlens.dtype if cu_seqlens.dtype in (torch.int32, torch.int64) else torch.int64
    # a copy from pinned memory that nobody waits for would see what is written there next; a compiler cannot ask
    wait = torch.compiler.is_compiling() or cu_seqlens.is_pinned()
    return cu_seqlens.to(device, dtype, non_blocking=not wait).contiguous()


def check_numba(x, cu_seqlens, backend):
    # where values are in reach of the CPU they are checked here, which torch.compile cannot leave out
    if backend == "numba" and cu_seqlens is not None:
        check_bounds(cu_seqlens, x.shape[1])


def count_sequences(x, cu_seqlens):
    return x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _or_empty(v, like):
    return like.new_empty(0) if v is None else v


def _dense_like(v):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _dense_or_empty(v, like):
    return like.new_empty(0) if v is None else _dense_like(v)


# ---- selective scan --------------------------------------------------------------------------------------------


@impl("anymamba::selective_scan", DEVICES)
def _scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, save, backend, rule="mamba"):
    check_numba(x, cu_seqlens, backend)
    y, final_state, saved = kernel(backend, "selective_scan")(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, save, **_other(rule, backend)
    )
    return y, final_state, _or_empty(saved, A)


def _other(rule, backend):
    if rule != "mamba" and backend != "cuda":
        raise AnymambaError(f"torch.ops.anymamba.selective_scan: rule={rule!r} with backend={backend!r}, but only the "
                            "CUDA kernels of this operator know it; call ops.selective_scan")  # fmt: skip
    return {} if rule == "mamba" else {"rule": rule}


@register_fake("anymamba::selective_scan")
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, save, backend, rule="mamba"):
    _other(rule, backend)
    sequences, shape = count_sequences(x, cu_seqlens), (0,)
    if save:
        groups = max(v.shape[2] if v.dim() == 4 else 1 for v in (B, C))
        shape = kernel(backend, "saved_shape")(x.shape, A.shape, groups, sequences)
    return _dense_like(x), A.new_empty(sequences, *A.shape), A.new_empty(shape)


@impl("anymamba::selective_scan_backward", DEVICES)
def _scan_backward(dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens, saved, backend,
                   rule="mamba"):  # fmt: skip
    check_numba(x, cu_seqlens, backend)
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial = kernel(backend, "selective_scan_backward")(
        dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens, saved, **_other(rule, backend)
    )
    return dx, ddt, dA, dB, dC, _or_empty(dD, A), _or_empty(dz, x), _or_empty(ddt_bias, A), dinitial


@register_fake("anymamba::selective_scan_backward")
def _(dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens, saved, backend, rule="mamba"):
    optional = [_dense_or_empty(v, like) for v, like in ((D, A), (z, x), (dt_bias, A))]
    return *map(_dense_like, (x, dt, A, B, C)), *optional, A.new_empty(count_sequences(x, cu_seqlens), *A.shape)


def _scan_setup(ctx, inputs, output):
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, _, cu_seqlens, save, backend, rule = inputs
    ctx.set_materialize_grads(False)
    ctx.dt_softplus, ctx.save, ctx.backend, ctx.rule = dt_softplus, save, backend, rule
    ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, output[2])


def _scan_vjp(ctx, dy, dfinal_state, _):
    x, dt, A, B, C, D, z, dt_bias, cu_seqlens, saved = ctx.saved_tensors
    if not ctx.save:
        raise AnymambaError("torch.ops.anymamba.selective_scan was called with save=False; call ops.selective_scan")
    dy = torch.zeros_like(x) if dy is None else dy
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial = torch.ops.anymamba.selective_scan_backward(
        dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, cu_seqlens, saved, ctx.backend, ctx.rule
    )
    dD, dz, ddt_bias = (None if v is None else g for v, g in ((D, dD), (z, dz), (dt_bias, ddt_bias)))
    dinitial = dinitial if ctx.needs_input_grad[9] else None
    return dx, ddt, dA, dB, dC, dD, dz, ddt_bias, None, dinitial, None, None, None, None


register_autograd("anymamba::selective_scan", _scan_vjp, setup_context=_scan_setup)


# ---- causal convolution ----------------------------------------------------------------------------------------


@impl("anymamba::causal_conv1d", DEVICES)
def _conv(x, weight, bias, silu, initial_state, cu_seqlens, backend):
    check_numba(x, cu_seqlens, backend)
    return kernel(backend, "causal_conv1d")(x, weight, bias, silu, initial_state, cu_seqlens)


@register_fake("anymamba::causal_conv1d")
def _(x, weight, bias, silu, initial_state, cu_seqlens, backend):
    return _dense_like(x), x.new_empty(count_sequences(x, cu_seqlens), weight.shape[0], weight.shape[1] - 1)


@impl("anymamba::causal_conv1d_backward", DEVICES)
def _conv_backward(dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens, backend):
    check_numba(x, cu_seqlens, backend)
    dx, dweight, dbias, dinitial = kernel(backend, "causal_conv1d_backward")(
        dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens
    )
    return dx, dweight, _or_empty(dbias, weight), _or_empty(dinitial, x)


@register_fake("anymamba::causal_conv1d_backward")
def _(dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens, backend):
    return _dense_like(x), _dense_like(weight), _dense_or_empty(bias, weight), _dense_or_empty(initial_state, x)


def _conv_setup(ctx, inputs, output):
    x, weight, bias, silu, initial_state, cu_seqlens, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.silu, ctx.backend = silu, backend
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)


def _conv_vjp(ctx, dy, dfinal_state):
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dinitial = torch.ops.anymamba.causal_conv1d_backward(
        dy, dfinal_state, x, weight, bias, ctx.silu, initial_state, cu_seqlens, ctx.backend
    )
    dinitial = dinitial if ctx.needs_input_grad[4] else None
    return dx, dweight, None if bias is None else dbias, None, dinitial, None, None


register_autograd("anymamba::causal_conv1d", _conv_vjp, setup_context=_conv_setup)


# ---- residual add + norm ---------------------------------------------------------------------------------------


@impl("anymamba::add_rms_norm", DEVICES)
def _norm(x, residual, weight, eps, dtype, backend):
    return kernel(backend, "add_rms_norm")(x, residual, weight, eps, dtype)


@register_fake("anymamba::add_rms_norm")
def _(x, residual, weight, eps, dtype, backend):
    total = x.new_empty(x.shape, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), total, total.new_empty(x.numel() // x.shape[-1])


@impl("anymamba::add_rms_norm_backward", DEVICES)
def _norm_backward(dy, dtotal, total, inverse, weight, dtype, backend):
    dx, dresidual, dweight = kernel(backend, "add_rms_norm_backward")(dy, dtotal, total, inverse, weight, dtype)
    return dx, _or_empty(dresidual, total), dweight


@register_fake("anymamba::add_rms_norm_backward")
def _(dy, dtotal, total, inverse, weight, dtype, backend):
    dresidual = total.new_empty(0 if dtype == torch.float32 else total.shape)
    return total.new_empty(total.shape, dtype=dtype), dresidual, _dense_like(weight)


def _norm_setup(ctx, inputs, output):
    x, residual, weight, _, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.has_residual, ctx.backend = x.dtype, residual is not None, backend
    ctx.save_for_backward(output[1], output[2], weight)


def _norm_vjp(ctx, dy, dtotal, _):
    total, inverse, weight = ctx.saved_tensors
    dy = torch.zeros_like(total) if dy is None else dy
    dx, dresidual, dweight = torch.ops.anymamba.add_rms_norm_backward(
        dy, dtotal, total, inverse, weight, ctx.dtype, ctx.backend
    )
    if ctx.dtype == torch.float32:  # the two are the same numbers: written once
        dresidual = dx
    return dx, dresidual if ctx.has_residual else None, dweight, None, None, None


register_autograd("anymamba::add_rms_norm", _norm_vjp, setup_context=_norm_setup)


# ---- derivatives of derivatives --------------------------------------------------------------------------------


def _refuse(name):
    def vjp(ctx, *_):
        raise AnymambaError(f"{name} cannot be differentiated twice by its kernels; backend='reference' can")

    register_autograd(f"anymamba::{name}_backward", vjp)


for _name in ("selective_scan", "causal_conv1d", "add_rms_norm"):
    _refuse(_name)
