"""Backward of the selective scan on a GPU; see `triton_scan.py`.

The saved states cut time into pieces, walked from last to first. A piece is first walked forwards, and the state kept
before every fourth step; then, four steps at a time, the states are recomputed into registers and walked backwards
with the gradient of the state. Walking doubles both (`twice_decay`), so that the product of a state and a gradient is
always 2^STEPS times itself. As in forward, what a group of steps reads comes a group ahead. The sums over channels for
dB and dC of four steps are made together (`_merge`). They leave as partial sums of a few blocks of channels each, which
are added afterwards in a fixed order.
"""

import torch
import triton
import triton.language as tl

from anymamba.kernels.triton_common import (
    LOG2E,
    chain,
    channels,
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
from anymamba.kernels.triton_scan import layout
from anymamba.kernels.triton_sum import on

STEPS = 4  # whose states are in registers; `_merge` is made for four
WANTED = 2112  # warps: two waves of 8 on each of 132 multiprocessors


@triton.jit
def _load(p, row_stride, channel, left, STEPS: tl.constexpr):
    """The next steps, one [lanes] each; the last one repeated if only `left` are left."""
    rows = ()
    for k in tl.static_range(STEPS):
        rows += (tl.load(p + (tl.minimum(k, left - 1) * row_stride + channel)),)
    return rows


@triton.jit
def _group(dt, x, dy, z, at, count, dt_t, x_t, dy_t, z_t, channel, STEPS: tl.constexpr):
    """What the steps from `at` read that differs between channels."""
    left = (count - at).to(tl.int32)
    dts, xs = _load(dt + at * dt_t, dt_t, channel, left, STEPS), _load(x + at * x_t, x_t, channel, left, STEPS)
    dys = _load(dy + at * dy_t, dy_t, channel, left, STEPS)
    return dts, xs, dys, _load(z + at * z_t, z_t, channel, left, STEPS) if z is not None else dys


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
                 t, length, chunks, blocks, per_group, width, n: tl.constexpr, N: tl.constexpr,
                 LANES: tl.constexpr, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr):  # fmt: skip
    """What the outputs of a chunk, all but the first, add to the gradient of the state before it, and Σ Δ."""
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % (chunks - 1) + 1
    s = (tl.program_id(0) // blocks // (chunks - 1)).to(tl.int64)
    group, channel, inside = channels(block, per_group, width, LANES)
    row, start, count, _ = span(None, s, chunk, t, length, 1)
    j, lane = tl.arange(0, N), tl.arange(0, LANES)
    dense = j[:, None] * LANES + lane[None, :]
    a = tl.load(A + block * N * LANES + dense)
    bias = tl.load(dt_bias + channel).to(tl.float32) if dt_bias is not None else 0.0
    dy += row * dy_b + start * dy_t
    dt += row * dt_b + start * dt_t
    if z is not None:
        z += row * z_b + start * z_t
    C_tile = tl.load(C_fixed + block * N * LANES + dense) if C_fixed is not None else a
    C += row * C_b + start * C_t + group * C_g

    g, total = tl.zeros([N, LANES], tl.float32), tl.zeros([LANES], tl.float32)
    quads = tl.cdiv(count, STEPS)
    at = s * 0 + (quads - 1) * STEPS
    dts, _, dys, zs = _group(dt, dt, dy, z, at, count, dt_t, dt_t, dy_t, z_t, channel, STEPS)
    for i in tl.range(quads, num_stages=2):
        at = s * 0 + (quads - 1 - i) * STEPS
        left = (count - at).to(tl.int32)
        cs = columns(C_tile, C + at * C_t, C_t, left, j, n, STEPS, C_fixed is None)
        ahead = s * 0 + tl.maximum(quads - 2 - i, 0) * STEPS
        next_dts, _, next_dys, next_zs = _group(dt, dt, dy, z, ahead, count, dt_t, dt_t, dy_t, z_t, channel, STEPS)
        for k in tl.static_range(STEPS - 1, -1, -1):
            alive = lane * 0 + k < left
            size = _step_size(dts[k], bias, alive, SOFTPLUS)[0]
            gy = tl.where(alive & inside, dys[k].to(tl.float32), 0.0)
            if z is not None:
                gate = zs[k].to(tl.float32)
                gy *= gate * sigmoid(gate)
            g = twice_decay(a, size) * (g + cs[k] * (gy * (1 << (STEPS - 1 - k)))[None, :])
            total += size
        g *= 1 / (1 << STEPS)
        dts, dys, zs = next_dts, next_dys, next_zs
    at = (s * chunks + chunk) * blocks + block
    tl.store(added + at * N * LANES + dense, g)
    tl.store(sums + at * LANES + lane, total)


@triton.jit
def _advance(h, a, dts, xs, bs, bias, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """The state after the next steps."""
    for k in tl.static_range(STEPS):
        size = _step_size(dts[k], bias, True, SOFTPLUS)[0]
        h = twice_decay(a, size) * h + bs[k] * (size * xs[k].to(tl.float32) * (2 << k))[None, :]
    return h * (1 / (1 << STEPS))


@triton.jit
def _recompute(h, a, dts, xs, bs, left, bias, lane, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """2^(k + 1) times the state after each of the next steps k, their sizes, and the slopes of these in dt."""
    hs, sizes, slopes = (), (), ()
    for k in tl.static_range(STEPS):
        size, slope = _step_size(dts[k], bias, lane * 0 + k < left, SOFTPLUS)
        h = twice_decay(a, size) * h + bs[k] * (size * xs[k].to(tl.float32) * (2 << k))[None, :]
        hs += (h,)
        sizes += (size,)
        slopes += (slope,)
    return hs, sizes, slopes


@triton.jit
def _tile(p, left):
    """A tile, loaded only here: what is under a condition is not brought early. At least one step is left."""
    v = tl.zeros(p.shape, tl.float32)
    if left > 0:
        v = tl.load(p)
    return v


@triton.jit
def _leave(four, partial, row, left, more, j, n: tl.constexpr, STEPS: tl.constexpr):
    """Sums the merged tiles of four steps over lanes and puts them in their rows, B before C; adds if there is more."""
    N: tl.constexpr = four.shape[0]
    four = tl.sum(tl.reshape(four, [N, 8, four.shape[1] // 8]), 2) * (1 / (1 << STEPS))
    i = tl.arange(0, 8)  # bits: B or C, odd step, later two steps
    step = i % 2 * 2 + i // 2 % 2
    to = partial + (step * row + i // 4 * n)[None, :] + j[:, None]
    wanted = (j < n)[:, None] & (step < left)[None, :]
    if more:
        four += tl.load(to, mask=wanted, other=0.0)
    tl.store(to, four, mask=wanted)


@triton.jit
def _store(p, at, v, mask):
    if p is not None:
        tl.store(p + at, v, mask=mask)


@triton.jit
def _ungate(gy, z, h, c, x, D, dz, mask, k: tl.constexpr):
    """Gradient before the gate; stores the gate's own. h: as after step k."""
    z = z.to(tl.float32)
    out = tl.sum(h * c, 0) * (1 / (2 << k)) + D * x
    sig = sigmoid(z)
    silu = z * sig
    tl.store(dz, (gy * out * (sig + silu * (1.0 - sig))).to(dz.dtype.element_ty), mask=mask)
    return gy * silu


@triton.jit(
    do_not_specialize=["t", "length", "chunks", "blocks", "per_group", "width", "saved_blocks", "shares", "share"],
    do_not_specialize_on_alignment=["A", "A_again", "B_fixed", "C_fixed", "added", "saved", "scratch"],
)
def scan_backward(dy, x, dt, z, dx, ddt, dz, A, A_again, B, B_again, C, B_fixed, C_fixed, D, dt_bias, saved, added,
                  scratch, bounds, dA, dB_fixed, dC_fixed, partial, dD, dbias, dinitial,
                  dy_b, dy_t, x_b, x_t, dt_b, dt_t, z_b, z_t, B_b, B_t, B_g, C_b, C_t, C_g,
                  t, length, chunks, d, dz_t, rows, blocks, per_group, width, saved_blocks, shares, share,
                  n: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, SAVED_LANES: tl.constexpr,
                  STEPS: tl.constexpr, KEEP: tl.constexpr, SOFTPLUS: tl.constexpr):  # fmt: skip
    """A program takes `share` blocks of a group one after the other, and adds up their dB and dC in `partial`."""
    part = tl.program_id(0) % shares
    chunk = tl.program_id(0) // shares % chunks
    s = (tl.program_id(0) // shares // chunks).to(tl.int64)
    group, part = part // tl.cdiv(per_group, share), part % tl.cdiv(per_group, share)
    row, start, count, slot = span(bounds, s, chunk, t, length, KEEP)
    wide, j, lane = s * 0, tl.arange(0, N), tl.arange(0, LANES)
    dense = j[:, None] * LANES + lane[None, :]
    scratch += tl.program_id(0).to(tl.int64) * (KEEP // STEPS) * N * LANES
    pieces = tl.cdiv(count, KEEP)
    x += row * x_b + start * x_t
    dt += row * dt_b + start * dt_t
    dy += row * dy_b + start * dy_t
    flat, n_groups = row * t + start, tl.cdiv(blocks, per_group)
    if z is not None:
        z += row * z_b + start * z_t
    B += row * B_b + start * B_t + group * B_g
    B_again += row * B_b + start * B_t + group * B_g
    C += row * C_b + start * C_t + group * C_g

    for block in range(part * share, tl.minimum((part + 1) * share, per_group)):
        of = group * per_group + block
        _, channel, inside = channels(of, per_group, width, LANES)
        tile = of * N * LANES + dense
        bias = tl.load(dt_bias + channel).to(tl.float32) if dt_bias is not None else 0.0
        skip = tl.load(D + channel).to(tl.float32) if D is not None else 0.0
        g = tl.zeros([N, LANES], tl.float32)
        if added is not None:
            g = tl.load(added + (s * chunks + chunk) * blocks * N * LANES + tile)
        B_tile = tl.load(B_fixed + tile) if B_fixed is not None else g
        C_tile = tl.load(C_fixed + tile) if C_fixed is not None else g
        sum_A, sum_D, sum_bias = tl.zeros([N, LANES], tl.float32), lane * 0.0, lane * 0.0
        sum_B, sum_C = sum_A, sum_A
        first = block * LANES  # in the group; saved states may have wider blocks
        kept = slot * saved_blocks + group * tl.cdiv(width, SAVED_LANES) + first // SAVED_LANES
        kept = saved + kept * N * SAVED_LANES + first % SAVED_LANES + j[:, None] * SAVED_LANES + lane[None, :]

        for i in range(pieces):
            piece = wide + (pieces - 1 - i)
            piece_D, piece_bias = lane * 0.0, lane * 0.0  # small sums first: over long texts a sum gets coarse
            quads = tl.cdiv(tl.minimum(KEEP, count - piece * KEEP), STEPS).to(tl.int32)
            h, a = tl.load(kept + piece * saved_blocks * N * SAVED_LANES), tl.load(A + tile)
            tl.store(scratch + dense, h)
            at = piece * KEEP
            dts, xs = _group(dt, x, dy, z, at, count, dt_t, x_t, dy_t, z_t, channel, STEPS)[:2]
            at += (quads - 1) * STEPS  # the walk backwards begins there
            dys, zs = _group(dt, x, dy, z, at, count, dt_t, x_t, dy_t, z_t, channel, STEPS)[2:]
            for q in tl.range(quads - 1, num_stages=2):
                at = piece * KEEP + q * STEPS
                bs = columns(B_tile, B + at * B_t, B_t, STEPS, j, n, STEPS, B_fixed is None)
                next_dts, next_xs = _group(dt, x, dy, z, at + STEPS, count, dt_t, x_t, dy_t, z_t, channel, STEPS)[:2]
                h = _advance(h, a, dts, xs, bs, bias, STEPS, SOFTPLUS)
                tl.store(scratch + (q + 1) * N * LANES + dense, h)
                dts, xs = next_dts, next_xs
            tl.debug_barrier()
            for i_back in tl.range(quads, num_stages=2):
                q = quads - 1 - i_back
                at = piece * KEEP + q * STEPS
                left = (count - at).to(tl.int32)
                before = _tile(scratch + q * N * LANES + dense, left)
                ahead = piece * KEEP + tl.maximum(q - 1, 0) * STEPS
                next_dts, next_xs, next_dys, next_zs = _group(dt, x, dy, z, ahead, count, dt_t, x_t, dy_t, z_t, channel,
                                                              STEPS)  # fmt: skip
                out, out_z = (flat + at) * d, (flat + at) * dz_t
                bs = columns(B_tile, B + at * B_t, B_t, left, j, n, STEPS, B_fixed is None)
                cs = columns(C_tile, C + at * C_t, C_t, left, j, n, STEPS, C_fixed is None)
                a = _tile(A + tile, left)
                hs, sizes, slopes = _recompute(before, a, dts, xs, bs, left, bias, lane, STEPS, SOFTPLUS)
                # from here: else all decays and all of B would be kept in registers, and more spilled
                a = _tile(A_again + tile, left)
                bs = columns(B_tile, B_again + at * B_t, B_t, left, j, n, STEPS, B_fixed is None)
                sums = ()
                for k in tl.static_range(STEPS - 1, -1, -1):
                    alive, here, z_here = lane * 0 + k < left, k * d + channel, k * dz_t + channel
                    x_k, size = xs[k].to(tl.float32), sizes[k]
                    gy = tl.where(alive & inside, dys[k].to(tl.float32), 0.0)
                    if z is not None:
                        gy = _ungate(gy, zs[k], hs[k], cs[k], x_k, skip, dz + out_z + z_here, alive & inside, k)
                    scaled = gy * (1 << (STEPS - 1 - k))
                    g += cs[k] * scaled[None, :]
                    by_B, by_C = g * (size * x_k * (2 << k))[None, :], hs[k] * scaled[None, :]
                    if B_fixed is not None:
                        sum_B += by_B
                    if C_fixed is not None:
                        sum_C += by_C
                    if partial is not None:
                        sums += (_merge(by_B, by_C, 0),)
                    gb = tl.sum(g * bs[k], 0) * (1 / (1 << (STEPS - 1 - k)))
                    g *= twice_decay(a, size)
                    through = g * (hs[k - 1] if k > 0 else _tile(scratch + q * N * LANES + dense, left))
                    sum_A += through * size[None, :]
                    d_dt = (tl.sum(through * a, 0) * (1 / (1 << STEPS)) + gb * x_k) * slopes[k]
                    tl.store(dx + out + here, (gb * size + skip * gy).to(dx.dtype.element_ty), mask=alive & inside)
                    tl.store(ddt + out + here, d_dt.to(ddt.dtype.element_ty), mask=alive & inside)
                    piece_D, piece_bias = piece_D + gy * x_k, piece_bias + tl.where(alive, d_dt, 0.0)
                g *= 1 / (1 << STEPS)
                dts, xs, dys, zs = next_dts, next_xs, next_dys, next_zs
                if partial is not None:
                    four = _merge(_merge(sums[3], sums[2], 1), _merge(sums[1], sums[0], 1), 2)
                    to = ((wide + part) * rows + flat + at) * n_groups + group
                    _leave(four, partial + to * 2 * n, n_groups * 2 * n, left, block > part * share, j, n, STEPS)
            sum_D, sum_bias = sum_D + piece_D, sum_bias + piece_bias
            tl.debug_barrier()

        once: tl.constexpr = 1 / (1 << STEPS)
        ours = (j < n)[:, None] & inside[None, :]
        at = (s * chunks + chunk) * d + channel
        to = at[None, :] * n + j[:, None]
        tl.store(dA + to, sum_A * once, mask=ours)
        _store(dB_fixed, to, sum_B * once, ours)
        _store(dC_fixed, to, sum_C * once, ours)
        _store(dD, at, sum_D, inside)
        _store(dbias, at, sum_bias, inside)
        if chunk == 0:
            tl.store(dinitial + (s * d + channel[None, :]) * n + j[:, None], g, mask=ours)


# ---- launches --------------------------------------------------------------------------------------------------


def selective_scan_backward(dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens, saved,
                            dz_out=None):  # fmt: skip
    """dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state, each as its input; None for an absent one.

    `dz_out` (b,t,d): where dz is written, rows of a wider array perhaps.
    """
    (b, t, d), n = x.shape, A.shape[1]
    sequences = b if cu_seqlens is None else cu_seqlens.numel() - 1
    groups = max(v.shape[2] if v.dim() == 4 else 1 for v in (B, C))
    real = {"dtype": torch.float32, "device": x.device}
    inputs = B, C
    N, lanes, warps = tile(n, 16)
    per_group = triton.cdiv(d // groups, lanes)
    blocks = groups * per_group
    share = min(triton.cdiv(n, 4 * lanes), max(per_group, 1))  # partial sums take at most 32 bytes an element
    shares = groups * triton.cdiv(per_group, share)
    chunks, length = cut(sequences * shares * warps, t, n, WANTED, cu_seqlens)

    x, dt, z, dy, D, dt_bias, cu_seqlens = map(unit, (x, dt, z, dy, D, dt_bias, cu_seqlens))
    dx, ddt = x.new_empty(b, t, d), x.new_empty(b, t, d)
    dz = None if z is None else x.new_empty(b, t, d) if dz_out is None else dz_out
    parts = sequences * chunks
    dA, dinitial = torch.empty(parts, d, n, **real), torch.empty(sequences, d, n, **real)
    d_fixed = [torch.empty(parts, d, n, **real) if v.dim() == 2 else None for v in inputs]
    dD, dbias = (None if v is None else torch.empty(parts, d, **real) for v in (D, dt_bias))
    partial = torch.empty(shares // groups, b, t, groups, 2, n, **real) if None in d_fixed else None
    if dA.numel():
        A, added = tiles(A, groups, N, lanes), tiles(dfinal_state, groups, N, lanes)
        (B, B_strides, B_fixed), (C, C_strides, C_fixed) = shared(B, groups, N, lanes), shared(C, groups, N, lanes)
        with on(x.device):
            if chunks > 1:
                last, added = added, torch.empty(sequences, chunks, blocks, N, lanes, **real)
                sums = torch.empty(sequences, chunks, blocks, lanes, **real)
                scan_adjoint[(sequences * (chunks - 1) * blocks,)](
                    dy, dt, z, A, C, C_fixed, dt_bias, added, sums, *strides(dy), *strides(dt), *strides(z),
                    *C_strides, t, length, chunks, blocks, per_group, d // groups, n, N, lanes, STEPS, dt_softplus,
                    num_warps=warps, enable_fp_fusion=True,
                )  # fmt: skip
                chain[(sequences * blocks,)](added, sums, A, last, chunks, blocks, N, lanes, True, num_warps=warps,
                                             enable_fp_fusion=True)  # fmt: skip
            keep = keep_every(n)
            _, _, saved_lanes, _, _, saved_blocks = layout(x.shape, (d, n), groups)
            scratch = torch.empty(parts * shares, keep // STEPS, N, lanes, **real)
            scan_backward[(parts * shares,)](
                dy, x, dt, z, dx, ddt, dz, A, A, B, B, C, B_fixed, C_fixed, D, dt_bias, saved, added, scratch,
                cu_seqlens, dA, *d_fixed, partial, dD, dbias, dinitial, *strides(dy), *strides(x), *strides(dt),
                *strides(z), *B_strides, *C_strides, t, length, chunks, d, d if dz is None else dz.stride(1), b * t,
                blocks, per_group, d // groups, saved_blocks, shares, share, n, N, lanes, saved_lanes, STEPS, keep,
                dt_softplus, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    dB, dC = _restore(partial, d_fixed, inputs)
    dD, dbias = (None if v is None else _sum(g).to(v.dtype) for v, g in ((D, dD), (dt_bias, dbias)))
    return dx, ddt, _sum(dA), dB, dC, dD, dz, dbias, dinitial


def _sum(parts):
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _restore(partial, fixed, inputs):
    """dB and dC in the shapes and types of B and C."""
    total = None if partial is None else _sum(partial)  # (b,t,g,2,n)
    for i, (v, g) in enumerate(zip(inputs, fixed, strict=True)):
        if g is not None:
            yield _sum(g).to(v.dtype)
            continue
        g = total[..., i, :]
        if v.dim() == 3:
            g = g[:, :, 0] if g.shape[2] == 1 else g.sum(2)
        yield g.to(v.dtype).contiguous()
