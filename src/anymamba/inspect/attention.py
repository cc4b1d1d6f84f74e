"""Hidden attention: the matrix over time that a selective scan is (Ali, Zimerman & Wolf, arXiv 2403.01590, sec. 3.1).

    y_i = Σ_{j≤i} M_ij x_j,   M_ij = C_i · exp(A (S_i − S_j)) B_j Δ_j,   S = Δ_1 + … + Δ_i

in each channel. Every exponent is ≤ 0, so nothing overflows however long the text. A state that the text goes on from
adds C_i · exp(A S_i) h_0, which belongs to no token: `carried`.
Axes: b batch, t time, d channels, n d_state, k rows asked for, c channels at a time, p blocks.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.inspect.capture import LayerTrace

ELEMENTS = 1 << 21  # of (k,t,c) at a time: some tens of megabytes
CACHED = 1 << 18  # of (p,c,n) at a time: in a CPU's caches the blocks take less time
NOTHING = 1e-18  # a share of the state that is as good as gone; the product of two is still no subnormal number


def hidden_attention(trace: LayerTrace, channels: int | Sequence[int] | None = None, *, tokens: slice | None = None,
                     row: int = 0, skip: bool = False, gate: bool = False) -> Tensor:  # fmt: skip
    """The matrix M of one layer and one row of the batch, exact: M x is what the scan gives.

    Args:
        channels: one gives (k,t), several (channels,k,t), None the mean over all channels (k,t).
        tokens: a slice of the rows i of M, those whose reading is asked about; all k = t if None.
        skip: with D on the diagonal. gate: rows times silu(z_i). With both, M x is the layer's `y`.

    Memory is that of the answer and some tens of megabytes. Needs dt, B and C (with gate, z) in the trace; raises
    AnymambaError without them or for channels that do not exist.
    """
    d = trace.A.shape[0]
    dt, B, C = _one_row(trace, row, "dt", "B", "C")
    A, D = trace.A.to(dt.dtype), trace.D.to(dt.dtype)
    gates = F.silu(_one_row(trace, row, "z")[0]) if gate else None
    chosen = _choose_channels(channels, d)
    rows = torch.arange(len(dt), device=dt.device)[slice(None) if tokens is None else tokens]
    total = dt.double().cumsum(0)
    out = dt.new_zeros(*([] if channels is None else [len(chosen)]), len(rows), len(dt))
    step = max(1, ELEMENTS // len(dt))
    for rows_at, some_rows in _pieces(rows, step):
        for at, some in _pieces(chosen, max(1, step // max(1, len(some_rows)))):
            M = _matrix(some_rows, total[:, some], dt[:, some], A[some], B, C)
            if skip:
                M[torch.arange(len(some_rows)), some_rows] += D[some]
            if gate:
                M *= gates[some_rows][:, None, some]
            if channels is None:
                out[rows_at] += M.sum(-1) / d
            else:
                out[at, rows_at] = M.permute(2, 0, 1)
    return out[0] if isinstance(channels, int) else out


def _matrix(rows, total, dt, A, B, C):
    """(k,t,c) for rows (k,), total and dt (t,c), A (c,n), B and C (t,n)."""
    span = (total[rows, None] - total).to(dt.dtype)
    future = torch.arange(len(dt), device=dt.device) > rows[:, None]
    span.masked_fill_(future[..., None], math.inf)  # whose share is exp(-inf) = 0
    M = torch.zeros_like(span)
    for i in range(A.shape[1]):
        M += torch.exp(span * A[:, i]) * (C[rows, i, None] * B[:, i])[..., None]
    return M.mul_(dt)


def carried(trace: LayerTrace, *, tokens: slice | None = None, row: int = 0) -> Tensor:
    """What the state from before the text adds to the scan's output, without the gate: (k,d)."""
    dt, C, h = _one_row(trace, row, "dt", "C", "state")
    rows = slice(None) if tokens is None else tokens
    total, C = dt.double().cumsum(0).to(dt.dtype)[rows], C[rows]
    out = torch.zeros_like(total)
    for i in range(trace.A.shape[1]):
        out += torch.exp(total * trace.A[:, i]) * h[:, i] * C[:, i, None]
    return out


