"""The door to every kernel: checks arguments once, picks the backend, calls the operator.

| op | reference | numba (CPU) | triton (any GPU) | cuda (NVIDIA) |
|---|---|---|---|---|
| `selective_scan`, `selective_step_` | reference/selective.py | kernels/numba_scan.py, numba_step.py | triton_scan.py | cuda_scan.py |
| `selective_scan` with another `discretization` | the same | numba_discretized.py | triton_discretized.py | cuda_scan.py |
| `causal_conv1d`, `causal_conv1d_step_` | reference/conv.py | kernels/numba_conv.py | triton_conv.py | |
| `add_rms_norm` | reference/norm.py | kernels/numba_norm.py | triton_norm.py | |
| `linear` | torch | kernels/numba_linear.py for a few rows, else torch | torch | torch |
| `time_invariant_scan` | reference/lti.py | kernels/numba_lti.py without gradients, else reference | reference | |
| `quantized_linear` | reference/quantized.py | kernels/numba_quantized.py for a few rows, else reference | reference | |

Axes: b batch, t time, d channels, n d_state, g groups, w d_conv, s sequences (b, or those that cu_seqlens packs).
Functions return `(y, final_state)` and change nothing; only `*_step_` write, into their first argument.
"""  # noqa: E501

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from anymamba import reference
from anymamba.backends import BACKENDS, choose, explain
from anymamba.discretized import discretized_scan
from anymamba.errors import AnymambaError
from anymamba.reference import lti
from anymamba.registration import bounds

__all__ = ["BACKENDS", "add_rms_norm", "causal_conv1d", "causal_conv1d_step_", "explain", "linear",
           "quantized_linear", "selective_scan", "selective_step_", "time_invariant_scan"]  # fmt: skip

# numbers of rows for which our kernel of `linear` on a CPU is faster than torch's, by the weight's dtype (uint8 holds
# 4-bit weights), see docs/decisions.md
FEW_ROWS = {torch.float32: range(1, 17), torch.bfloat16: range(1, 9), torch.float16: range(1, 65),
            torch.int8: range(1, 65), torch.uint8: range(1, 65)}  # fmt: skip


