"""A few rows times a matrix on the CPU, which is decoding: each weight comes from memory once, in one stream.

Every row is summed in the same order, alone or beside others: even vectors, odd vectors, the two together.
"""

import numpy as np
import torch
from numba import njit

from anymamba.kernels import LANES
from anymamba.kernels import numba_launch as launch
from anymamba.kernels.numba_launch import F32, address, next_item, pointer
from anymamba.kernels.numba_simd import fma, hsum, keep_apart, load, prefetch, splat

ZERO = np.float32(0)
BLOCK = 64  # outputs of a work item
AHEAD = 2048  # bytes: four rows' arithmetic takes longer than their weights, and the processor's prefetcher dozes off


@njit
def _dot(x, weight, x_at, at, k):
    keep_apart()
    a, b = splat(ZERO), splat(ZERO)
    whole = k // (2 * LANES) * (2 * LANES)
    for i in range(0, whole, 2 * LANES):  # constant counts: no mask, no branch
        a = fma(load(x, x_at + i, LANES), load(weight, at + i, LANES), a)
        b = fma(load(x, x_at + i + LANES, LANES), load(weight, at + i + LANES, LANES), b)
    for i in range(whole, k, LANES):
        a = fma(load(x, x_at + i, k - i), load(weight, at + i, k - i), a)
    return hsum(a + b)


@njit
def _dot4(x, weight, x0, at, k):
    """`_dot` of four rows: each weight is loaded and widened once."""
    keep_apart()
    x1, x2, x3 = x0 + k, x0 + 2 * k, x0 + 3 * k
    a0, a1, a2, a3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    b0, b1, b2, b3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    whole = k // (2 * LANES) * (2 * LANES)
    for i in range(0, whole, 2 * LANES):
        prefetch(weight, at + i, AHEAD)
        u, v, j = load(weight, at + i, LANES), load(weight, at + i + LANES, LANES), i + LANES
        a0, b0 = fma(load(x, x0 + i, LANES), u, a0), fma(load(x, x0 + j, LANES), v, b0)
        a1, b1 = fma(load(x, x1 + i, LANES), u, a1), fma(load(x, x1 + j, LANES), v, b1)
        a2, b2 = fma(load(x, x2 + i, LANES), u, a2), fma(load(x, x2 + j, LANES), v, b2)
        a3, b3 = fma(load(x, x3 + i, LANES), u, a3), fma(load(x, x3 + j, LANES), v, b3)
    for i in range(whole, k, LANES):
        u = load(weight, at + i, k - i)
        a0, a1 = fma(load(x, x0 + i, k - i), u, a0), fma(load(x, x1 + i, k - i), u, a1)
        a2, a3 = fma(load(x, x2 + i, k - i), u, a2), fma(load(x, x3 + i, k - i), u, a3)
    return hsum(a0 + b0), hsum(a1 + b1), hsum(a2 + b2), hsum(a3 + b3)


@launch.Kernel
def linear_rows(dtype):
    def kernel(p):
        x, weight, y = pointer(p[2], F32), pointer(p[3], dtype), pointer(p[4], F32)
        rows, k, outputs = p[5], p[6], p[7]
        fours = rows // 4 * 4
        item = next_item(p)
        while item < p[1]:
            first, end = item * BLOCK, min((item + 1) * BLOCK, outputs)
            for r in range(0, fours, 4):  # rows outside: four of x stay in the first cache, the weights in the second
                for o in range(first, end):
                    y0, y1, y2, y3 = _dot4(x, weight, r * k, o * k, k)
                    at = r * outputs + o
                    y[at], y[at + outputs], y[at + 2 * outputs], y[at + 3 * outputs] = y0, y1, y2, y3
            for o in range(first, end):
                for r in range(fours, rows):
                    y[r * outputs + o] = _dot(x, weight, r * k, o * k, k)
            item = next_item(p)

    return kernel


def linear(x, weight):
    """x (rows, k) · weight (outputs, k)ᵀ, (rows, outputs) in float32; the weight dense."""
    (rows, k), outputs = x.shape, weight.shape[0]
    wide, y = x.float().contiguous(), torch.empty(rows, outputs)
    launch.launch(linear_rows, launch.STORAGE[weight.dtype], -(-outputs // BLOCK),
                  [*map(address, (wide, weight, y)), rows, k, outputs], work=rows * k * outputs // LANES)  # fmt: skip
    return y