def attention_blocks(trace: LayerTrace, size: int, channels: Sequence[int] | None = None, *, row: int = 0) -> Tensor:
    """`hidden_attention` made small: its mean over blocks of ⌈t/size⌉ tokens each way, (p,p) with p ≤ size.

    Exact, and without ever holding M: time O(t·d·n + p²·d·n), memory O(t·d). channels None gives the mean over all,
    several (channels,p,p). The mean is over pairs j ≤ i; blocks above the diagonal are 0.
    """
    if size < 1:
        raise AnymambaError(f"attention_blocks: size={size}, but it must be at least 1")
    chosen = _choose_channels(channels, trace.A.shape[0])
    dt, B, C = _one_row(trace, row, "dt", "B", "C")
    t, c, A = len(dt), -(-len(dt) // size), trace.A.to(dt.dtype)
    p = -(-t // c)
    # (p,c,…): block, place in it; steps of size 0 fill the last one up, and change nothing
    dt, B, C = (F.pad(v, (0, 0, 0, p * c - t)).view(p, c, -1) for v in (dt, B, C))
    few = max(1, CACHED // (p * A.shape[1]))
    parts = [_block_sums(dt[..., some], A[some], B, C, channels is None) for _, some in _pieces(chosen, few)]
    M = sum(parts) / len(chosen) if channels is None else torch.cat(parts)
    lengths = torch.full((p,), c, device=dt.device)
    lengths[-1] = t - (p - 1) * c
    pairs = lengths[:, None] * lengths
    pairs.diagonal().copy_(lengths * (lengths + 1) // 2)
    return M[0] / pairs if channels is None else M / pairs


def _block_sums(dt, A, B, C, together):
    """Sums of M over pairs of blocks, (d,p,p), or (1,p,p) of all channels together."""
    p = len(dt)
    inside, wrote, reads, fade = _within(dt, A, B, C)
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


def _within(dt, A, B, C):
    """Of each block (p,…): the sum of M on the diagonal (p,d), what it writes into the state from inputs of 1 (p,d,n),
    what it reads of the state from before (p,d,n), and by how much that state fades (p,d,n)."""
    p, c, d = dt.shape
    fade, wrote = dt.new_ones(p, d, A.shape[1]), dt.new_zeros(p, d, A.shape[1])
    reads, inside = torch.zeros_like(wrote), dt.new_zeros(p, d)
    for i in range(c):
        A_bar = torch.exp(dt[:, i, :, None] * A)
        wrote = A_bar * wrote + dt[:, i, :, None] * B[:, i, None]
        fade *= A_bar
        reads += C[:, i, None] * fade
        inside += (C[:, i, None] * wrote).sum(-1)
    return inside, wrote, reads, fade


def _one_row(trace, row, *parts):
    """Parts of one row of the batch, in at least float32."""
    values = trace.need(*parts)
    if not -len(values[0]) <= row < len(values[0]):
        raise AnymambaError(f"row {row} of a batch of {len(values[0])}")
    return [v[row].to(torch.promote_types(v.dtype, torch.float32)) for v in values]


def _choose_channels(channels, d):
    chosen = range(d) if channels is None else [channels] if isinstance(channels, int) else channels
    chosen = torch.as_tensor(list(chosen))
    if len(chosen) == 0 or int(chosen.min()) < -d or int(chosen.max()) >= d:
        raise AnymambaError(f"channels are {chosen.tolist()}, but the layer has channels 0 … {d - 1}")
    return chosen


def _pieces(indices, length):
    """(slice, indices there), so many at a time."""
    return [(slice(i, i + length), indices[i : i + length]) for i in range(0, len(indices), length)]
