"""What the Triton scans share: step sizes, tiles of the state, and the cut of time into chunks that run side by side.

The state of a block of channels is a tile [N, lanes], N = n rounded up to a power of two, held in registers with one
channel a thread. Triton gives it the layout that suits the loads and stores of it, so whatever has the size of a state
is kept as dense tiles, and pointers to them are not specialized on alignment: else a thread would get several channels
and a part of n, and every step would pass values between threads.
"""

import torch.nn.functional as F
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# ---- parts of the kernels --------------------------------------------------------------------------------------


@triton.jit
def softplus(v):
    """log(1 + e^v), right in all digits where it is tiny: max(v, 0) + log1p(e) by a polynomial, e = e^-|v| ≤ 1."""
    e = tl.exp2(tl.abs(v) * -LOG2E)
    p = e * 0.00536482278 - 0.0300657861  # minimax for log1p(e) / e, relative error 3e-8
    p = p * e + 0.0792045255
    p = p * e - 0.137538015
    p = p * e + 0.191536545
    p = p * e - 0.248571636
    p = p * e + 0.333213226
    p = p * e - 0.49999648
    p = p * e + 1.0
    return p * e + tl.maximum(v, 0.0)


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(v * -LOG2E))


@triton.jit
def twice_decay(a, size):
    """[N, lanes]: twice e^(a · size).

    Just below 0, where the decays lie that last, a GPU's fast exponential errs to one side, by 2e-8 on average, and
    that adds up over a state's memory; with the argument raised by one the error is far less. So what walks over a
    group of steps doubles at each: the state after step k is 2^(k + 1) times itself, what comes into it or out of it is
    scaled per channel, and one product a group takes it back.
    """
    return tl.exp2(tl.fma(a, (size * LOG2E)[None, :], 1.0))


@triton.jit
def channels(block, per_group, width, LANES: tl.constexpr):
    """Group of a block; its channels, the last one repeated, so that loads need no mask; and where they repeat not."""
    group = block // per_group
    place = group * width + block % per_group * LANES + tl.arange(0, LANES)
    end = (group + 1) * width
    return group, tl.minimum(place, end - 1), place < end


@triton.jit
def span(bounds, s, chunk, t, length, KEEP: tl.constexpr):
    """Row of the batch, first step and number of steps of a sequence's chunk, and where its saved states begin."""
    if bounds is None:
        row, first = s, (chunk * length).to(tl.int64)
        start = s * t
        count = tl.minimum(length, t - chunk * length)
    else:
        start = tl.load(bounds + s).to(tl.int64)
        row, first = s * 0, start
        count = (tl.load(bounds + s + 1).to(tl.int64) - start).to(tl.int32)
    return row, first, count, start // KEEP + s + chunk * length // KEEP


@triton.jit
def column(fixed, p, j, n: tl.constexpr, VARIES: tl.constexpr):
    """B or C at a step: that row as [N, 1], or if it does not vary in time the tile."""
    if not VARIES:
        return fixed
    elif j.shape[0] == n:
        return tl.load(p + j)[:, None]
    else:
        return tl.load(p + j, mask=j < n, other=0.0)[:, None]