# ---- public functions ------------------------------------------------------------------------------------------


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   z: Tensor | None = None, *, dt_bias: Tensor | None = None, dt_softplus: bool = False,
                   initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
                   return_states: int | None = None, discretization: str = "mamba",
                   backend: str | None = None) -> tuple[Tensor, ...]:  # fmt: skip
    """The selective scan of Mamba (arXiv 2312.00752, equation 2 with Δ, B, C depending on time).

        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t;   y_t = (C_t · h_t + D x_t) · silu(z_t)

    Args:
        x: (b,t,d) input; float32, bfloat16, float16 or float64.
        dt: (b,t,d) step size Δ, raw if `dt_softplus`: Δ = softplus(dt + dt_bias).
        A: (d,n) negative for a state that decays. Complex: it stands for itself and its conjugate, C · h is twice the
            real part, B, C and the states may be complex; the reference computes it, slowly.
        B, C: (b,t,n), (b,t,g,n) with d divisible by g, or constant in time (d,n).
        D: (d,) skip, z: (b,t,d) gate, dt_bias: (d,).
        initial_state: (s,d,n) float32; zeros if None.
        cu_seqlens: (s+1,) integers 0 … t: the one row (b = 1) holds s sequences end to end; s = b without it.
        return_states: k also returns the states after every k steps and the last one, (b,⌈t/k⌉,d,n); not with
            cu_seqlens. The scan then runs k steps at a time: the smaller k, the slower.
        discretization: "mamba" as above, or another way from A, B and Δ to a step: "zoh" (exact for an input that holds
            over the step), "bilinear", "euler", "trapezoidal" (of the last two inputs; the state is (s,d,2n), h and
            then B x; the reference computes it, slowly). `reference.discretize` defines them.
        backend: None chooses (`explain` says what and why); "reference", "numba", "triton", "cuda" force.

    Returns y (b,t,d) in x's dtype, final_state (s,d,n) in float32 (float64 for float64 inputs) and perhaps the states.
    Gradients reach every tensor, also through final_state. Raises AnymambaError for shapes that do not fit.
    """
    _check_scan(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, discretization)
    alone = "a complex A" if A.is_complex() else "trapezoidal" if discretization == "trapezoidal" else None
    if alone and backend not in (None, "reference"):  # it computes the rest, too
        raise AnymambaError(f"selective_scan: backend={backend!r} does not compute {alone}: use backend=None")
    if return_states is not None:
        _check_states(return_states, cu_seqlens)
        options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "discretization": discretization, "backend": backend}
        return _scan_with_states(return_states, x, dt, A, B, C, D, z, initial_state, options)
    op = "selective_scan" if discretization == "mamba" else "discretized_scan"
    backend = "reference" if alone else choose(backend, x, op, A.shape[1])
    cu_seqlens = bounds(cu_seqlens, x, backend)
    if backend == "reference":
        return reference.selective_scan(x, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus,
                                        initial_state=initial_state, cu_seqlens=cu_seqlens,
                                        discretization=discretization)  # fmt: skip
    if op == "discretized_scan" and backend != "cuda":
        return discretized_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, discretization,
                                backend)  # fmt: skip
    common, own = _common_dtype(x, dt, z), float32 if backend == "numba" else up_to_float32
    tensors = (_to(x, common), _to(dt, common), float32(A), own(B), own(C), own(D), _to(z, common), own(dt_bias),
               float32(initial_state))  # fmt: skip
    save = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    *inputs, h0 = tensors
    y, final_state, _ = torch.ops.anymamba.selective_scan(*inputs, dt_softplus, h0, cu_seqlens, save, backend,
                                                           discretization)  # fmt: skip
    return _to(y, x.dtype), final_state


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None,
                  initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
                  backend: str | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Depthwise causal convolution over time: y_t = act(Σ_k weight[:,k] x_{t-w+1+k} + bias).

    Args:
        x: (b,t,d); weight: (d,w); bias: (d,); activation: None or "silu".
        initial_state: (s,d,w-1) inputs before the first, zeros if None. cu_seqlens, backend: as `selective_scan`.

    Returns y (b,t,d) and final_state (s,d,w-1), the last w-1 inputs, both in x's dtype.
    Gradients reach every tensor, also through final_state. Raises AnymambaError for shapes that do not fit.
    """
    check_conv(x, weight, bias, activation, initial_state, cu_seqlens)
    backend = choose(backend, x, "causal_conv1d", weight.shape[1])
    cu_seqlens = bounds(cu_seqlens, x, backend)
    if backend == "reference":
        return reference.causal_conv1d(x, weight, bias, activation=activation, initial_state=initial_state,
                                       cu_seqlens=cu_seqlens)  # fmt: skip
    own = float32 if backend == "numba" else up_to_float32
    return torch.ops.anymamba.causal_conv1d(x, own(weight), own(bias), activation == "silu", own(initial_state),
                                            cu_seqlens, backend)  # fmt: skip


def selective_step_(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                    z: Tensor | None = None, *, dt_bias: Tensor | None = None, dt_softplus: bool = False,
                    discretization: str = "mamba", backend: str | None = None) -> Tensor:  # fmt: skip
    """One token of `selective_scan`: x, dt, z (b,d); B, C (b,n) or (b,g,n); `state` (b,d,n) is advanced in place.

    Returns y (b,d). Raises AnymambaError for shapes that do not fit.
    """
    x, dt, B, C, z = (v if v is None else v.unsqueeze(1) for v in (x, dt, B, C, z))
    y, h = selective_scan(x, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus, initial_state=state,
                          discretization=discretization, backend=backend)  # fmt: skip
    state.copy_(h)
    return y.squeeze(1)


def causal_conv1d_step_(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
                        activation: str | None = None, backend: str | None = None) -> Tensor:  # fmt: skip
    """One token of `causal_conv1d`: x (b,d); `state` (b,d,w-1) drops its oldest input and takes x in, in place.

    Returns y (b,d). Raises AnymambaError for shapes that do not fit.
    """
    y, new = causal_conv1d(x.unsqueeze(1), weight, bias, activation=activation, initial_state=state, backend=backend)
    state.copy_(new)
    return y.squeeze(1)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float = 1e-5,
                 dtype: torch.dtype | None = None, backend: str | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """total = x + residual and its RMS norm (arXiv 1910.07467), the step between two blocks, in one pass.

    Args:
        x: (…,m); residual: (…,m) or None; weight: (m,); dtype: of the normed output, x's if None.

    Returns normed (…,m) and total (…,m) in float32 (float64 for float64 inputs). Gradients reach every tensor.
    Raises AnymambaError for shapes that do not fit.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        _fail("add_rms_norm", "weight", weight, f"it must be ({x.shape[-1] if x.dim() else 1},), the last axis of x")
    if residual is not None and residual.shape != x.shape:
        _fail("add_rms_norm", "residual", residual, f"it must have the shape of x, {tuple(x.shape)}")
    if not x.is_floating_point() or (dtype is not None and not dtype.is_floating_point):
        _fail("add_rms_norm", "x", x, f"x and dtype={dtype} must be floating-point types")
    backend = choose(backend, x, "add_rms_norm")
    if backend == "reference" or dtype == torch.float64:
        return reference.add_rms_norm(x, residual, weight, eps=eps, dtype=dtype)
    weight = float32(weight) if backend == "numba" else up_to_float32(weight)
    out, total, _ = torch.ops.anymamba.add_rms_norm(x, float32(residual), weight, eps, dtype or x.dtype, backend)
    return out, total


