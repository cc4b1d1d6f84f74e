"""Depthwise causal convolution on a GPU, the activation fused: every input is read once, and computed with once.

A program walks down some rows of time with a block of channels, a few rows at a step. The w-1 inputs before a row stay
in registers, as does, in the backward, what later rows still need: dx follows dy by w-1 rows. The rows of the next
step are loaded before this step is computed. Programs after those of the tiles write the states, one a sequence.
Packed sequences: a tile that a sequence ends in is walked in pieces, each within one sequence.
"""

import torch
import triton
import triton.language as tl

from anymamba.kernels.triton_sum import dense, on, sum_shares

CHANNELS = 4  # that a thread works on: 8 bytes of bf16, and few enough registers for many threads

# ---- parts of the kernels --------------------------------------------------------------------------------------


@triton.jit
def _sequence_of(cu_seqlens, sequences, row):
    """The sequence that holds a row: the last that starts at or before it."""
    low, high = row * 0, row * 0 + sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle).to(tl.int32) <= row:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _inside(columns, d, row_is):
    """Mask of the block's channels, if the row is one to touch."""
    return columns < tl.where(row_is, d, 0)


@triton.jit
def _taps(weight, columns, d, w: tl.constexpr):
    """The w taps, each for all channels of the block."""
    taps = ()
    for k in tl.static_range(w):
        taps += (tl.load(weight + columns * w + k, mask=columns < d, other=0).to(tl.float32),)
    return taps


@triton.jit
def _bias(bias, columns, d, has_bias: tl.constexpr):
    if has_bias:
        return tl.load(bias + columns, mask=columns < d, other=0).to(tl.float32)
    else:
        return tl.zeros(columns.shape, tl.float32)


@triton.jit
def _input(x, x_row, row, start, state, sequence, columns, d, w: tl.constexpr, has_state: tl.constexpr):
    """Row of x as float32; one before the sequence's start comes from its state (d,w-1), or is zero."""
    v = tl.load(x + row.to(tl.int64) * x_row + columns, mask=_inside(columns, d, row >= start), other=0)
    if has_state:
        place = state + sequence * d * (w - 1) + (row - start + w - 1)
        old = tl.load(place + columns.to(tl.int64) * (w - 1), mask=_inside(columns, d, row < start), other=0)
        v = tl.where(row >= start, v, old.to(v.dtype))
    return v.to(tl.float32)


@triton.jit
def _past(x, x_row, row, start, state, sequence, columns, d, w: tl.constexpr, has_state: tl.constexpr):
    """The w-1 inputs before a row, the oldest first."""
    past = ()
    for j in tl.static_range(w - 1):
        past += (_input(x, x_row, row - (w - 1) + j, start, state, sequence, columns, d, w, has_state),)
    return past


@triton.jit
def _rows(x, x_row, row, end, columns, d, steps: tl.constexpr):
    """The next rows as they are stored; zeros from `end` on."""
    rows = ()
    for i in tl.static_range(steps):
        place = x + (row + i).to(tl.int64) * x_row + columns
        rows += (tl.load(place, mask=_inside(columns, d, row + i < end), other=0),)
    return rows


@triton.jit
def _widened(past, rows, steps: tl.constexpr):
    window = past
    for i in tl.static_range(steps):
        window += (rows[i].to(tl.float32),)
    return window


@triton.jit
def _weighted(taps, window, bias, i: tl.constexpr, w: tl.constexpr):
    """The output before the activation whose oldest input is window[i]."""
    v = bias
    for k in tl.static_range(w):
        v += taps[k] * window[i + k]
    return v


@triton.jit
def _silu(v):
    # 1 / (1 + e^-v) as the square of a reciprocal root: half the instructions of a division
    r = tl.rsqrt(1 + tl.exp2(v * -1.4426950408889634))
    return v * r * r


@triton.jit
def _before_activation(dy, v, silu: tl.constexpr):
    """Gradient of what goes into the activation."""
    g = dy.to(tl.float32)
    if silu:
        e = tl.exp2(tl.minimum(v * -1.4426950408889634, 126))  # finite: it is multiplied with its reciprocal
        r = tl.rsqrt(1 + e)
        s = r * r
        g *= s + v * s * (e * s)  # e s = 1 - s without cancellation
    return g


# ---- forward ---------------------------------------------------------------------------------------------------


