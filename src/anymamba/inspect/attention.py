"""Hidden attention: the matrix over time that a selective scan is (Ali, Zimerman & Wolf, arXiv 2403.01590, sec. 3.1).

    y_i = Σ_{j≤i} M_ij x_j,   M_ij = C_i · exp(A (S_i − S_j)) B_j Δ_j,   S = Δ_1 + … + Δ_i

in each channel; zero-order hold has the factor (exp(A Δ_j) − 1) / (A Δ_j), too. Every exponent is ≤ 0, so nothing
overflows however long the text. A state that the text goes on from adds C_i · exp(A S_i) h_0, which belongs to no
token: `carried`.
Axes: b batch, t time, d channels, n d_state, k rows asked for, c channels at a time, e the same, or 1 where B or C is
one for all channels, p blocks.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.inspect.capture import LayerTrace, need
from anymamba.inspect.checks import check_row, check_tokens, indices, is_whole
from anymamba.inspect.memory import by_channel, taken_in

ELEMENTS = 1 << 21  # of (k,t,c) at a time: some tens of megabytes
CACHED = 1 << 18  # of (p,c,n) at a time: in a CPU's caches the blocks take less time
NOTHING = 1e-18  # a share of the state that is as good as gone; the product of two is still no subnormal number


def hidden_attention(trace: LayerTrace, channels: int | Sequence[int] | None = None, *, tokens: slice | None = None,
                     row: int = 0, skip: bool = False, gate: bool = False) -> Tensor:  # fmt: skip
    """The matrix M of one layer and one row of the batch, exact: M x is what the scan gives.

    Args:
        channels: one gives (k,t), several (channels,k,t), None the mean over all channels (k,t). -1 is the last.
        tokens: a slice of the rows i of M, those whose reading is asked about; all k = t if None.
        skip: with D on the diagonal. gate: rows times silu(z_i). With both, M x is the layer's `y`.

    Memory is that of the answer and some tens of megabytes. Needs dt, B and C (with gate, z) in the trace; raises
    AnymambaError without them, and for channels, tokens or a row that do not exist.
    """
    dt, B, C = _one_row(trace, row, "dt", "B", "C")
    d = trace.A.shape[0]
    A, D = trace.A.to(dt.dtype), trace.D.to(dt.dtype)
    gates = F.silu(_one_row(trace, row, "z")[0]) if gate else None
    chosen = _choose_channels(channels, d)
    rows = torch.arange(len(dt), device=dt.device)[check_tokens(tokens)]
    total = dt.double().cumsum(0)
    out = dt.new_zeros(*([] if channels is None else [len(chosen)]), len(rows), len(dt))
    step = max(1, ELEMENTS // len(dt))
    for rows_at, some_rows in _pieces(rows, step):
        for at, some in _pieces(chosen, _at_once(trace, len(dt), step // max(1, len(some_rows)))):
            inputs = taken_in(trace, dt[:, some], _of(B, some), channels=some)
            M = _matrix(some_rows, total[:, some], dt[:, some], A[some], inputs, _of(C, some))
            if skip:
                M[torch.arange(len(some_rows)), some_rows] += D[some]
            if gate:
                M *= gates[some_rows][:, None, some]
            if channels is None:
                out[rows_at] += M.sum(-1) / d
            else:
                out[at, rows_at] = M.permute(2, 0, 1)
    return out[0] if is_whole(channels) else out


def _at_once(trace, t, channels):
    """So many channels, or fewer where `taken_in` has a (t,c,n) of them."""
    most = channels if trace.discretization == "mamba" else ELEMENTS // (t * trace.A.shape[1])
    return max(1, min(channels, most))


def _matrix(rows, total, dt, A, B, C):
    """(k,t,c) for rows (k,), total and dt (t,c), A (c,n), B and C (t,e,n)."""
    span = (total[rows, None] - total).to(dt.dtype)
    future = torch.arange(len(dt), device=dt.device) > rows[:, None]
    span.masked_fill_(future[..., None], math.inf)  # whose share is exp(-inf) = 0
    M = torch.zeros_like(span)
    for i in range(A.shape[1]):
        M += torch.exp(span * A[:, i]) * (C[rows, None, :, i] * B[..., i])
    return M.mul_(dt)


def carried(trace: LayerTrace, *, tokens: slice | None = None, row: int = 0) -> Tensor:
    """What the state from before the text adds to the scan's output, without the gate: (k,d).

    Needs dt, C and state. Raises AnymambaError as `hidden_attention`.
    """
    dt, C, h = _one_row(trace, row, "dt", "C", "state")
    rows = check_tokens(tokens)
    total, C = dt.double().cumsum(0).to(dt.dtype)[rows], C[rows]
    out = torch.zeros_like(total)
    for i in range(trace.A.shape[1]):
        out += torch.exp(total * trace.A[:, i]) * h[:, i] * C[..., i]
    return out


def attention_blocks(trace: LayerTrace, size: int, channels: Sequence[int] | None = None, *, row: int = 0) -> Tensor:
    """`hidden_attention` made small: its mean over blocks of ⌈t/size⌉ tokens each way, (p,p) with p ≤ size.

    Exact, and without ever holding M: time O(t·d·n + p²·d·n), memory O(t·d). channels None gives the mean over all,
    several (channels,p,p). The mean is over pairs j ≤ i; blocks above the diagonal are 0. Needs dt, B and C; raises
    AnymambaError as `hidden_attention`, and for a size below 1.
    """
    if not is_whole(size) or size < 1:
        raise AnymambaError(f"attention_blocks: size={size!r}, but it must be a whole number of at least 1")
    dt, B, C = _one_row(trace, row, "dt", "B", "C")
    chosen = _choose_channels(channels, trace.A.shape[0])
    t, c, A = len(dt), -(-len(dt) // size), trace.A.to(dt.dtype)
    p = -(-t // c)
    # (p,c,…): block, place in it; steps of size 0 fill the last one up, and change nothing
    blocks = lambda v: torch.cat([v, v.new_zeros(p * c - t, *v.shape[1:])]).unflatten(0, (p, c))  # noqa: E731
    parts = []
    for _, some in _pieces(chosen, _at_once(trace, t, CACHED // (p * A.shape[1]))):
        inputs = taken_in(trace, dt[:, some], _of(B, some), channels=some)
        of_blocks = map(blocks, (dt[:, some], inputs, _of(C, some)))
        parts.append(_block_sums(*of_blocks, A[some], channels is None))
    M = sum(parts) / len(chosen) if channels is None else torch.cat(parts)
    lengths = torch.full((p,), c, device=dt.device)
    lengths[-1] = t - (p - 1) * c
    pairs = lengths[:, None] * lengths
    pairs.diagonal().copy_(lengths * (lengths + 1) // 2)
    return M[0] / pairs if channels is None else M / pairs


def _block_sums(dt, B, C, A, together):
    """Sums of M over pairs of blocks, (d,p,p), or (1,p,p) of all channels together."""
    p = len(dt)
    inside, wrote, reads, fade = _within(dt, B, C, A)
    fade = F.hardshrink(fade, NOTHING)
    if together:
        inside, wrote, reads, fade = inside.sum(-1, keepdim=True), *(v.reshape(p, 1, -1) for v in (wrote, reads, fade))
    M = torch.diag_embed(inside.T).contiguous()
    before = torch.zeros_like(wrote)  # what each earlier block wrote, as it is where block i begins
    for i in range(1, p):
        before[i - 1] = wrote[i - 1]
        M[:, i, :i] = torch.einsum("jgk,gk->gj", before[:i], reads[i])
        # shares this small count for nothing, but processors are slow at numbers below 1e-38
        before[:i] = F.hardshrink(before[:i] * fade[i], NOTHING)
    return M


def _within(dt, B, C, A):
    """From dt (p,c,d), B and C (p,c,e,n), A (d,n), of each block: the sum of M on the diagonal (p,d), what it writes
    into the state from inputs of 1 (p,d,n), what it reads of the state from before (p,d,n), and by how much that state
    fades (p,d,n)."""
    p, c, d = dt.shape
    fade, wrote = dt.new_ones(p, d, A.shape[1]), dt.new_zeros(p, d, A.shape[1])
    reads, inside = torch.zeros_like(wrote), dt.new_zeros(p, d)
    for i in range(c):
        A_bar = torch.exp(dt[:, i, :, None] * A)
        wrote = A_bar * wrote + dt[:, i, :, None] * B[:, i]
        fade *= A_bar
        reads += C[:, i] * fade
        inside += (C[:, i] * wrote).sum(-1)
    return inside, wrote, reads, fade


def _one_row(trace, row, *parts):
    """Parts of one row of the batch, in at least float32; B and C as (t,e,n)."""
    values = need(trace, *parts)
    check_row(row, len(values[0]))
    rows = [v[row].to(torch.promote_types(v.dtype, torch.float32)) for v in values]
    return [by_channel(v[None])[0] if part in ("B", "C") else v for part, v in zip(parts, rows, strict=True)]


def _of(v, channels):
    """B or C (t,e,n) of these channels."""
    return v if v.shape[1] == 1 else v[:, channels]


def _choose_channels(channels, d):
    return torch.as_tensor(indices("channels", "layer", channels, d))


def _pieces(indices, length):
    """(slice, indices there), so many at a time."""
    return [(slice(i, i + length), indices[i : i + length]) for i in range(0, len(indices), length)]
