"""Backward of the selective scan on a GPU; see `triton_scan.py`.

The saved states cut time into pieces, walked from last to first. A piece is first walked forwards, and the state kept
before every fourth step; then, four steps at a time, the states are recomputed into registers and walked backwards
with the gradient of the state. The sums over channels for dB and dC of four steps are made together (`_merge`). They
leave as partial sums of a few blocks of channels each, which are added afterwards in a fixed order.
"""

import torch
import triton
import triton.language as tl

from anymamba.kernels.triton_common import (
    LOG2E,
    across,
    chain,
    channels,
    column,
    cut,
    keep_every,
    on,
    shared,
    sigmoid,
    softplus,
    span,
    strides,
    tile,
    unit,
)
from anymamba.kernels.triton_scan import layout

STEPS = tl.constexpr(4)  # whose states are in registers; `_merge` is made for four
WANTED = 1056  # programs of one warp: as many as run at a time on a large GPU


@triton.jit
def _step_size(dt, dt_bias, alive, SOFTPLUS: tl.constexpr):
    """Step size, 0 where not `alive`, and its slope in dt."""
    v = dt.to(tl.float32) + dt_bias
    if SOFTPLUS:
        e = tl.exp2(tl.abs(v) * -LOG2E)
        return tl.where(alive, softplus(v), 0.0), tl.where(v < 0, e, 1.0) / (1.0 + e)
    else:
        return tl.where(alive, v, 0.0), tl.full(v.shape, 1.0, tl.float32)


@triton.jit
def _merge(p, q, LEVEL: tl.constexpr):
    """[N, lanes]: p where bit LEVEL of the lane, from the top, is 0, q where it is 1; each plus its other half.

    Summing 8 tiles over lanes one by one takes 8 · log₂(lanes) exchanges between threads for each of the N rows;
    merged in pairs they take 4 + 2 + 1, and 1 for each bit that is left.
    """
    N: tl.constexpr = p.shape[0]
    REST: tl.constexpr = p.shape[1] >> (LEVEL + 1)
    p, q = tl.reshape(p, [N, 1 << LEVEL, 2, REST]), tl.reshape(q, [N, 1 << LEVEL, 2, REST])
    first = tl.arange(0, 2)[None, None, :, None] == 0
    keep, give = tl.where(first, p, q), tl.where(first, q, p).to(tl.int32, bitcast=True)
    got = (give ^ tl.xor_sum(give, 2, keep_dims=True)).to(tl.float32, bitcast=True)  # the other half's
    return tl.reshape(keep + got, [N, REST << (LEVEL + 1)])


@triton.jit(
    do_not_specialize=["t", "length", "chunks", "blocks", "per_group", "width"],
    do_not_specialize_on_alignment=["A", "C_fixed", "added"],
)
def scan_adjoint(dy, dt, z, A, C, C_fixed, dt_bias, added, sums, dy_b, dy_t, dt_b, dt_t, z_b, z_t, C_b, C_t, C_g,
                 t, length, chunks, d, blocks, per_group, width, n: tl.constexpr, N: tl.constexpr,
                 LANES: tl.constexpr, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr):  # fmt: skip
    """What the outputs of a chunk, all but the first, add to the gradient of the state before it, and Σ Δ."""
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % (chunks - 1) + 1
    s = (tl.program_id(0) // blocks // (chunks - 1)).to(tl.int64)
    group, place, channel, inside = channels(block, per_group, width, LANES)
    row, start, count, _ = span(None, s, chunk, t, length, 1)
    j, lane = tl.arange(0, N), tl.arange(0, LANES)
    across_d = j[:, None] * d + place[None, :]
    ours = (j < n)[:, None] & inside[None, :]
    a = tl.load(A + across_d, mask=ours, other=0.0) * LOG2E
    bias = tl.load(dt_bias + channel).to(tl.float32) if dt_bias is not None else 0.0
    dy += row * dy_b + start * dy_t
    dt += row * dt_b + start * dt_t
    if z is not None:
        z += row * z_b + start * z_t
    if C_fixed is not None:
        c = tl.load(C_fixed + across_d, mask=ours, other=0.0)
    else:
        C += row * C_b + start * C_t + group * C_g

    g, total = tl.zeros([N, LANES], tl.float32), tl.zeros([LANES], tl.float32)
    quads = tl.cdiv(count, STEPS)
    for i in range(quads):
        at = s * 0 + (quads - 1 - i) * STEPS
        dts, dys, zs = (), (), ()
        for k in tl.static_range(STEPS):  # all loads first
            here = tl.minimum(at + k, count - 1)
            dts += (tl.load(dt + here * dt_t + channel),)
            dys += (tl.load(dy + here * dy_t + channel),)
            if z is not None:
                zs += (tl.load(z + here * z_t + channel),)
        for i_back in tl.static_range(STEPS):
            k: tl.constexpr = STEPS - 1 - i_back
            size, _ = _step_size(dts[k], bias, at + k < count, SOFTPLUS)
            gy = tl.where((at + k < count) & inside, dys[k].to(tl.float32), 0.0)
            if z is not None:
                gate = zs[k].to(tl.float32)
                gy *= gate * sigmoid(gate)
            if C_fixed is None:
                c = column(C + tl.minimum(at + k, count - 1) * C_t, j, n)
            g = tl.exp2(a * size[None, :]) * (g + c * gy[None, :])
            total += size
    at = (s * chunks + chunk) * blocks + block
    tl.store(added + at * N * LANES + j[:, None] * LANES + lane[None, :], g)
    tl.store(sums + at * LANES + lane, total)
