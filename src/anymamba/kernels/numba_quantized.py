"""A few rows times a matrix of 8-bit or 4-bit integers on the CPU: widened to float32 in registers, summed in float32.

The weights and scales are those of `reference.quantize_weight`.
"""

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload

from anymamba.kernels import LANES
from anymamba.kernels import numba_launch as launch
from anymamba.kernels.numba_launch import F32, address, next_item, pointer
from anymamba.kernels.numba_linear import AHEAD, BLOCK
from anymamba.kernels.numba_simd import fma, hsum, keep_apart, load, load_integers, prefetch, splat

ZERO = np.float32(0)
PAIR, GROUP = 2 * LANES, 4 * LANES
STORAGE = {torch.int8: types.int8, torch.uint8: types.uint8}


def _dot(x, x_at, weight, scale, o, k):
    """A row of x, from x_at on, times output o of the weight."""


def _dot4(x, x_at, x_row, weight, scale, o, k):
    """Four rows, each summed in the order of `_dot`; each weight is loaded and widened once."""


@overload(_dot)
def _dot_of_bits(x, x_at, weight, scale, o, k):
    return _dot_int8 if weight.dtype == types.int8 else _dot_int4


@overload(_dot4)
def _dot4_of_bits(x, x_at, x_row, weight, scale, o, k):
    return _dot4_int8 if weight.dtype == types.int8 else _dot4_int4


# ---- 8 bits: a scale a row; rows are filled up to a multiple of 2 LANES ---------------------------------------------


def _dot_int8(x, x_at, weight, scale, o, k):
    keep_apart()
    a, b = splat(ZERO), splat(ZERO)
    whole, at = k // PAIR * PAIR, o * (-(-k // PAIR) * PAIR)
    for i in range(0, whole, PAIR):  # constant counts: no mask, no branch
        prefetch(weight, at + i, AHEAD)
        u, v = load_integers(weight, at + i)
        a = fma(load(x, x_at + i, LANES), u, a)
        b = fma(load(x, x_at + i + LANES, LANES), v, b)
    if whole < k:
        u, v = load_integers(weight, at + whole)
        a = fma(load(x, x_at + whole, k - whole), u, a)
        b = fma(load(x, x_at + whole + LANES, k - whole - LANES), v, b)
    return hsum(a + b) * scale[o]


def _dot4_int8(x, x_at, x_row, weight, scale, o, k):
    keep_apart()
    x1, x2, x3 = x_at + x_row, x_at + 2 * x_row, x_at + 3 * x_row
    a0, a1, a2, a3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    b0, b1, b2, b3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    whole, at = k // PAIR * PAIR, o * (-(-k // PAIR) * PAIR)
    for i in range(0, whole, PAIR):
        prefetch(weight, at + i, AHEAD)
        u, v = load_integers(weight, at + i)
        j = i + LANES
        a0, b0 = fma(load(x, x_at + i, LANES), u, a0), fma(load(x, x_at + j, LANES), v, b0)
        a1, b1 = fma(load(x, x1 + i, LANES), u, a1), fma(load(x, x1 + j, LANES), v, b1)
        a2, b2 = fma(load(x, x2 + i, LANES), u, a2), fma(load(x, x2 + j, LANES), v, b2)
        a3, b3 = fma(load(x, x3 + i, LANES), u, a3), fma(load(x, x3 + j, LANES), v, b3)
    if whole < k:
        u, v = load_integers(weight, at + whole)
        i, j, m, n = whole, whole + LANES, k - whole, k - whole - LANES
        a0, b0 = fma(load(x, x_at + i, m), u, a0), fma(load(x, x_at + j, n), v, b0)
        a1, b1 = fma(load(x, x1 + i, m), u, a1), fma(load(x, x1 + j, n), v, b1)
        a2, b2 = fma(load(x, x2 + i, m), u, a2), fma(load(x, x2 + j, n), v, b2)
        a3, b3 = fma(load(x, x3 + i, m), u, a3), fma(load(x, x3 + j, n), v, b3)
    c = scale[o]
    return hsum(a0 + b0) * c, hsum(a1 + b1) * c, hsum(a2 + b2) * c, hsum(a3 + b3) * c


# ---- 4 bits: a scale for each group of 4 LANES, to which rows are filled up -----------------------------------------


@njit
def _add_group(total, x, at, count, t, u, v, w, scale):
    """total += x · (t,u,v,w) · scale, of x the first `count` numbers."""
    part = load(x, at, count) * t
    part = fma(load(x, at + LANES, count - LANES), u, part)
    part = fma(load(x, at + 2 * LANES, count - 2 * LANES), v, part)
    part = fma(load(x, at + 3 * LANES, count - 3 * LANES), w, part)
    return fma(part, scale, total)