@triton.jit
def _walk(x, x_row, y, row, stop, start, state, sequence, taps, bias, columns, d,
          w: tl.constexpr, steps: tl.constexpr, silu: tl.constexpr, has_state: tl.constexpr):  # fmt: skip
    """Outputs of rows row … stop-1, all of one sequence."""
    past = _past(x, x_row, row, start, state, sequence, columns, d, w, has_state)
    coming = _rows(x, x_row, row, stop, columns, d, steps)
    while row < stop:
        window = _widened(past, coming, steps)
        coming = _rows(x, x_row, row + steps, stop, columns, d, steps)
        for i in tl.static_range(steps):
            v = _weighted(taps, window, bias, i, w)
            if silu:
                v = _silu(v)
            place = y + (row + i).to(tl.int64) * d + columns
            tl.store(place, v.to(y.dtype.element_ty), mask=_inside(columns, d, row + i < stop))
        past = window[steps:]
        row += steps


@triton.jit(do_not_specialize=["t", "tiles", "items", "sequences"])
def _forward(x, y, weight, bias, state, final_state, cu_seqlens, x_batch, x_row, t, d, tiles, items, sequences,
             w: tl.constexpr, length: tl.constexpr, steps: tl.constexpr, block: tl.constexpr, silu: tl.constexpr,
             has_bias: tl.constexpr, has_state: tl.constexpr, packed: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(d, block)
    item = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * block + tl.arange(0, block)
    if item < items:
        taps, b = _taps(weight, columns, d, w), _bias(bias, columns, d, has_bias)
        row = item % tiles * length
        stop = tl.minimum(row + length, t)
        if packed:
            sequence = _sequence_of(cu_seqlens, sequences, row).to(tl.int64)
            while (row < stop) & (sequence < sequences):
                start = tl.load(cu_seqlens + sequence).to(tl.int32)
                end = tl.minimum(tl.load(cu_seqlens + sequence + 1).to(tl.int32), stop)
                _walk(x, x_row, y, row, end, start, state, sequence, taps, b, columns, d, w, steps, silu, has_state)
                row = tl.maximum(row, end)
                sequence += 1
        else:
            sequence = (item // tiles).to(tl.int64)
            x += sequence * x_batch
            y += sequence * t * d
            _walk(x, x_row, y, row, stop, item * 0, state, sequence, taps, b, columns, d, w, steps, silu, has_state)
    else:
        sequence = (item - items).to(tl.int64)
        start, end = item * 0, t
        if packed:
            start = tl.load(cu_seqlens + sequence).to(tl.int32)
            end = tl.load(cu_seqlens + sequence + 1).to(tl.int32)
        else:
            x += sequence * x_batch
        for j in tl.static_range(w - 1):
            v = _input(x, x_row, end - (w - 1) + j, start, state, sequence, columns, d, w, has_state)
            place = final_state + (sequence * d + columns) * (w - 1) + j
            tl.store(place, v.to(final_state.dtype.element_ty), mask=columns < d)


# ---- backward --------------------------------------------------------------------------------------------------


@triton.jit
def _through_state(v, dfinal_state, place, sequence, columns, d, w: tl.constexpr, has_dfinal: tl.constexpr):
    """v and the gradient that the input in this place of the final state has by being there."""
    if has_dfinal:
        at = dfinal_state + sequence * d * (w - 1) + place + columns.to(tl.int64) * (w - 1)
        v += tl.load(at, mask=_inside(columns, d, (place >= 0) & (place < w - 1)), other=0).to(tl.float32)
    return v


@triton.jit
def _walk_back(x, x_row, dy, dy_row, dx, dx_row, row, stop, start, end, state, dfinal_state, sequence, taps, bias, sums,
               columns, d, w: tl.constexpr, steps: tl.constexpr, silu: tl.constexpr, has_state: tl.constexpr,
               has_dfinal: tl.constexpr):  # fmt: skip
    """dx of rows row … stop-1, all of one sequence, and `sums` (of dweight, dbias) with these rows' share."""
    first, late = row, w - 1
    past = _past(x, x_row, row, start, state, sequence, columns, d, w, has_state)
    recent = ()  # gradients before the activation of the last w-1 rows
    for _ in tl.static_range(w - 1):
        recent += (tl.zeros(columns.shape, tl.float32),)
    coming_x = _rows(x, x_row, row, end, columns, d, steps)
    coming_dy = _rows(dy, dy_row, row, end, columns, d, steps)
    while row < stop + late:
        window, gradients = _widened(past, coming_x, steps), coming_dy
        coming_x = _rows(x, x_row, row + steps, end, columns, d, steps)
        coming_dy = _rows(dy, dy_row, row + steps, end, columns, d, steps)
        for i in tl.static_range(steps):
            g = _before_activation(gradients[i], _weighted(taps, window, bias, i, w), silu)
            recent += (g,)
            out = tl.zeros(columns.shape, tl.float32)
            for k in tl.static_range(w):
                out += taps[k] * recent[i + w - 1 - k]
            done = row + i - late
            out = _through_state(out, dfinal_state, done - end + late, sequence, columns, d, w, has_dfinal)
            mask = _inside(columns, d, (done >= first) & (done < stop))
            tl.store(dx + done.to(tl.int64) * dx_row + columns, out.to(dx.dtype.element_ty), mask=mask)
            mine = tl.where(row + i < stop, g, 0)  # the rows after are those of the next program
            shares = ()
            for k in tl.static_range(w):
                shares += (sums[k] + mine * window[i + k],)
            shares += (sums[w] + mine,)
            sums = shares
        past, recent = window[steps:], recent[steps:]
        row += steps
    return sums


@triton.jit
def _state_gradient(x, x_row, dy, dy_row, start, end, state, dfinal_state, dstate, sequence, taps, bias, columns, d,
                    w: tl.constexpr, silu: tl.constexpr, has_dfinal: tl.constexpr):  # fmt: skip
    """Gradient of the w-1 inputs before a sequence, from its first w-1 outputs."""
    past = _past(x, x_row, start, start, state, sequence, columns, d, w, True)
    window = _widened(past, _rows(x, x_row, start, end, columns, d, w - 1), w - 1)
    gradients = _rows(dy, dy_row, start, end, columns, d, w - 1)
    before = ()
    for i in tl.static_range(w - 1):
        before += (_before_activation(gradients[i], _weighted(taps, window, bias, i, w), silu),)
    for j in tl.static_range(w - 1):
        out = tl.zeros(columns.shape, tl.float32)
        for k in tl.static_range(j + 1):
            out += taps[k] * before[j - k]
        out = _through_state(out, dfinal_state, start + j - end, sequence, columns, d, w, has_dfinal)
        place = dstate + (sequence * d + columns) * (w - 1) + j
        tl.store(place, out.to(dstate.dtype.element_ty), mask=columns < d)


@triton.jit(do_not_specialize=["t", "tiles", "items", "sequences"])
def _backward(dy, dfinal_state, x, weight, bias, state, cu_seqlens, dx, dstate, partial, dy_batch, dy_row, x_batch,
              x_row, dx_row, t, d, tiles, items, sequences, w: tl.constexpr, length: tl.constexpr, steps: tl.constexpr,
              block: tl.constexpr, silu: tl.constexpr, has_bias: tl.constexpr, has_state: tl.constexpr,
              has_dfinal: tl.constexpr, packed: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(d, block)
    item = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * block + tl.arange(0, block)
    taps, b = _taps(weight, columns, d, w), _bias(bias, columns, d, has_bias)
    if item < items:
        row = item % tiles * length
        stop = tl.minimum(row + length, t)
        sums = ()
        for _ in tl.static_range(w + 1):
            sums += (tl.zeros(columns.shape, tl.float32),)
        if packed:
            sequence = _sequence_of(cu_seqlens, sequences, row).to(tl.int64)
            while (row < stop) & (sequence < sequences):
                start = tl.load(cu_seqlens + sequence).to(tl.int32)
                end = tl.load(cu_seqlens + sequence + 1).to(tl.int32)
                last = tl.minimum(end, stop)
                sums = _walk_back(x, x_row, dy, dy_row, dx, dx_row, row, last, start, end, state, dfinal_state,
                                  sequence, taps, b, sums, columns, d, w, steps, silu, has_state,
                                  has_dfinal)  # fmt: skip
                row = tl.maximum(row, last)
                sequence += 1
        else:
            sequence = (item // tiles).to(tl.int64)
            x += sequence * x_batch
            dy += sequence * dy_batch
            dx += sequence * t * dx_row
            sums = _walk_back(x, x_row, dy, dy_row, dx, dx_row, row, stop, item * 0, t, state, dfinal_state, sequence,
                              taps, b, sums, columns, d, w, steps, silu, has_state, has_dfinal)  # fmt: skip
        for k in tl.static_range(w + 1):
            tl.store(partial + (item.to(tl.int64) * (w + 1) + k) * d + columns, sums[k], mask=columns < d)
    elif has_state:
        sequence = (item - items).to(tl.int64)
        start, end = item * 0, t
        if packed:
            start = tl.load(cu_seqlens + sequence).to(tl.int32)
            end = tl.load(cu_seqlens + sequence + 1).to(tl.int32)
        else:
            x += sequence * x_batch
            dy += sequence * dy_batch
        _state_gradient(x, x_row, dy, dy_row, start, end, state, dfinal_state, dstate, sequence, taps, b, columns, d, w,
                        silu, has_dfinal)  # fmt: skip


# ---- launches --------------------------------------------------------------------------------------------------


def _unit(v):
    """v with its channels next to each other."""
    return v if v.stride(2) == 1 else v.contiguous()


def _cut(b, t, d, w, longest, steps, enough):
    """(rows of a program, rows at a step, channels of a program, warps): few rows if there are too few programs."""
    channels = CHANNELS
    if w > 8:  # or the registers would not suffice
        channels = steps = 1
    block = next((n for n in (512, 256) if d % n == 0), 128)
    block = min(block, triton.next_power_of_2(max(d, 1)))
    steps = min(steps, triton.next_power_of_2(max(t, 1)))
    while longest > 16 and b * triton.cdiv(t, longest) * triton.cdiv(d, block) < enough:
        longest //= 2
    return longest, steps, block, max(1, min(8, block // (32 * channels)))


def causal_conv1d(x, weight, bias, silu, initial_state, cu_seqlens):
    """y (b,t,d) and final_state (s,d,w-1), both in x's dtype. Shapes as `ops.causal_conv1d`."""
    (b, t, d), w = x.shape, weight.shape[1]
    sequences = b if cu_seqlens is None else cu_seqlens.numel() - 1
    x = _unit(x)
    weight, bias, initial_state = dense(weight, bias, initial_state)
    y, final_state = x.new_empty(b, t, d), x.new_empty(sequences, d, w - 1)
    length, steps, block, warps = _cut(b, t, d, w, 32, 4, 2048)
    tiles = triton.cdiv(t, length)
    programs = (b * tiles + sequences) * triton.cdiv(d, block)
    if programs:
        with on(x.device):
            _forward[(programs,)](
                x, y, weight, bias, initial_state, final_state, cu_seqlens, x.stride(0), x.stride(1), t, d, tiles,
                b * tiles, sequences, w, length, steps, block, silu, bias is not None, initial_state is not None,
                cu_seqlens is not None, num_warps=warps,
            )  # fmt: skip
    return y, final_state


def causal_conv1d_backward(dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens, dx_out=None):
    """dx, dweight, dbias, dinitial_state, each as its input; None for an absent one.

    `dx_out` (b,t,d): where dx is written, rows of a wider array perhaps.
    """
    (b, t, d), w = x.shape, weight.shape[1]
    sequences = b if cu_seqlens is None else cu_seqlens.numel() - 1
    x, dy = _unit(x), _unit(dy)
    dfinal_state, weight, bias, initial_state = dense(dfinal_state, weight, bias, initial_state)
    dx = x.new_empty(b, t, d) if dx_out is None else dx_out
    dweight = torch.empty_like(weight)
    dbias, dinitial = (None if v is None else torch.empty_like(v) for v in (bias, initial_state))
    length, steps, block, warps = _cut(b, t, d, w, 128, 8 // x.element_size(), 512)
    tiles = triton.cdiv(t, length)
    partial = torch.empty(b * tiles, w + 1, d, dtype=torch.float32, device=x.device)
    blocks, has_state = triton.cdiv(d, block), initial_state is not None
    programs = (b * tiles + sequences * has_state) * blocks
    with on(x.device):
        if programs:
            _backward[(programs,)](
                dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, dx, dinitial, partial, dy.stride(0),
                dy.stride(1), x.stride(0), x.stride(1), dx.stride(1), t, d, tiles, b * tiles, sequences, w, length,
                steps, block, silu, bias is not None, has_state, dfinal_state is not None, cu_seqlens is not None,
                num_warps=warps,
            )  # fmt: skip
        sum_shares(partial, dweight, dbias)
    return dx, dweight, dbias, dinitial
