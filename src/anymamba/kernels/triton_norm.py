"""Residual add + RMS norm on a GPU in one pass: a program holds whole rows in registers, each number is read once."""

import torch
import triton
import triton.language as tl

from anymamba.kernels.triton_sum import dense, on, sum_shares

CHANNELS = 4  # next to each other in a thread: 16 bytes of float32, the widest that float32 is stored with


@triton.jit
def _columns(block: tl.constexpr):
    # 16-bit rows would be read 8 channels a thread, and then be exchanged to be added to float32 ones
    return tl.max_contiguous(tl.arange(0, block), 4)[None, :]


@triton.jit(do_not_specialize=["count"])
def _forward(x, residual, weight, out, total, inverse, count, m, eps, rows: tl.constexpr, block: tl.constexpr,
             has_residual: tl.constexpr):  # fmt: skip
    columns = _columns(block)
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)[:, None]
    mask, place = (row < count) & (columns < m), row * m + columns
    v = tl.load(x + place, mask=mask, other=0).to(tl.float32)
    if has_residual:
        v += tl.load(residual + place, mask=mask, other=0)
    scale = tl.load(weight + columns, mask=columns < m, other=0).to(tl.float32)
    tl.store(total + place, v, mask=mask)
    r = tl.rsqrt(tl.sum(v * v, 1, keep_dims=True) / m + eps)
    tl.store(inverse + row, r, mask=row < count)
    tl.store(out + place, (v * r * scale).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _backward(dy, dtotal, total, inverse, weight, dx, dresidual, partial, count, m, rows: tl.constexpr,
              block: tl.constexpr, has_dtotal: tl.constexpr, has_dresidual: tl.constexpr):  # fmt: skip
    """dx = dtotal + r (weight·dy − r² mean(weight·dy·total) total), and for each program a share of dweight."""
    columns = _columns(block)
    scale = tl.load(weight + columns, mask=columns < m, other=0).to(tl.float32)
    share = tl.zeros([rows, block], tl.float32)
    first, step = tl.program_id(0) * rows, tl.num_programs(0) * rows
    for start in range(first, count, step):
        row = (start + tl.arange(0, rows)).to(tl.int64)[:, None]
        mask, place = (row < count) & (columns < m), row * m + columns
        v = tl.load(total + place, mask=mask, other=0)
        g = tl.load(dy + place, mask=mask, other=0).to(tl.float32)
        r = tl.load(inverse + row, mask=row < count, other=0)
        if has_dtotal:
            through = tl.load(dtotal + place, mask=mask, other=0)
        normed = v * r
        share += normed * g
        g *= scale
        d = (g - normed * (tl.sum(normed * g, 1, keep_dims=True) / m)) * r
        if has_dtotal:
            d += through
        tl.store(dx + place, d.to(dx.dtype.element_ty), mask=mask)
        if has_dresidual:
            tl.store(dresidual + place, d, mask=mask)
    place = partial + tl.program_id(0).to(tl.int64) * m + columns
    tl.store(place, tl.sum(share, 0, keep_dims=True), mask=columns < m)


# ---- launches --------------------------------------------------------------------------------------------------


def _cut(m):
    """(rows of a program, channels with padding, warps)."""
    block = triton.next_power_of_2(m)
    rows = max(1, 512 // block)
    return rows, block, max(1, min(32, rows * block // (32 * CHANNELS)))


def add_rms_norm(x, residual, weight, eps, dtype):
    """out (…,m) in dtype, total = x + residual (…,m) in float32, and 1/rms of each row, flat. residual is float32."""
    m = x.shape[-1]
    count = x.numel() // m
    x, residual, weight = dense(x, residual, weight)
    out, total = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=torch.float32)
    inverse = total.new_empty(count)
    rows, block, warps = _cut(m)
    if count:
        with on(x.device):
            _forward[(triton.cdiv(count, rows),)](
                x, residual, weight, out, total, inverse, count, m, eps, rows, block, residual is not None,
                num_warps=warps,
            )  # fmt: skip
    return out, total, inverse


def add_rms_norm_backward(dy, dtotal, total, inverse, weight, dtype):
    """dx in dtype, dresidual in float32 (None if dtype is float32: dx is the same numbers), dweight as weight."""
    m, count = total.shape[-1], inverse.numel()
    dy, dtotal, total, weight = dense(dy, dtotal, total, weight)
    dx = torch.empty_like(total, dtype=dtype)
    dresidual = None if dtype == torch.float32 else torch.empty_like(total)
    dweight = torch.empty_like(weight)
    rows, block, warps = _cut(m)
    # all at once on a large GPU (132 processors × 4096 channels in flight); each leaves a share of dweight
    programs = min(triton.cdiv(count, rows), max(132, 132 * 4096 // (rows * block)))
    partial = total.new_empty(programs, 1, m)
    with on(total.device):
        if programs:
            _backward[(programs,)](
                dy, dtotal, total, inverse, weight, dx, dresidual, partial, count, m, rows, block, dtotal is not None,
                dresidual is not None, num_warps=warps,
            )  # fmt: skip
        sum_shares(partial, dweight)
    return dx, dresidual, dweight
