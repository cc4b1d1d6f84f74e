"""A few rows times a matrix on the CPU, which is decoding: each weight comes from memory once, in one stream."""

import numpy as np
import torch
from numba import njit

from anymamba.kernels import LANES
from anymamba.kernels import numba_launch as launch
from anymamba.kernels.numba_launch import F32, address, next_item, pointer
from anymamba.kernels.numba_simd import fma, hsum, keep_apart, load, splat

ZERO = np.float32(0)
BLOCK = 64  # outputs of a work item


@njit
def _dot(x, weight, x_at, at, k):
    """Four sums side by side, which do not wait for each other, along one stream of memory."""
    keep_apart()
    a, b, c, d = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    whole = k // (4 * LANES) * (4 * LANES)
    for i in range(0, whole, 4 * LANES):  # constant counts: no mask, no branch
        a = fma(load(x, x_at + i, LANES), load(weight, at + i, LANES), a)
        b = fma(load(x, x_at + i + LANES, LANES), load(weight, at + i + LANES, LANES), b)
        c = fma(load(x, x_at + i + 2 * LANES, LANES), load(weight, at + i + 2 * LANES, LANES), c)
        d = fma(load(x, x_at + i + 3 * LANES, LANES), load(weight, at + i + 3 * LANES, LANES), d)
    for i in range(whole, k, LANES):
        a = fma(load(x, x_at + i, k - i), load(weight, at + i, k - i), a)
    return hsum((a + b) + (c + d))


@launch.Kernel
def linear_rows(dtype):
    def kernel(p):
        x, weight, y = pointer(p[2], F32), pointer(p[3], dtype), pointer(p[4], F32)
        rows, k, outputs = p[5], p[6], p[7]
        item = next_item(p)
        while item < p[1]:
            for o in range(item * BLOCK, min((item + 1) * BLOCK, outputs)):
                for r in range(rows):
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
