"""A few rows times a matrix on the CPU, which is decoding: each weight comes from memory once, in one stream."""

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
def _dot(x, x_at, weight, at, k, y, y_at):
    """One row. Two sums side by side, which do not wait for each other, along one stream of memory."""
    keep_apart()
    a, b = splat(ZERO), splat(ZERO)
    whole = k // (2 * LANES) * (2 * LANES)
    for i in range(0, whole, 2 * LANES):  # constant counts: no mask, no branch
        a = fma(load(x, x_at + i, LANES), load(weight, at + i, LANES), a)
        b = fma(load(x, x_at + i + LANES, LANES), load(weight, at + i + LANES, LANES), b)
    for i in range(whole, k, LANES):
        a = fma(load(x, x_at + i, k - i), load(weight, at + i, k - i), a)
    y[y_at] = hsum(a + b)


@njit
def _dot4(x, x_at, x_row, weight, at, k, y, y_at, y_row):
    """Four rows, each summed in the order of `_dot`: what a row gives does not depend on the others."""
    keep_apart()
    x1, x2, x3 = x_at + x_row, x_at + 2 * x_row, x_at + 3 * x_row
    a0, a1, a2, a3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    b0, b1, b2, b3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    whole = k // (2 * LANES) * (2 * LANES)
    for i in range(0, whole, 2 * LANES):
        prefetch(weight, at + i, AHEAD)
        w, v = load(weight, at + i, LANES), load(weight, at + i + LANES, LANES)
        a0, b0 = fma(load(x, x_at + i, LANES), w, a0), fma(load(x, x_at + i + LANES, LANES), v, b0)
        a1, b1 = fma(load(x, x1 + i, LANES), w, a1), fma(load(x, x1 + i + LANES, LANES), v, b1)
        a2, b2 = fma(load(x, x2 + i, LANES), w, a2), fma(load(x, x2 + i + LANES, LANES), v, b2)
        a3, b3 = fma(load(x, x3 + i, LANES), w, a3), fma(load(x, x3 + i + LANES, LANES), v, b3)
    for i in range(whole, k, LANES):
        w = load(weight, at + i, k - i)
        a0, a1 = fma(load(x, x_at + i, k - i), w, a0), fma(load(x, x1 + i, k - i), w, a1)
        a2, a3 = fma(load(x, x2 + i, k - i), w, a2), fma(load(x, x3 + i, k - i), w, a3)
    y[y_at], y[y_at + y_row] = hsum(a0 + b0), hsum(a1 + b1)
    y[y_at + 2 * y_row], y[y_at + 3 * y_row] = hsum(a2 + b2), hsum(a3 + b3)


@njit
def products(x, x_at, x_row, weight, k, first, last, rows, y, y_row):
    """y[r, o] = Σ x[r] · weight[o] for outputs first … last. Rows of x begin at x_at and lie x_row apart.

    Each weight comes from memory once: four rows of x, which stay in the L1 cache, go over all outputs before the next
    four, for which the weights are in the L2 cache.
    """
    for r in range(0, rows - 3, 4):
        for o in range(first, last):
            _dot4(x, x_at + r * x_row, x_row, weight, o * k, k, y, r * y_row + o, y_row)
    for r in range(rows // 4 * 4, rows):
        for o in range(first, last):
            _dot(x, x_at + r * x_row, weight, o * k, k, y, r * y_row + o)


@launch.Kernel
def linear_rows(dtype):
    def kernel(p):
        x, weight, y = pointer(p[2], F32), pointer(p[3], dtype), pointer(p[4], F32)
        rows, k, outputs = p[5], p[6], p[7]
        item = next_item(p)
        while item < p[1]:
            products(x, 0, k, weight, k, item * BLOCK, min((item + 1) * BLOCK, outputs), rows, y, outputs)
            item = next_item(p)

    return kernel


def linear(x, weight):
    """x (rows, k) · weight (outputs, k)ᵀ, (rows, outputs) in float32; the weight dense."""
    (rows, k), outputs = x.shape, weight.shape[0]
    wide, y = x.float().contiguous(), torch.empty(rows, outputs)
    launch.launch(linear_rows, launch.STORAGE[weight.dtype], -(-outputs // BLOCK),
                  [*map(address, (wide, weight, y)), rows, k, outputs], work=rows * k * outputs // LANES)  # fmt: skip
    return y
