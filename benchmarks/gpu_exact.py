"""The scan in plain torch, fast enough to check long sequences: all chunks of time side by side, in any precision.

The same mathematics as `anymamba.reference`, which walks t steps; here it is about 2·√t, at the cost of a (b,t,d,n)
tensor, so it is meant for a few channels.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def chunked_scan(x, dt, A, B, C, D, z, dt_bias, real=torch.float64, as_kernel=False) -> Tensor:
    """y (b,t,d) in `real` of the scan with softplus; B and C are (b,t,n). See `anymamba.ops.selective_scan`.

    as_kernel: decays as mamba-ssm's CUDA kernel has them, powers of 2 of Δ (A log₂e) by the GPU's approximation, which
    torch.exp2 is too, and products of those of single steps; else each is one exponential of a sum of steps.
    """
    b, t, d = x.shape
    x, dt, A, B, C, D, z, dt_bias = (v.to(real) for v in (x, dt, A, B, C, D, z, dt_bias))
    dt = F.softplus(dt + dt_bias)
    length = math.isqrt(t - 1) + 1
    chunks = -(-t // length)

    def fold(v):  # (b,t,…) → (b, chunks, length, …); steps of size 0 at the end change nothing
        return F.pad(v, (0, 0, 0, chunks * length - t)).view(b, chunks, length, -1)

    step, u, B, C = fold(dt), fold(dt * x), fold(B), fold(C)
    exp, A = (torch.exp2, A * math.log2(math.e)) if as_kernel else (torch.exp, A)
    h, inside, product, products = 0, [], 1, []  # states of every chunk, as if it began with zeros, and decays since
    for step_i, u_i, B_i in zip(step.unbind(2), u.unbind(2), B.unbind(2), strict=True):
        decay = exp(step_i[..., None] * A)
        h, product = decay * h + u_i[..., None] * B_i[:, :, None], decay * product
        inside.append(h)
        products.append(product)
    inside = torch.stack(inside, 2)  # (b, chunks, length, d, n)
    decay = torch.stack(products, 2) if as_kernel else exp(step.cumsum(2)[..., None] * A)
    h, before = torch.zeros_like(inside[:, 0, 0]), []
    for decay_k, inside_k in zip(decay[:, :, -1].unbind(1), inside[:, :, -1].unbind(1), strict=True):
        before.append(h)
        h = decay_k * h + inside_k
    h = inside + decay * torch.stack(before, 1)[:, :, None]
    y = (h * C[:, :, :, None]).sum(-1).reshape(b, chunks * length, d)[:, :t]
    return (y + D * x) * F.silu(z)


def outputs(function: Callable, arguments: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """{"y", "dx", …}: the output and, for its gradient dy, that of every argument."""
    leaves = {k: v.detach().requires_grad_() for k, v in arguments.items()}
    y = function(**leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {"d" + k: v for k, v in zip(leaves, gradients, strict=True)}


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def scan_errors(scan: Callable, arguments: dict[str, Tensor], count: int = 4) -> dict[str, tuple[float, float]]:
    """For y and each gradient: (error of `scan`, error of float32 in torch rounded to the inputs' types).

    The latter is the larger one of plain torch's and of the same with the decays of mamba-ssm's CUDA kernel. All are
    against float64, over `count` channels from all over; all other channels have dy = 0, so that dB and dC, which
    sum over channels, are those of the few. `scan(**arguments)` itself runs at full size.
    """
    x = arguments["x"]
    channels = torch.linspace(0, x.shape[2] - 1, min(count, x.shape[2]), device=x.device).long()
    cut = {
        k: v[..., channels] if k in ("x", "dt", "z", "D", "dt_bias") else v[channels] if k == "A" else v
        for k, v in arguments.items()
    }
    dy_cut = torch.randn(*x.shape[:2], len(channels), device=x.device, dtype=x.dtype)
    dy = torch.zeros_like(x)
    dy[..., channels] = dy_cut
    got = outputs(scan, arguments, dy)
    plain, kernel = (
        outputs(
            lambda as_kernel=k, **v: chunked_scan(**v, real=torch.float32, as_kernel=as_kernel).to(x.dtype), cut, dy_cut
        )
        for k in (False, True)
    )
    exact = outputs(chunked_scan, {k: v.double() for k, v in cut.items()}, dy_cut)
    found = {}
    for name, want in exact.items():
        mine = got[name]
        if name in ("y", "dx", "ddt", "dz", "dD", "ddt_bias"):
            mine = mine[..., channels]
        elif name == "dA":
            mine = mine[channels]
        found[name] = relative(mine, want), max(relative(plain[name], want), relative(kernel[name], want))
    return found


def summary(errors: dict[str, tuple[float, float]]) -> str:
    """The first error and the worst of the others, beside torch's in float32; WRONG if one is beyond twice that."""
    name, (error, plain) = next(iter(errors.items()))
    text = f"{name} error {error:.1e} (plain {plain:.1e})"
    rest = {k: v for k, v in errors.items() if k != name}
    if rest:
        worst = max(rest, key=lambda k: rest[k][0] / max(rest[k][1], 1e-9))
        text += f", worst gradient {worst} {rest[worst][0]:.1e} (plain {rest[worst][1]:.1e})"
    # `not ≤` also catches NaN
    return text + (" WRONG" if any(not error <= 2 * plain + 1e-6 for error, plain in errors.values()) else "")
