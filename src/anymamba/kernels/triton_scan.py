"""Selective scan on a GPU: a program walks over time with the state of a block of channels in registers.

While a few steps are computed, those after them are loaded, B and C into shared memory. Where blocks and sequences are
too few for the chip, time is cut into chunks as well: a first walk finds what each adds to the state,
`triton_common.chain` passes that on, and a second walk computes the outputs. Backward is in
`triton_scan_backward.py`.
"""

import torch
import triton
import triton.language as tl

from anymamba.kernels.triton_common import (
    chain,
    channels,
    column,
    columns,
    cut,
    keep_every,
    shared,
    sigmoid,
    softplus,
    span,
    strides,
    tile,
    tiles,
    twice_decay,
    unit,
)
from anymamba.kernels.triton_sum import on

WANTED = 1584  # warps: as many as run at a time on a large GPU, 12 on each of 132 multiprocessors


@triton.jit
def _load(p, row_stride, channel, STEPS: tl.constexpr):
    """The next steps, one [lanes] each."""
    rows = ()
    for k in tl.static_range(STEPS):
        rows += (tl.load(p + (k * row_stride + channel)),)
    return rows


@triton.jit
def _step(h, a, dt, x, z, b, c, dt_bias, D, k: tl.constexpr, SOFTPLUS: tl.constexpr, GATE: tl.constexpr,
          OUT: tl.constexpr):  # fmt: skip
    """2^(k + 1) times the state after step k of a group, from 2^k times the one before; its step size; its output."""
    SCALE: tl.constexpr = 2 << k
    s, x = dt.to(tl.float32) + dt_bias, x.to(tl.float32)
    if SOFTPLUS:
        s = softplus(s)
    h = twice_decay(a, s) * h + b * (s * x * SCALE)[None, :]
    y = x
    if OUT:
        y = tl.sum(h * c, 0) * (1 / SCALE) + D * x
        if GATE:
            z = z.to(tl.float32)
            y *= z * sigmoid(z)
    return h, s, y


