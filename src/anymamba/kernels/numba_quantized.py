"""A few rows times a matrix of 8-bit or 4-bit integers on the CPU: widened to float32 in registers, summed in float32.

A row of weights is cut into groups of one scale each, the last filled up with zeros; a group is a multiple of 2 LANES.
"""

import numpy as np
import torch
from numba import njit, types

from anymamba.kernels import LANES
from anymamba.kernels import numba_launch as launch
from anymamba.kernels.numba_launch import F32, address, next_item, pointer
from anymamba.kernels.numba_linear import AHEAD, BLOCK
from anymamba.kernels.numba_simd import fma, hsum, keep_apart, load, load_integers, prefetch, splat

ZERO = np.float32(0)
STORAGE = {torch.int8: types.int8, torch.uint8: types.uint8}


@njit
def _dot(x, x_at, weight, scale, at, s, k, group):
    keep_apart()
    total, whole = splat(ZERO), k // (2 * LANES) * (2 * LANES)
    for g in range(0, whole, group):
        a, b = splat(ZERO), splat(ZERO)
        for i in range(g, min(g + group, whole), 2 * LANES):  # constant counts: no mask, no branch
            prefetch(weight, at + i, AHEAD)
            u, v = load_integers(weight, at + i)
            a = fma(load(x, x_at + i, LANES), u, a)
            b = fma(load(x, x_at + i + LANES, LANES), v, b)
        total = fma(a + b, scale[s], total)
        s += 1
    if whole < k:  # the weights are padded, x is not
        u, v = load_integers(weight, at + whole)
        a, b = load(x, x_at + whole, k - whole) * u, load(x, x_at + whole + LANES, k - whole - LANES) * v
        total = fma(a + b, scale[s if whole % group == 0 else s - 1], total)
    return hsum(total)


@njit
def _dot4(x, x0, x_row, weight, scale, at, s, k, group):
    """Four rows, each summed in the order of `_dot`; each weight is loaded and widened once."""
    keep_apart()
    x1, x2, x3 = x0 + x_row, x0 + 2 * x_row, x0 + 3 * x_row
    t0, t1, t2, t3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    whole = k // (2 * LANES) * (2 * LANES)
    for g in range(0, whole, group):
        a0, a1, a2, a3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        b0, b1, b2, b3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        for i in range(g, min(g + group, whole), 2 * LANES):
            prefetch(weight, at + i, AHEAD)
            u, v = load_integers(weight, at + i)
            j = i + LANES
            a0, b0 = fma(load(x, x0 + i, LANES), u, a0), fma(load(x, x0 + j, LANES), v, b0)
            a1, b1 = fma(load(x, x1 + i, LANES), u, a1), fma(load(x, x1 + j, LANES), v, b1)
            a2, b2 = fma(load(x, x2 + i, LANES), u, a2), fma(load(x, x2 + j, LANES), v, b2)
            a3, b3 = fma(load(x, x3 + i, LANES), u, a3), fma(load(x, x3 + j, LANES), v, b3)
        t0, t1 = fma(a0 + b0, scale[s], t0), fma(a1 + b1, scale[s], t1)
        t2, t3 = fma(a2 + b2, scale[s], t2), fma(a3 + b3, scale[s], t3)
        s += 1
    if whole < k:
        u, v = load_integers(weight, at + whole)
        j, m, n, of_group = whole + LANES, k - whole, k - whole - LANES, scale[s if whole % group == 0 else s - 1]
        t0 = fma(load(x, x0 + whole, m) * u + load(x, x0 + j, n) * v, of_group, t0)
        t1 = fma(load(x, x1 + whole, m) * u + load(x, x1 + j, n) * v, of_group, t1)
        t2 = fma(load(x, x2 + whole, m) * u + load(x, x2 + j, n) * v, of_group, t2)
        t3 = fma(load(x, x3 + whole, m) * u + load(x, x3 + j, n) * v, of_group, t3)
    return hsum(t0), hsum(t1), hsum(t2), hsum(t3)


@njit
def quantized_products(x, x_at, x_row, weight, scale, group, k, first, last, rows, y, y_row):
    """`numba_linear.products` of integers. Rows of x hold k numbers, those of the weight whole groups."""
    groups = -(-k // group)
    for r in range(0, rows - 3, 4):
        for o in range(first, last):
            at = r * y_row + o
            y[at], y[at + y_row], y[at + 2 * y_row], y[at + 3 * y_row] = _dot4(
                x, x_at + r * x_row, x_row, weight, scale, o * groups * group, o * groups, k, group
            )
    for r in range(rows // 4 * 4, rows):
        for o in range(first, last):
            y[r * y_row + o] = _dot(x, x_at + r * x_row, weight, scale, o * groups * group, o * groups, k, group)


@launch.Kernel
def quantized_rows(dtype):
    def kernel(p):
        x, weight, scale, y = pointer(p[2], F32), pointer(p[3], dtype), pointer(p[4], F32), pointer(p[5], F32)
        rows, k, outputs, group = p[6], p[7], p[8], p[9]
        item = next_item(p)
        while item < p[1]:
            first, last = item * BLOCK, min((item + 1) * BLOCK, outputs)
            quantized_products(x, 0, k, weight, scale, group, k, first, last, rows, y, outputs)
            item = next_item(p)

    return kernel


def group_of(weight, scale):
    """Weights of one scale."""
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1) // scale.shape[1]


def linear(x, weight, scale):
    """x (rows, inputs) · (weight · scale)ᵀ, (rows, outputs) in float32.

    weight (outputs, k) int8, or (outputs, k / 2) uint8, rows filled up to whole groups with zeros as
    `reference.quantize_weight` makes them; scale (outputs, groups) float32.
    """
    (rows, inputs), outputs = x.shape, len(scale)
    wide, y = x.float().contiguous(), torch.empty(rows, outputs)
    launch.launch(quantized_rows, STORAGE[weight.dtype], -(-outputs // BLOCK),
                  [*map(address, (wide, weight, scale, y)), rows, inputs, outputs, group_of(weight, scale)],
                  work=rows * inputs * outputs // LANES)  # fmt: skip
    return y
