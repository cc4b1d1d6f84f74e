"""Step sizes as memory: what a token writes, what it makes the state forget, how long its own share lasts.

Axes: b batch, t time, d channels, n d_state, k tokens asked for.
"""

import torch
from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.inspect.capture import LayerTrace


def forget_factor(trace: LayerTrace, tokens: slice = slice(None)) -> Tensor:
    """exp(Δ A) (b,k,d,n): what share of the state each token leaves (arXiv 2312.00752, equation 4). Needs dt."""
    (dt,) = trace.need("dt")
    return torch.exp(dt[:, tokens, :, None] * trace.A)


def write(trace: LayerTrace, tokens: slice = slice(None)) -> Tensor:
    """Δ B x (b,k,d,n): what each token adds to the state. Needs dt, B and x."""
    dt, B, x = (v[:, tokens] for v in trace.need("dt", "B", "x"))
    return (dt * x).unsqueeze(-1) * B.unsqueeze(-2)


def write_strength(trace: LayerTrace) -> Tensor:
    """Length of `write` over the state's axis n, (b,t,d), in memory of that size."""
    dt, B, x = trace.need("dt", "B", "x")
    return (dt * x).abs() * B.to(dt.dtype).norm(dim=-1, keepdim=True)


def horizon(trace: LayerTrace, row: int = 0) -> Tensor:
    """How many tokens of the text's mean step size until a token's share is under 1/e: (d,n), 1 / (|A| mean Δ)."""
    (dt,) = trace.need("dt")
    return 1 / (-trace.A * dt[row].mean(0)[:, None])


def horizon_of(trace: LayerTrace, token: int, row: int = 0) -> Tensor:
    """The same for one token and the steps that did follow it, exact: (d,n) float, infinite if it outlasts the text."""
    (dt,) = trace.need("dt")
    t = dt.shape[1]
    if not 0 <= token < t:
        raise AnymambaError(f"horizon_of: token {token}, but the text has tokens 0 … {t - 1}")
    passed = dt[row, token + 1 :].double().cumsum(0).T.contiguous()  # (d,t): Δ after so many tokens
    # share exp(A·passed) < 1/e once passed > 1/|A|
    count = torch.searchsorted(passed, (-1 / trace.A).to(passed.dtype).contiguous(), right=True) + 1
    return torch.where(count > passed.shape[1], torch.inf, count.float())
