"""What lies between the mixer's two big projections, as one node of autograd: for training.

It computes what `MambaMixer.forward` says, by the same operators. As nodes of their own they would hand their gradients
to autograd to be joined: dx and dz copied into one array for in_proj, the dx of the scan and of x_proj added in a pass
over both. Here each gradient is written where it is needed, and the host has one node to walk instead of seven.

Axes: b batch, t time, d d_inner, n d_state, r dt_rank, w d_conv, s sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from anymamba.backends import choose
from anymamba.layers.linear import Linear, StepProjection, is_watched
from anymamba.layers.norm import compute_dtype
from anymamba.ops import bounds, check_conv, check_state, float32, up_to_float32
from anymamba.registration import kernel


def mamba_inner(xz: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, x_weight: Tensor, dt_weight: Tensor,
                dt_bias: Tensor, A: Tensor, D: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None,
                cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Convolution, the projections to dt, B and C, and the scan (arXiv 2312.00752, algorithm 2 and figure 3).

    Args:
        xz: (b,t,2d) what in_proj gives; conv_weight: (d,w), conv_bias: (d,) or None; x_weight: (r+2n,d);
            dt_weight: (d,r), dt_bias: (d,); A: (d,n); D: (d,); states and cu_seqlens as `ops` takes them.

    Returns y (b,t,d) and the states after: (s,d,w-1) and (s,d,n). The three have gradients, once. `takes` tells when
    it can be called. Raises AnymambaError for states or cu_seqlens that do not fit.
    """
    x, sequences = xz.chunk(2, -1)[0], xz.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_conv(x, conv_weight, conv_bias, "silu", conv_state, cu_seqlens)
    check_state("selective_scan", ssm_state, (sequences, *A.shape), "sequences, d, n")
    backends = _backends(xz, A, conv_weight)
    cu_seqlens, own = bounds(cu_seqlens, xz, backends[0]), _own(backends[0])
    return _Inner.apply(
        xz, own(conv_weight), own(conv_bias), x_weight.to(xz.dtype), dt_weight.to(xz.dtype), own(dt_bias), A, own(D),
        own(conv_state), float32(ssm_state), cu_seqlens, backends,
    )  # fmt: skip


def takes(mixer: nn.Module, xz: Tensor) -> bool:
    """Whether `mamba_inner` computes what this mixer's modules would: nothing else listens, and gradients are wanted.

    Compilers join passes themselves, and need to see the operators.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if not mixer.config.published:
        return False
    if xz.dtype != compute_dtype(xz.device.type, mixer.x_proj.weight.dtype) or 0 in xz.shape or xz.shape[1] == 1:
        return False
    if mixer.config.inner_norm_eps is not None or not all(map(_alone, (mixer.conv1d, mixer.x_proj, mixer.dt_proj))):
        return False
    return "reference" not in _backends(xz, mixer.A_log, mixer.conv1d.weight.squeeze(1))


def _backends(xz, A, conv_weight):
    """What runs the scan, and the convolution."""
    return choose(None, xz, "selective_scan", A.shape[1]), choose(None, xz, "causal_conv1d", conv_weight.shape[1])


def _own(scan):
    """Brings vectors and small matrices to what the kernels read."""
    return float32 if scan == "numba" else up_to_float32


def _alone(module):
    if type(module) not in (Linear, StepProjection, nn.Conv1d) or is_watched(module):
        return False
    return all(type(v) in (Tensor, nn.Parameter) for v in (module.weight, module.bias) if v is not None)


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, xz, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A, D, conv_state, ssm_state, cu_seqlens,
                backends):  # fmt: skip
        (scan, conv), own = backends, _own(backends[0])
        x_in, z = xz.chunk(2, -1)
        x, conv_after = torch.ops.anymamba.causal_conv1d(x_in, conv_weight, conv_bias, True, conv_state, cu_seqlens,
                                                         conv)  # fmt: skip
        dt_B_C = F.linear(x, x_weight)
        low, B, C = _parts(dt_B_C, dt_weight, A)
        dt = F.linear(low, dt_weight)
        y, ssm_after, saved = torch.ops.anymamba.selective_scan(
            x, dt, A, own(B), own(C), D, z, dt_bias, True, ssm_state, cu_seqlens, True, scan
        )
        ctx.set_materialize_grads(False)
        ctx.backends = backends
        ctx.save_for_backward(xz, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A, D, conv_state, cu_seqlens, x,
                              dt_B_C, dt, saved)  # fmt: skip
        return y, conv_after, ssm_after

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dconv_after, dssm_after):
        (xz, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A, D, conv_state, cu_seqlens, x, dt_B_C, dt,
         saved) = ctx.saved_tensors  # fmt: skip
        (scan, conv), own, needed = ctx.backends, _own(ctx.backends[0]), ctx.needs_input_grad
        x_in, z = xz.chunk(2, -1)
        low, B, C = _parts(dt_B_C, dt_weight, A)
        dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
        dx_in, dz = dxz.chunk(2, -1)
        dy = torch.zeros_like(x) if dy is None else dy
        dx, ddt, dA, dB, dC, dD, _, ddt_bias, dssm_state = kernel(scan, "selective_scan_backward")(
            dy, dssm_after, x, dt, A, own(B), own(C), D, z, dt_bias, True, cu_seqlens, saved, dz_out=dz
        )
        d_parts = torch.cat([ddt @ dt_weight, dB.to(dt.dtype), dC.to(dt.dtype)], -1)
        dx.flatten(0, 1).addmm_(d_parts.flatten(0, 1), x_weight)  # what came through x_proj, added in the product
        dx_weight = _outer(d_parts, x) if needed[3] else None
        ddt_weight = _outer(ddt, low) if needed[4] else None
        _, dconv_weight, dconv_bias, dconv_state = kernel(conv, "causal_conv1d_backward")(
            dx, dconv_after, x_in, conv_weight, conv_bias, True, conv_state, cu_seqlens, dx_out=dx_in
        )
        dssm_state = dssm_state if needed[9] else None
        return (dxz, dconv_weight, dconv_bias, dx_weight, ddt_weight, ddt_bias, dA, dD, dconv_state, dssm_state, None,
                None)  # fmt: skip


def _parts(dt_B_C, dt_weight, A):
    n = A.shape[1]
    return dt_B_C.split([dt_weight.shape[1], n, n], -1)


def _outer(dy, x):
    """Gradient of a linear layer's weight."""
    return dy.flatten(0, 1).T @ x.flatten(0, 1)
