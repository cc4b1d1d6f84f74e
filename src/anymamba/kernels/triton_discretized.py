"""Selective scan on a GPU with other discretisations than Mamba's own, forward and backward.

With z = Δ A a rule is h_t = a(z) h_{t-1} + Δ p(z) B x. A program walks over time with the state of a block of channels,
a tile [N, lanes], in registers. Forward keeps one state in KEEP; backward takes these pieces from last to first, walks
each forwards, leaving its states in scratch, and then backwards with the gradient of the state.
"""

import torch
import triton
import triton.language as tl

from anymamba.kernels.triton_common import LOG2E, channels, column, keep_every, shared, span, tile, tiles
from anymamba.kernels.triton_sum import on

_WIDEST_PIECE = 64  # steps: scratch holds so many states of each channel
_RULES = ("zoh", "bilinear", "euler")  # by their number in the kernels


@triton.jit
def _rule(z, RULE: tl.constexpr):
    """a, p and their derivatives in z."""
    if RULE == 0:
        # φ₂ = (p - 1)/z by its series Σ z^k / (k + 2)! for |z| < 1; p = 1 + z φ₂, e^z = 1 + z p, p' = p - φ₂: nothing
        # cancels, and no decay near 1 has the bias of a GPU's fast exponential. Beyond p' = (e^z - p)/z
        phi = z * 2.08767570e-9 + 2.50521084e-8
        phi = phi * z + 2.75573192e-7
        phi = phi * z + 2.75573192e-6
        phi = phi * z + 2.48015873e-5
        phi = phi * z + 1.98412698e-4
        phi = phi * z + 1.38888889e-3
        phi = phi * z + 8.33333333e-3
        phi = phi * z + 4.16666667e-2
        phi = phi * z + 1.66666667e-1
        phi = phi * z + 0.5
        near = tl.abs(z) < 1.0
        inverse = 1.0 / tl.where(near, 1.0, z)
        e = tl.exp2(z * LOG2E)
        p = tl.where(near, z * phi + 1.0, (e - 1.0) * inverse)
        a = tl.where(near, z * p + 1.0, e)
        return a, p, a, tl.where(near, p - phi, (e - p) * inverse)
    elif RULE == 1:
        p = tl.div_rn(1.0, 1.0 - 0.5 * z)  # rounded rightly: a fast division's bias adds up over a text
        return z * p + 1.0, p, p * p, 0.5 * p * p
    else:
        one = tl.full(z.shape, 1.0, tl.float32)
        return z + 1.0, one, one, tl.zeros(z.shape, tl.float32)


@triton.jit
def _advance(h, a, s, x, b, RULE: tl.constexpr):
    """The state after a step."""
    decay, p, _, _ = _rule(a * s[None, :], RULE)
    return decay * h + p * b * (s * x)[None, :]


