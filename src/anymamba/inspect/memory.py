"""Step sizes as memory: what a token writes, what it makes the state forget, how long its own share lasts.

Axes: b batch, t time, d channels, n d_state, k tokens asked for.
"""

import torch
from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.inspect.capture import LayerTrace, need
from anymamba.inspect.checks import check_row, check_tokens, is_whole
from anymamba.reference.discretize import factors


def forget_factor(trace: LayerTrace, tokens: slice | None = None) -> Tensor:
    """exp(Δ A) (b,k,d,n): what share of the state each token leaves (arXiv 2312.00752, equation 4). Needs dt.

    tokens: a slice of the time axis, all k = t if None. Raises AnymambaError for another trace or tokens.
    """
    (dt,) = need(trace, "dt")
    return torch.exp(dt[:, check_tokens(tokens), :, None] * trace.A)


def write(trace: LayerTrace, tokens: slice | None = None) -> Tensor:
    """Δ B x (b,k,d,n): what each token adds to the state; by zero-order hold with the factor (exp(ΔA) - 1) / (ΔA).

    Needs dt, B and x. Raises AnymambaError as `forget_factor`.
    """
    dt, B, x = (v[:, check_tokens(tokens)] for v in need(trace, "dt", "B", "x"))
    return (dt * x).unsqueeze(-1) * taken_in(trace, dt, by_channel(B))


def write_strength(trace: LayerTrace) -> Tensor:
    """Length of `write` over the state's axis n, (b,t,d), in memory of that size."""
    dt, B, x = need(trace, "dt", "B", "x")
    B = by_channel(B.to(dt.dtype))
    squares = sum(taken_in(trace, dt, B[..., [i]], [i])[..., 0] ** 2 for i in range(B.shape[-1]))
    return (dt * x).abs() * squares.sqrt()


def by_channel(v: Tensor) -> Tensor:
    """B or C (b,t,n) as (b,t,1,n), which is every channel's; a constant (b,t,d,n) has channels already."""
    return v if v.dim() == 4 else v.unsqueeze(-2)


def taken_in(trace: LayerTrace, dt: Tensor, B: Tensor, states=slice(None), channels=slice(None)) -> Tensor:
    """What Δ x is multiplied by on its way into the state: B (…,1 or d,n) itself, or by zero-order hold B with the
    factor that also depends on dt (…,d): (…,d,n). Both are of these `channels` and `states`."""
    if trace.discretization == "mamba":
        return B
    z = dt.unsqueeze(-1) * trace.A[channels][:, states].to(dt.dtype)
    return B * factors(z, trace.discretization)[1]


def horizon(trace: LayerTrace, row: int = 0) -> Tensor:
    """How many tokens of the text's mean step size until a token's share is under 1/e: (d,n), 1 / (|A| mean Δ).

    Infinite where all steps are 0. Raises AnymambaError for a row that does not exist, or a trace without dt.
    """
    (dt,) = need(trace, "dt")
    check_row(row, len(dt))
    return 1 / (-trace.A * dt[row].mean(0)[:, None])


def horizon_of(trace: LayerTrace, token: int, row: int = 0) -> Tensor:
    """The same for one token and the steps that did follow it, exact: (d,n) float, infinite if it outlasts the text.

    Raises AnymambaError as `horizon`, and for a token outside the text.
    """
    (dt,) = need(trace, "dt")
    check_row(row, len(dt))
    t = dt.shape[1]
    if not is_whole(token) or not 0 <= token < t:
        raise AnymambaError(f"horizon_of: token {token}, but the text has tokens 0 … {t - 1}")
    passed = dt[row, token + 1 :].double().cumsum(0).T.contiguous()  # (d,t): Δ after so many tokens
    # share exp(A·passed) < 1/e once passed > 1/|A|
    count = torch.searchsorted(passed, (-1 / trace.A).to(passed.dtype).contiguous(), right=True) + 1
    return torch.where(count > passed.shape[1], torch.inf, count.float())