# ---- what the kernels take -------------------------------------------------------------------------------------


def _scan_with_states(k, x, dt, A, B, C, D, z, initial_state, options):
    """`selective_scan` k steps at a time; where each ends the next begins."""
    ys, states, h = [], [], initial_state
    for i in range(0, max(x.shape[1], 1), k):
        x_i, dt_i, B_i, C_i, z_i = (v if v is None or v.dim() == 2 else v[:, i : i + k] for v in (x, dt, B, C, z))
        y, h = selective_scan(x_i, dt_i, A, B_i, C_i, D, z_i, initial_state=h, **options)
        ys.append(y)
        states.append(h)
    states = torch.stack(states, 1)
    return torch.cat(ys, 1), h, states if x.shape[1] else states[:, :0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…,k) times weight (outputs,k)ᵀ plus bias (outputs,): torch's own, but for decoding on a CPU.

    There, for a few rows and without gradients, a kernel reads each weight from memory once.
    """
    if x.dtype != weight.dtype or x.shape[-1] != weight.shape[1] or not _few_rows(x, weight):
        return F.linear(x, weight, bias)
    from anymamba.kernels.numba_linear import linear

    y = linear(x.reshape(-1, x.shape[-1]), weight)
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def time_invariant_scan(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor,
                        initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h_t = A_bar h_{t-1} + B_bar x_t, y_t = 2 Re(C h_t): x (b,t,d); A_bar, B_bar, C (d,n) complex; states (b,d,n).

    A complex entry stands for itself and its conjugate (arXiv 2206.11893, section 3.3). In float32 on a CPU and without
    gradients a kernel walks over time; else it is computed in chunks, see `reference.lti`. Returns y and last state.
    """
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
    if not plain or not _alone() or explain("cpu", x.dtype)[0] != "numba":
        run = lti.recurrence if x.shape[1] == 1 else lti.chunked
        return run(x, A_bar, B_bar, C, initial_state)
    from anymamba.kernels.numba_lti import recurrence

    return recurrence(x, A_bar, B_bar, C, initial_state)


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of a weight that `reference.quantize_weight` made: integers (outputs,k), scale (outputs,groups) float32.

    For a few rows on a CPU a kernel reads the integers once; for more, and elsewhere, they are widened to x's dtype
    first. No gradients reach the weight.
    """
    if not _few_rows(x, weight):
        return F.linear(x, reference.dequantize_weight(weight, scale, x.shape[-1], x.dtype), bias)
    from anymamba.kernels.numba_quantized import linear

    y = linear(x.reshape(-1, x.shape[-1]), weight, scale)
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _alone():
    """Whether nothing needs to see torch's operators: no gradient, no compiler, nobody who counts operations."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode())


def _few_rows(x, weight):
    rows = FEW_ROWS.get(weight.dtype)
    if rows is None or x.dtype not in FEW_ROWS or not _alone():
        return False
    plain = type(x) is Tensor and type(weight) in (Tensor, torch.nn.Parameter) and weight.is_contiguous()
    if not plain or weight.device.type != "cpu" or x.device != weight.device:
        return False
    return x.numel() // max(x.shape[-1], 1) in rows and explain("cpu", x.dtype)[0] == "numba"


def _to(v, dtype):
    return v if v is None or v.dtype == dtype else v.to(dtype)


def float32(v):
    return _to(v, torch.float32)


def up_to_float32(v):
    """v as it is if a GPU kernel can read it."""
    return v if v is None or v.dtype in (torch.float32, torch.bfloat16, torch.float16) else v.float()


def _common_dtype(x, dt, z):
    common = x.dtype
    if dt.dtype != common:
        common = torch.promote_types(common, dt.dtype)
    if z is not None and z.dtype != common:
        common = torch.promote_types(common, z.dtype)
    return torch.float32 if common == torch.float64 else common


# ---- checks ----------------------------------------------------------------------------------------------------


def _fail(op, name, tensor, rule):
    got = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else repr(tensor)
    raise AnymambaError(f"{op}: {name} is {got}, but {rule}")