@triton.jit(
    do_not_specialize=["t", "blocks", "per_group", "width"],
    do_not_specialize_on_alignment=["A", "B_fixed", "C_fixed", "first", "saved"],
)
def discretized_forward(x, dt, y, A, B, C, B_fixed, C_fixed, first, last, saved, bounds, B_b, B_t, B_g, C_b, C_t, C_g,
                        t, d, blocks, per_group, width, n: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
                        KEEP: tl.constexpr, RULE: tl.constexpr):  # fmt: skip
    """Outputs, the last state (s,d,n) and, if wanted, one state in KEEP, tiles. first: the state before, tiles."""
    block = tl.program_id(0) % blocks
    s = (tl.program_id(0) // blocks).to(tl.int64)
    group, channel, inside = channels(block, per_group, width, LANES)
    row, start, count, slot = span(bounds, s, 0, t, t, KEEP)
    j = tl.arange(0, N)
    dense = j[:, None] * LANES + tl.arange(0, LANES)[None, :]
    a = tl.load(A + block * N * LANES + dense)
    B_tile = tl.load(B_fixed + block * N * LANES + dense) if B_fixed is not None else a
    C_tile = tl.load(C_fixed + block * N * LANES + dense) if C_fixed is not None else a
    B += row * B_b + start * B_t + group * B_g
    C += row * C_b + start * C_t + group * C_g
    h = tl.zeros([N, LANES], tl.float32)
    if first is not None:
        h = tl.load(first + (s * blocks + block) * N * LANES + dense)
    flat, wide = row * t + start, s * 0  # wide makes offsets 64-bit
    for i in range(count):
        if saved is not None and i % KEEP == 0:
            tl.store(saved + ((slot + i // KEEP) * blocks + block) * N * LANES + dense, h)
        at = (flat + i) * d + channel
        b = column(B_tile, B + (wide + i) * B_t, j, n, B_fixed is None)
        c = column(C_tile, C + (wide + i) * C_t, j, n, C_fixed is None)
        h = _advance(h, a, tl.load(dt + at), tl.load(x + at), b, RULE)
        tl.store(y + at, tl.sum(h * c, 0), mask=inside)
    tl.store(last + (s * d + channel[None, :]) * n + j[:, None], h, mask=(j < n)[:, None] & inside[None, :])


@triton.jit
def _leave(p, v, j, n: tl.constexpr, more):
    """Puts the sum over lanes in its row; adds if there is more."""
    v = tl.sum(v, 1)
    if more:
        v += tl.load(p + j, mask=j < n, other=0.0)
    tl.store(p + j, v, mask=j < n)


@triton.jit(
    do_not_specialize=["t", "rows", "blocks", "per_group", "width", "shares", "share"],
    do_not_specialize_on_alignment=["A", "B_fixed", "C_fixed", "last", "saved", "scratch"],
)
def discretized_backward(dy, x, dt, dx, ddt, A, B, C, B_fixed, C_fixed, last, saved, scratch, bounds, dA, dB, dC,
                         dB_fixed, dC_fixed, dfirst, B_b, B_t, B_g, C_b, C_t, C_g, t, d, rows, blocks, per_group, width,
                         shares, share, n: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, KEEP: tl.constexpr,
                         RULE: tl.constexpr):  # fmt: skip
    """A program takes `share` blocks of a group one after the other, and adds up their dB and dC in its own rows.

    last: the gradient of the last state, tiles. Where B or C is constant, its gradient is a sum of tiles over time.
    """
    part = tl.program_id(0) % shares
    s = (tl.program_id(0) // shares).to(tl.int64)
    of_group = tl.cdiv(per_group, share)
    group, part = part // of_group, part % of_group
    row, start, count, slot = span(bounds, s, 0, t, t, KEEP)
    j = tl.arange(0, N)
    dense = j[:, None] * LANES + tl.arange(0, LANES)[None, :]
    scratch += tl.program_id(0).to(tl.int64) * (KEEP + 1) * N * LANES
    flat, wide = row * t + start, s * 0
    B += row * B_b + start * B_t + group * B_g
    C += row * C_b + start * C_t + group * C_g

    for block in range(part * share, tl.minimum((part + 1) * share, per_group)):
        of = group * per_group + block
        _, channel, inside = channels(of, per_group, width, LANES)
        a = tl.load(A + of * N * LANES + dense)
        B_tile = tl.load(B_fixed + of * N * LANES + dense) if B_fixed is not None else a
        C_tile = tl.load(C_fixed + of * N * LANES + dense) if C_fixed is not None else a
        g = tl.zeros([N, LANES], tl.float32)
        if last is not None:
            g = tl.load(last + (s * blocks + of) * N * LANES + dense)
        sum_A = tl.zeros([N, LANES], tl.float32)
        sum_B, sum_C = sum_A, sum_A
        for back in range(tl.cdiv(count, KEEP)):
            piece = wide + tl.cdiv(count, KEEP) - 1 - back
            steps = tl.minimum(KEEP, count - piece * KEEP).to(tl.int32)
            h = tl.load(saved + ((slot + piece) * blocks + of) * N * LANES + dense)
            tl.store(scratch + dense, h)
            for i in range(steps):
                step = piece * KEEP + i
                at = (flat + step) * d + channel
                b = column(B_tile, B + step * B_t, j, n, B_fixed is None)
                h = _advance(h, a, tl.load(dt + at), tl.load(x + at), b, RULE)
                tl.store(scratch + (i + 1) * N * LANES + dense, h)
            tl.debug_barrier()  # what one thread has stored another may load
            piece_A = tl.zeros([N, LANES], tl.float32)  # small sums first: over long texts a sum gets coarse
            for i_back in range(steps):
                i = steps - 1 - i_back
                step = piece * KEEP + i
                at = (flat + step) * d + channel
                b = column(B_tile, B + step * B_t, j, n, B_fixed is None)
                c = column(C_tile, C + step * C_t, j, n, C_fixed is None)
                size, xv = tl.load(dt + at), tl.load(x + at)
                gy = tl.where(inside, tl.load(dy + at), 0.0)
                before = tl.load(scratch + i * N * LANES + dense)
                decay, p, by_decay, by_p = _rule(a * size[None, :], RULE)
                u = (size * xv)[None, :]
                g += c * gy[None, :]
                by_C = tl.load(scratch + (i + 1) * N * LANES + dense) * gy[None, :]
                gp = g * p
                piece_A += g * (before * by_decay + b * u * by_p) * size[None, :]
                tl.store(dx + at, tl.sum(gp * b, 0) * size, mask=inside)
                # a = 1 + z p in every rule, so that ∂h/∂Δ is a'(z) (A h + B x)
                tl.store(ddt + at, tl.sum(g * by_decay * (a * before + b * xv[None, :]), 0), mask=inside)
                to = (((wide + part) * rows + flat + step) * tl.cdiv(blocks, per_group) + group) * n
                if B_fixed is None:
                    _leave(dB + to, gp * u, j, n, block > part * share)
                else:
                    sum_B += gp * u
                if C_fixed is None:
                    _leave(dC + to, by_C, j, n, block > part * share)
                else:
                    sum_C += by_C
                g *= decay
            sum_A += piece_A
            tl.debug_barrier()
        to = (s * d + channel[None, :]) * n + j[:, None]
        ours = (j < n)[:, None] & inside[None, :]
        tl.store(dA + to, sum_A, mask=ours)
        if B_fixed is not None:
            tl.store(dB_fixed + to, sum_B, mask=ours)
        if C_fixed is not None:
            tl.store(dC_fixed + to, sum_C, mask=ours)
        tl.store(dfirst + to, g, mask=ours)


# ---- launches --------------------------------------------------------------------------------------------------


def _layout(d, n, groups):
    """(N, lanes, warps), blocks of channels of a group, all blocks, steps between the states kept."""
    of_tile = tile(n, 16)
    per_group = triton.cdiv(d // groups, of_tile[1])
    return of_tile, per_group, groups * per_group, min(_WIDEST_PIECE, keep_every(n))


def saved_shape(x, A, groups, sequences):
    """Shape of the states kept for backward, (slots, blocks, N, lanes), from the shapes of x and A."""
    (N, lanes, _), _, blocks, keep = _layout(x[2], A[1], groups)
    return x[0] * x[1] // keep + sequences, blocks, N, lanes


def _groups(B, C):
    return next((v.shape[2] for v in (B, C) if v.dim() == 4), 1)


def discretized_scan(x, dt, A, B, C, initial_state, cu_seqlens, rule, save):
    """y (b,t,d), final_state (s,d,n) and the states kept for backward if `save`, else None.

    All float32: x, dt (b,t,d), A (d,n), B and C (b,t,g,n) or constant (d,n).
    """
    (b, t, d), n, groups = x.shape, A.shape[1], _groups(B, C)
    sequences = b if cu_seqlens is None else cu_seqlens.numel() - 1
    (N, lanes, warps), per_group, blocks, keep = _layout(d, n, groups)
    x, dt = x.contiguous(), dt.contiguous()
    y, last = torch.empty_like(x), x.new_empty(sequences, d, n)
    saved = x.new_empty(saved_shape(x.shape, A.shape, groups, sequences)) if save else None
    if last.numel():
        first, tiles_A = tiles(initial_state, groups, N, lanes), tiles(A, groups, N, lanes)
        (B, B_strides, B_fixed), (C, C_strides, C_fixed) = shared(B, groups, N, lanes), shared(C, groups, N, lanes)
        with on(x.device):
            discretized_forward[(sequences * blocks,)](
                x, dt, y, tiles_A, B, C, B_fixed, C_fixed, first, last, saved, cu_seqlens, *B_strides, *C_strides, t, d,
                blocks, per_group, d // groups, n, N, lanes, keep, _RULES.index(rule), num_warps=warps,
            )  # fmt: skip
    return y, last, saved


def discretized_scan_backward(dy, dfinal_state, x, dt, A, B, C, cu_seqlens, rule, saved):
    """dx, ddt, dA, dB, dC, each as its input, and dinitial_state (s,d,n)."""
    (b, t, d), n, groups = x.shape, A.shape[1], _groups(B, C)
    sequences = b if cu_seqlens is None else cu_seqlens.numel() - 1
    (N, lanes, warps), per_group, blocks, keep = _layout(d, n, groups)
    share = min(triton.cdiv(n, 2 * lanes), max(per_group, 1))  # so that partial sums take no more than a few x
    parts = triton.cdiv(per_group, share)
    dy, x, dt = dy.contiguous(), x.contiguous(), dt.contiguous()
    dx, ddt = torch.empty_like(x), torch.empty_like(x)
    dA, dfirst = x.new_empty(sequences, d, n), x.new_empty(sequences, d, n)
    fixed = [x.new_empty(sequences, d, n) if v.dim() == 2 else None for v in (B, C)]
    partial = [None if v.dim() == 2 else x.new_empty(parts, b, t, groups, n) for v in (B, C)]
    if dA.numel():
        last, tiles_A = tiles(dfinal_state, groups, N, lanes), tiles(A, groups, N, lanes)
        (B, B_strides, B_fixed), (C, C_strides, C_fixed) = shared(B, groups, N, lanes), shared(C, groups, N, lanes)
        scratch = x.new_empty(sequences * groups * parts, keep + 1, N, lanes)
        with on(x.device):
            discretized_backward[(sequences * groups * parts,)](
                dy, x, dt, dx, ddt, tiles_A, B, C, B_fixed, C_fixed, last, saved, scratch, cu_seqlens, dA, *partial,
                *fixed, dfirst, *B_strides, *C_strides, t, d, b * t, blocks, per_group, d // groups, groups * parts,
                share, n, N, lanes, keep, _RULES.index(rule), num_warps=warps,
            )  # fmt: skip
    dB, dC = ((p if f is None else f).sum(0) for p, f in zip(partial, fixed, strict=True))
    return dx, ddt, dA.sum(0), dB, dC, dfirst