def _dot_int4(x, x_at, weight, scale, o, k):
    keep_apart()
    total, whole, s = splat(ZERO), k // GROUP * GROUP, o * -(-k // GROUP)
    at = s * GROUP
    for i in range(0, whole, GROUP):
        prefetch(weight, at + i, AHEAD)
        (t, u), (v, w) = load_integers(weight, at + i), load_integers(weight, at + i + PAIR)
        total = _add_group(total, x, x_at + i, GROUP, t, u, v, w, scale[s])
        s += 1
    if whole < k:
        (t, u), (v, w) = load_integers(weight, at + whole), load_integers(weight, at + whole + PAIR)
        total = _add_group(total, x, x_at + whole, k - whole, t, u, v, w, scale[s])
    return hsum(total)


def _dot4_int4(x, x_at, x_row, weight, scale, o, k):
    keep_apart()
    x1, x2, x3 = x_at + x_row, x_at + 2 * x_row, x_at + 3 * x_row
    t0, t1, t2, t3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    whole, s = k // GROUP * GROUP, o * -(-k // GROUP)
    at = s * GROUP
    for i in range(0, whole, GROUP):
        prefetch(weight, at + i, AHEAD)
        (t, u), (v, w) = load_integers(weight, at + i), load_integers(weight, at + i + PAIR)
        t0 = _add_group(t0, x, x_at + i, GROUP, t, u, v, w, scale[s])
        t1 = _add_group(t1, x, x1 + i, GROUP, t, u, v, w, scale[s])
        t2 = _add_group(t2, x, x2 + i, GROUP, t, u, v, w, scale[s])
        t3 = _add_group(t3, x, x3 + i, GROUP, t, u, v, w, scale[s])
        s += 1
    if whole < k:
        (t, u), (v, w) = load_integers(weight, at + whole), load_integers(weight, at + whole + PAIR)
        t0 = _add_group(t0, x, x_at + whole, k - whole, t, u, v, w, scale[s])
        t1 = _add_group(t1, x, x1 + whole, k - whole, t, u, v, w, scale[s])
        t2 = _add_group(t2, x, x2 + whole, k - whole, t, u, v, w, scale[s])
        t3 = _add_group(t3, x, x3 + whole, k - whole, t, u, v, w, scale[s])
    return hsum(t0), hsum(t1), hsum(t2), hsum(t3)


# ---- products -------------------------------------------------------------------------------------------------------


@njit
def quantized_products(x, x_at, x_row, weight, scale, k, first, last, rows, y, y_row):
    """`numba_linear.products` of integers. Rows of x hold k numbers, those of the weight are filled up with zeros."""
    for r in range(0, rows - 3, 4):
        for o in range(first, last):
            at = r * y_row + o
            y0, y1, y2, y3 = _dot4(x, x_at + r * x_row, x_row, weight, scale, o, k)
            y[at], y[at + y_row], y[at + 2 * y_row], y[at + 3 * y_row] = y0, y1, y2, y3
    for r in range(rows // 4 * 4, rows):
        for o in range(first, last):
            y[r * y_row + o] = _dot(x, x_at + r * x_row, weight, scale, o, k)


@launch.Kernel
def quantized_rows(dtype):
    def kernel(p):
        x, weight, scale, y = pointer(p[2], F32), pointer(p[3], dtype), pointer(p[4], F32), pointer(p[5], F32)
        rows, k, outputs = p[6], p[7], p[8]
        item = next_item(p)
        while item < p[1]:
            first, last = item * BLOCK, min((item + 1) * BLOCK, outputs)
            quantized_products(x, 0, k, weight, scale, k, first, last, rows, y, outputs)
            item = next_item(p)

    return kernel


def linear(x, weight, scale):
    """x (rows, inputs) · (weight · scale)ᵀ, (rows, outputs) in float32.

    weight (outputs, k) int8 and scale (outputs, 1), or weight (outputs, k / 2) uint8 and scale (outputs, k / 64), as
    `reference.quantize_weight` makes them; scale float32.
    """
    (rows, inputs), outputs = x.shape, len(scale)
    wide, y = x.float().contiguous(), torch.empty(rows, outputs)
    launch.launch(quantized_rows, STORAGE[weight.dtype], -(-outputs // BLOCK),
                  [*map(address, (wide, weight, scale, y)), rows, inputs, outputs],
                  work=rows * inputs * outputs // LANES)  # fmt: skip
    return y
