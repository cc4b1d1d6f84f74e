"""A few rows times a matrix of 8-bit or 4-bit integers on the CPU: widened to float32 in registers, summed in float32.

A row of weights is cut into groups of one scale each; k is a multiple of the group, and the group of 2 LANES.
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
def _dot(x, weight, scale, x_at, at, s, k, group):
    keep_apart()
    total = splat(ZERO)
    for g in range(0, k, group):
        a, b = splat(ZERO), splat(ZERO)
        for i in range(g, g + group, 2 * LANES):
            prefetch(weight, at + i, AHEAD)
            u, v = load_integers(weight, at + i)
            a = fma(load(x, x_at + i, LANES), u, a)
            b = fma(load(x, x_at + i + LANES, LANES), v, b)
        total = fma(a + b, scale[s], total)
        s += 1
    return hsum(total)


@njit
def _dot4(x, weight, scale, x0, at, s, k, group):
    """`_dot` of four rows: each weight is loaded and widened once."""
    keep_apart()
    x1, x2, x3 = x0 + k, x0 + 2 * k, x0 + 3 * k
    t0, t1, t2, t3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    for g in range(0, k, group):
        a0, a1, a2, a3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        b0, b1, b2, b3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        for i in range(g, g + group, 2 * LANES):
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
    return hsum(t0), hsum(t1), hsum(t2), hsum(t3)


@launch.Kernel
def quantized_rows(dtype):
    def kernel(p):
        x, weight, scale, y = pointer(p[2], F32), pointer(p[3], dtype), pointer(p[4], F32), pointer(p[5], F32)
        rows, k, outputs, group = p[6], p[7], p[8], p[9]
        fours, groups = rows // 4 * 4, k // group
        item = next_item(p)
        while item < p[1]:
            first, end = item * BLOCK, min((item + 1) * BLOCK, outputs)
            for r in range(0, fours, 4):
                for o in range(first, end):
                    y0, y1, y2, y3 = _dot4(x, weight, scale, r * k, o * k, o * groups, k, group)
                    at = r * outputs + o
                    y[at], y[at + outputs], y[at + 2 * outputs], y[at + 3 * outputs] = y0, y1, y2, y3
            for o in range(first, end):
                for r in range(fours, rows):
                    y[r * outputs + o] = _dot(x, weight, scale, r * k, o * k, o * groups, k, group)
            item = next_item(p)

    return kernel


def linear(x, weight, scale):
    """x (rows, inputs) · (weight · scale)ᵀ, (rows, outputs) in float32.

    weight (outputs, k) int8, or (outputs, k / 2) uint8 as `pack` makes them; scale (outputs, k / group) float32.
    """
    rows, (outputs, groups) = len(x), scale.shape
    k = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    wide, y = torch.zeros(rows, k), torch.empty(rows, outputs)
    wide[:, : x.shape[1]] = x
    launch.launch(quantized_rows, STORAGE[weight.dtype], -(-outputs // BLOCK),
                  [*map(address, (wide, weight, scale, y)), rows, k, outputs, k // groups],
                  work=rows * k * outputs // LANES)  # fmt: skip
    return y
