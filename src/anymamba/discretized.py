"""The selective scan with another discretisation than Mamba's own: zoh, bilinear, euler. See `reference.discretize`.

    h_t = a(Δ_t A) h_{t-1} + Δ_t p(Δ_t A) B_t x_t;   y_t = C_t · h_t

Numba's and Triton's kernels compute these two lines in float32; what is the same for every rule (softplus, skip, gate)
is torch's here. On NVIDIA GPUs, up to a d_state of 64, `ops` takes the scan's own CUDA kernels, which know the rules.
The operator takes x and dt (b,t,d), A (d,n), and B, C as (b,t,g,n), one g for both, or constant (d,n).
"""

import functools
import importlib

import torch
import torch.nn.functional as F
from torch.library import define, impl, register_autograd, register_fake

from anymamba.errors import AnymambaError
from anymamba.registration import DEVICES, check_numba, count_sequences

INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C"
define(
    "anymamba::discretized_scan",
    f"({INPUTS}, Tensor? initial_state, Tensor? cu_seqlens, str rule, bool save, str backend)"
    " -> (Tensor y, Tensor final_state, Tensor saved)",
)
define(
    "anymamba::discretized_scan_backward",
    f"(Tensor dy, Tensor? dfinal_state, {INPUTS}, Tensor? cu_seqlens, str rule, Tensor saved, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def discretized_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, rule, backend):
    """`ops.selective_scan` for the rules beside "mamba" on Numba or Triton; its arguments, checked."""
    size = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    size = F.softplus(size) if dt_softplus else size
    groups = max(v.shape[2] if v.dim() == 4 else 1 for v in (B, C))
    wide, B, C = x.float(), _grouped(B.float(), groups), _grouped(C.float(), groups)
    initial_state = None if initial_state is None else initial_state.float()
    tensors = (wide, size, A.float(), B, C, initial_state)
    save = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    y, final_state, _ = torch.ops.anymamba.discretized_scan(*tensors, cu_seqlens, rule, save, backend)
    if D is not None:
        y = y + D.float() * wide
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(x.dtype), final_state


def _grouped(v, groups):
    return v.unsqueeze(2).expand(-1, -1, groups, -1) if v.dim() == 3 else v


@functools.cache
def _kernel(backend, name):
    return getattr(importlib.import_module(f"anymamba.kernels.{backend}_discretized"), name)


# ---- the operator ----------------------------------------------------------------------------------------------


@impl("anymamba::discretized_scan", DEVICES)
def _scan(x, dt, A, B, C, initial_state, cu_seqlens, rule, save, backend):
    check_numba(x, cu_seqlens, backend)
    y, final_state, saved = _kernel(backend, "discretized_scan")(x, dt, A, B, C, initial_state, cu_seqlens, rule, save)
    return y, final_state, x.new_empty(0) if saved is None else saved


@register_fake("anymamba::discretized_scan")
def _(x, dt, A, B, C, initial_state, cu_seqlens, rule, save, backend):
    sequences, shape = count_sequences(x, cu_seqlens), (0,)
    if save:
        groups = next((v.shape[2] for v in (B, C) if v.dim() == 4), 1)
        shape = _kernel(backend, "saved_shape")(x.shape, A.shape, groups, sequences)
    return x.new_empty(x.shape), x.new_empty(sequences, *A.shape), x.new_empty(shape)


@impl("anymamba::discretized_scan_backward", DEVICES)
def _scan_backward(dy, dfinal_state, x, dt, A, B, C, cu_seqlens, rule, saved, backend):
    check_numba(x, cu_seqlens, backend)
    return _kernel(backend, "discretized_scan_backward")(dy, dfinal_state, x, dt, A, B, C, cu_seqlens, rule, saved)


@register_fake("anymamba::discretized_scan_backward")
def _(dy, dfinal_state, x, dt, A, B, C, cu_seqlens, rule, saved, backend):
    dinitial_state = x.new_empty(count_sequences(x, cu_seqlens), *A.shape)
    return *(v.new_empty(v.shape) for v in (x, dt, A, B, C)), dinitial_state


def _setup(ctx, inputs, output):
    x, dt, A, B, C, _, cu_seqlens, rule, save, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.rule, ctx.save, ctx.backend = rule, save, backend
    ctx.save_for_backward(x, dt, A, B, C, cu_seqlens, output[2])


def _vjp(ctx, dy, dfinal_state, _):
    x, dt, A, B, C, cu_seqlens, saved = ctx.saved_tensors
    if not ctx.save:
        raise AnymambaError("torch.ops.anymamba.discretized_scan was called with save=False; call ops.selective_scan")
    dy = torch.zeros_like(x) if dy is None else dy
    *gradients, dinitial_state = torch.ops.anymamba.discretized_scan_backward(
        dy, dfinal_state, x, dt, A, B, C, cu_seqlens, ctx.rule, saved, ctx.backend
    )
    return *gradients, dinitial_state if ctx.needs_input_grad[5] else None, None, None, None, None


def _vjp_twice(ctx, *_):
    raise AnymambaError("discretized_scan cannot be differentiated twice by its kernels; backend='reference' can")


register_autograd("anymamba::discretized_scan", _vjp, setup_context=_setup)
register_autograd("anymamba::discretized_scan_backward", _vjp_twice)