def _check_common(op, x, cu_seqlens, others):
    if x.dim() != 3:
        _fail(op, "x", x, "it must be (batch, seqlen, channels); add the missing axis, for example with x[None]")
    if not x.is_floating_point():
        _fail(op, "x", x, "it must be a real floating-point tensor: float32, bfloat16, float16 or float64")
    if cu_seqlens is not None:
        if x.shape[0] != 1:
            _fail(op, "x", x, "with cu_seqlens the sequences lie end to end in one row: batch must be 1")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
            _fail(op, "cu_seqlens", cu_seqlens, "it must be a vector of at least 2 integers: 0 and the sequences' ends")
    device = x.device
    for name, v in others.items():
        if v is not None and v.device != device:
            raise AnymambaError(f"{op}: {name} is on {v.device}, x on {device}; move them to one device")


def _check_scan(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, discretization):
    op = "selective_scan"
    if discretization not in reference.RULES:
        _fail(op, "discretization", discretization, f"it must be one of {', '.join(reference.RULES)}")
    others = {"dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "initial_state": initial_state}
    _check_common(op, x, cu_seqlens, others)
    b, t, d = x.shape
    if A.dim() != 2 or A.shape[0] != d or A.shape[1] == 0:
        _fail(op, "A", A, f"it must be (d, n) with d = {d}, the channels of x {tuple(x.shape)}, and n ≥ 1")
    for name, v in ({} if A.is_complex() else {"B": B, "C": C, "initial_state": initial_state}).items():
        if v is not None and v.is_complex():
            _fail(op, name, v, "it can be complex only where A is complex, and A is real")
    for name, v in {"dt": dt, "D": D, "z": z, "dt_bias": dt_bias}.items():
        if v is not None and v.is_complex():
            _fail(op, name, v, "it must be real")
    n = A.shape[1]
    for name, v in {"dt": dt, "z": z}.items():
        if v is not None and v.shape != x.shape:
            _fail(op, name, v, f"it must have the shape of x, {tuple(x.shape)}")
    for name, v in {"B": B, "C": C}.items():
        fits = v.shape in ((b, t, n), (d, n)) or (v.dim() == 4 and v.shape[:2] == (b, t) and v.shape[3] == n)
        if not fits or (v.dim() == 4 and (v.shape[2] == 0 or d % v.shape[2])):
            _fail(op, name, v, f"it must be (b,t,n) = {(b, t, n)}, (b,t,g,n) with g a divisor of d = {d}, or (d,n) = {(d, n)}")  # noqa: E501  # fmt: skip
    if B.dim() == 4 and C.dim() == 4 and B.shape[2] != C.shape[2]:
        _fail(op, "C", C, f"it must have as many groups as B {tuple(B.shape)}")
    for name, v in {"D": D, "dt_bias": dt_bias}.items():
        if v is not None and v.shape != (d,):
            _fail(op, name, v, f"it must be ({d},), one number a channel of x {tuple(x.shape)}")
    sequences, n = b if cu_seqlens is None else cu_seqlens.numel() - 1, n * (1 + (discretization == "trapezoidal"))
    check_state(op, initial_state, (sequences, d, n), "sequences, d, n")


def _check_states(k, cu_seqlens):
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise AnymambaError(f"selective_scan: return_states={k!r}, but it must be a whole number of steps, at least 1")
    if cu_seqlens is not None:
        raise AnymambaError("selective_scan: return_states with cu_seqlens: scan the sequences one by one for states")


def check_conv(x, weight, bias, activation, initial_state, cu_seqlens):
    op = "causal_conv1d"
    _check_common(op, x, cu_seqlens, {"weight": weight, "bias": bias, "initial_state": initial_state})
    b, _, d = x.shape
    if weight.dim() != 2 or weight.shape[0] != d or weight.shape[1] == 0:
        _fail(op, "weight", weight, f"it must be (d, w) with d = {d}; a torch Conv1d weight (d,1,w) needs .squeeze(1)")
    if bias is not None and bias.shape != (d,):
        _fail(op, "bias", bias, f"it must be ({d},)")
    if activation not in (None, "silu"):
        _fail(op, "activation", activation, 'it must be None or "silu"')
    shape = (b if cu_seqlens is None else cu_seqlens.numel() - 1, d, weight.shape[1] - 1)
    check_state(op, initial_state, shape, "sequences, d, w - 1")


def check_state(op, state, shape, axes):
    if state is not None and state.shape != shape:
        _fail(op, "initial_state", state, f"it must be ({axes}) = {shape}")