@triton.jit(
    do_not_specialize=["t", "length", "chunks", "launched", "blocks", "per_group", "width"],
    do_not_specialize_on_alignment=["A", "B_fixed", "C_fixed", "added", "saved"],
)
def scan_forward(x, dt, z, y, A, B, C, B_fixed, C_fixed, D, dt_bias, added, sums, last, saved, bounds,
                 x_b, x_t, dt_b, dt_t, z_b, z_t, B_b, B_t, B_g, C_b, C_t, C_g,
                 t, length, chunks, launched, d, blocks, per_group, width,
                 n: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, KEEP: tl.constexpr,
                 SOFTPLUS: tl.constexpr):  # fmt: skip
    """Outputs, the last state (s,d,n) and, if wanted, one state in KEEP.

    added: the state that a chunk begins with, tiles (s,chunks,blocks). Without y: takes there what the chunk adds to
    the state, and to sums its Σ Δ.
    """
    OUT: tl.constexpr = y is not None
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % launched
    s = (tl.program_id(0) // blocks // launched).to(tl.int64)
    group, channel, inside = channels(block, per_group, width, LANES)
    row, start, count, slot = span(bounds, s, chunk, t, length, KEEP)
    j, lane = tl.arange(0, N), tl.arange(0, LANES)
    dense = j[:, None] * LANES + lane[None, :]
    a = tl.load(A + block * N * LANES + dense)

    x += row * x_b + start * x_t
    dt += row * dt_b + start * dt_t
    if z is not None:
        z += row * z_b + start * z_t
    if OUT:
        y += (row * t + start) * d
    bias = tl.load(dt_bias + channel).to(tl.float32) if dt_bias is not None else 0.0
    skip = tl.load(D + channel).to(tl.float32) if D is not None else 0.0
    B += row * B_b + start * B_t + group * B_g
    C += row * C_b + start * C_t + group * C_g
    B_tile = tl.load(B_fixed + block * N * LANES + dense) if B_fixed is not None else a
    C_tile = tl.load(C_fixed + block * N * LANES + dense) if C_fixed is not None else a

    at = ((s * chunks + chunk) * blocks + block) * N * LANES
    h = tl.zeros([N, LANES], tl.float32)
    if added is not None and OUT:
        h = tl.load(added + at + dense)
    total = tl.zeros([LANES], tl.float32)

    wide = s * 0  # makes offsets 64-bit
    groups_of_steps = count // STEPS
    if groups_of_steps > 0:
        dts, xs = _load(dt, dt_t, channel, STEPS), _load(x, x_t, channel, STEPS)
        zs = _load(z, z_t, channel, STEPS) if z is not None else xs
        for i in tl.range(groups_of_steps, num_stages=2):  # for B and C; what has 16 bits it would not bring early
            here, ahead = wide + i * STEPS, wide + tl.minimum(i + 1, groups_of_steps - 1) * STEPS
            next_dts = _load(dt + ahead * dt_t, dt_t, channel, STEPS)
            next_xs = _load(x + ahead * x_t, x_t, channel, STEPS)
            next_zs = _load(z + ahead * z_t, z_t, channel, STEPS) if z is not None else next_xs
            bs = columns(B_tile, B + here * B_t, B_t, STEPS, j, n, STEPS, B_fixed is None)
            cs = columns(C_tile, C + here * C_t, C_t, STEPS, j, n, STEPS, OUT and C_fixed is None)
            if saved is not None and i % (KEEP // STEPS) == 0:
                tl.store(saved + ((slot + i // (KEEP // STEPS)) * blocks + block) * N * LANES + dense, h)
            outs = ()
            for k in tl.static_range(STEPS):
                h, size, out = _step(h, a, dts[k], xs[k], zs[k], bs[k], cs[k], bias, skip, k, SOFTPLUS, z is not None,
                                     OUT)  # fmt: skip
                outs += (out,)
                if not OUT:
                    total += size
            h *= 1 / (1 << STEPS)
            if OUT:  # after all loads, which would wait for it
                for k in tl.static_range(STEPS):
                    tl.store(y + here * d + (k * d + channel), outs[k].to(y.dtype.element_ty), mask=inside)
            dts, xs, zs = next_dts, next_xs, next_zs

    rest = groups_of_steps * STEPS
    if saved is not None and (rest < count) & (rest % KEEP == 0):
        tl.store(saved + ((slot + rest // KEEP) * blocks + block) * N * LANES + dense, h)
    for i in range(rest, count):
        here = wide + i
        b = column(B_tile, B + here * B_t, j, n, B_fixed is None)
        c = column(C_tile, C + here * C_t, j, n, OUT and C_fixed is None)
        now_z = tl.load(z + here * z_t + channel) if z is not None else 0.0
        h, size, out = _step(h, a, tl.load(dt + here * dt_t + channel), tl.load(x + here * x_t + channel), now_z, b, c,
                             bias, skip, 0, SOFTPLUS, z is not None, OUT)  # fmt: skip
        h *= 0.5
        if OUT:
            tl.store(y + here * d + channel, out.to(y.dtype.element_ty), mask=inside)
        else:
            total += size

    if not OUT:
        tl.store(added + at + dense, h)
        tl.store(sums + ((s * chunks + chunk) * blocks + block) * LANES + lane, total)
    elif chunk == chunks - 1:
        tl.store(last + (s * d + channel[None, :]) * n + j[:, None], h, mask=(j < n)[:, None] & inside[None, :])


# ---- launches --------------------------------------------------------------------------------------------------


def layout(x, A, groups):
    """(steps loaded at a time, N, lanes, warps, blocks of channels of a group, all blocks) of the forward walk."""
    steps, elements = (8, 16) if A[1] <= 32 else (4, 32)
    N, lanes, warps = tile(A[1], elements)
    per_group = triton.cdiv(x[2] // groups, lanes)
    return steps, N, lanes, warps, per_group, groups * per_group


def saved_shape(x, A, groups, sequences):
    """Shape of the states kept for backward, (slots, blocks, N, lanes), from the shapes of x and A."""
    _, N, lanes, _, _, blocks = layout(x, A, groups)
    return x[0] * x[1] // keep_every(A[1]) + sequences, blocks, N, lanes


def selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, save):
    """y (b,t,d), final_state (s,d,n) float32 and the states kept for backward if `save`, else None.

    Shapes as `ops.selective_scan`; x, dt, z of one dtype, A and initial_state float32.
    """
    (b, t, d), n = x.shape, A.shape[1]
    sequences = b if cu_seqlens is None else cu_seqlens.numel() - 1
    groups = max(v.shape[2] if v.dim() == 4 else 1 for v in (B, C))
    real = {"dtype": torch.float32, "device": x.device}
    y, last = x.new_empty(b, t, d), torch.empty(sequences, d, n, **real)
    saved = torch.empty(saved_shape(x.shape, A.shape, groups, sequences), **real) if save else None
    if last.numel() == 0:
        return y, last, saved

    steps, N, lanes, warps, per_group, blocks = layout(x.shape, A.shape, groups)
    chunks, length = cut(sequences * blocks * warps, t, n, WANTED, cu_seqlens)
    x, dt, z, D, dt_bias, cu_seqlens = map(unit, (x, dt, z, D, dt_bias, cu_seqlens))
    A, added = tiles(A, groups, N, lanes), tiles(initial_state, groups, N, lanes)
    (B, B_strides, B_fixed), (C, C_strides, C_fixed) = shared(B, groups, N, lanes), shared(C, groups, N, lanes)

    def walk(y, z, added, sums, saved, launched):
        scan_forward[(sequences * launched * blocks,)](
            x, dt, z, y, A, B, C, B_fixed, C_fixed, D, dt_bias, added, sums, last, saved, cu_seqlens, *strides(x),
            *strides(dt), *strides(z), *B_strides, *C_strides, t, length, chunks, launched, d, blocks, per_group,
            d // groups, n, N, lanes, steps, keep_every(n), dt_softplus, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip

    with on(x.device):
        if chunks > 1:
            first, added = added, torch.empty(sequences, chunks, blocks, N, lanes, **real)
            sums = torch.empty(sequences, chunks, blocks, lanes, **real)
            walk(None, None, added, sums, None, chunks - 1)
            chain[(sequences * blocks,)](added, sums, A, first, chunks, blocks, N, lanes, False, num_warps=warps,
                                         enable_fp_fusion=True)  # fmt: skip
        walk(y, z, added, None, saved, chunks)
    return y, last, saved