@triton.jit
def _apart(v):
    """The columns of [N, steps], each [N, 1]; steps is a power of two."""
    if v.shape[1] == 1:
        return (v,)
    else:
        even, odd = tl.split(tl.reshape(v, [v.shape[0], v.shape[1] // 2, 2]))
        evens, odds = _apart(even), _apart(odd)
        rows = ()
        for k in tl.static_range(v.shape[1] // 2):
            rows += (evens[k], odds[k])
        return rows


@triton.jit
def columns(fixed, p, row_stride, left, j, n: tl.constexpr, STEPS: tl.constexpr, VARIES: tl.constexpr):
    """`column` at the next steps; the last one repeated if only `left` are left.

    One load brings all: in a loop with `num_stages`, a copy to shared memory that every thread takes part in.
    """
    if VARIES:
        to = p + (tl.minimum(tl.arange(0, STEPS), left - 1) * row_stride)[None, :] + j[:, None]
        rows = _apart(tl.load(to) if j.shape[0] == n else tl.load(to, mask=(j < n)[:, None], other=0.0))
    else:
        rows = ()
        for _ in tl.static_range(STEPS):
            rows += (fixed,)
    return rows


@triton.jit
def chain(added, sums, A, first, chunks, blocks, N: tl.constexpr, LANES: tl.constexpr, BACK: tl.constexpr):
    """Turns what each chunk adds to the state, tiles (s,chunks,blocks), into the state that comes into the chunk.

    first: tiles (s,blocks). sums (s,chunks,blocks,lanes): a chunk's total step size. BACK: from the last chunk to the
    first, for gradients. What the last of the walk adds goes nowhere, and need not be there.
    """
    block = tl.program_id(0) % blocks
    s = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.arange(0, LANES)
    dense = tl.arange(0, N)[:, None] * LANES + lane[None, :]
    a = tl.load(A + block * N * LANES + dense)
    h = tl.zeros([N, LANES], tl.float32)
    if first is not None:
        h = tl.load(first + (s * blocks + block) * N * LANES + dense)
    for start in range(0, chunks, 4):
        more, total = (), ()
        for i in tl.static_range(4):  # all loads first: each would wait for the one before
            at = (s * chunks + (chunks - 1 - start - i if BACK else start + i)) * blocks + block
            there = lane * 0 + (start + i) < chunks - 1
            more += (tl.load(added + at * N * LANES + dense, mask=there[None, :], other=0.0),)
            total += (tl.load(sums + at * LANES + lane, mask=there, other=0.0),)
        for i in tl.static_range(4):
            at = (s * chunks + (chunks - 1 - start - i if BACK else start + i)) * blocks + block
            there = lane * 0 + (start + i) < chunks
            tl.store(added + at * N * LANES + dense, h, mask=there[None, :])
            h = 0.5 * twice_decay(a, total[i]) * h + more[i]


# ---- launches --------------------------------------------------------------------------------------------------

SHORTEST = 128  # steps of a chunk of time; shorter ones would cost memory


def unit(v):
    """v with its last axis dense."""
    return v if v is None or v.stride(-1) == 1 else v.contiguous()


def tiles(v, groups, N, lanes):
    """(…,d,n) → tiles (…,blocks,N,lanes) in float32."""
    if v is None:
        return None
    v = v.float().unflatten(-2, (groups, -1))
    more = -v.shape[-2] % lanes, N - v.shape[-1]
    v = F.pad(v, (0, more[1], 0, more[0])) if any(more) else v
    return v.flatten(-3, -2).unflatten(-2, (-1, lanes)).transpose(-1, -2).contiguous()


def shared(v, groups, N, lanes):
    """B or C as the kernels read it: its strides (b, t, g), and tiles if it does not vary in time.

    In float32: it is read by every channel, and each thread would convert it again.
    """
    if v.dim() == 2:
        return v, (0, 0, 0), tiles(v, groups, N, lanes)
    v = unit(v.float())
    return v, (v.stride(0), v.stride(1), v.stride(2) if v.dim() == 4 else 0), None


def strides(v):
    return (0, 0) if v is None else (v.stride(0), v.stride(1))


def keep_every(n):
    """Steps between saved states: they take about as much memory as x in float32."""
    return max(16, triton.next_power_of_2(n))


def tile(n, elements):
    """(N, lanes, warps): a tile of about `elements` a thread, at most one channel in it."""
    N = triton.next_power_of_2(max(n, 1))
    lanes = max(8, min(32, 32 * elements // N))
    return N, lanes, max(1, N * lanes // (32 * elements))


def cut(warps, t, n, wanted, cu_seqlens):
    """(chunks, steps of one): time is cut where too few warps would run at a time; no more than wanted come of it."""
    if cu_seqlens is not None or not 0 < warps * 2 <= wanted:
        return 1, t
    keep = keep_every(n)
    length = max(-(-t // (wanted // warps)), SHORTEST, 4 * n)
    length = -(-length // keep) * keep
    return max(1, -(-t // length)), length
