"""Residual add + RMS norm on the CPU in one pass over each row, forward and backward."""

import numpy as np
import torch
from numba import njit

from anymamba.kernels import LANES
from anymamba.kernels import numba_launch as launch
from anymamba.kernels.numba_launch import F32, F64, address, next_item, pointer
from anymamba.kernels.numba_math import drain
from anymamba.kernels.numba_simd import fma, hsum, keep_apart, load, splat, store

ZERO = np.float32(0)


@njit
def add_and_square(x, residual, total, i, m, has_residual):
    """total = x + residual; returns Σ total²."""
    keep_apart()
    squares = splat(ZERO)
    for k in range(0, m, LANES):
        v = load(x, i + k, m - k)
        if has_residual:
            v = v + load(residual, i + k, m - k)
        store(total, i + k, v, m - k)
        squares = fma(v, v, squares)
    return hsum(squares)


@njit
def scale(total, weight, out, i, m, r):
    keep_apart()
    for k in range(0, m, LANES):
        store(out, i + k, load(total, i + k, m - k) * r * load(weight, k, m - k), m - k)


@njit
def _products(total, weight, dy, i, m):
    """Σ total · weight · dy."""
    keep_apart()
    acc = splat(ZERO)
    for k in range(0, m, LANES):
        acc = fma(load(total, i + k, m - k) * load(weight, k, m - k), load(dy, i + k, m - k), acc)
    return hsum(acc)


@njit
def _row_back(total, weight, dy, dtotal, dx, dresidual, dweight, i, m, r, mean, has_dtotal):
    """d(x + residual) = dtotal + r (weight·dy − r² mean · total); adds to dweight."""
    keep_apart()
    for k in range(0, m, LANES):
        v, g = load(total, i + k, m - k), load(dy, i + k, m - k)
        out = (load(weight, k, m - k) * g - v * mean) * r
        if has_dtotal:
            out = out + load(dtotal, i + k, m - k)
        store(dx, i + k, out, m - k)
        store(dresidual, i + k, out, m - k)
        store(dweight, k, fma(v * r, g, load(dweight, k, LANES)), LANES)


@launch.Kernel
def norm_forward(dtype):
    x_type, out_type = dtype

    def kernel(p):
        x, residual, weight = pointer(p[2], x_type), pointer(p[3], F32), pointer(p[4], F32)
        out, total, inverse = pointer(p[5], out_type), pointer(p[6], F32), pointer(p[7], F32)
        count, m, items, eps = p[8], p[9], p[1], pointer(p[10], F64)[0]
        item = next_item(p)
        while item < items:
            for t in range(item * count // items, (item + 1) * count // items):
                squares = add_and_square(x, residual, total, t * m, m, p[3] != 0)
                r = np.float32(1 / np.sqrt(squares / m + eps))
                inverse[t] = r
                scale(total, weight, out, t * m, m, r)
            item = next_item(p)

    return kernel


@launch.Kernel
def norm_backward(dtype):
    x_type, out_type = dtype

    def kernel(p):
        dy, dtotal, total, inverse = pointer(p[2], out_type), pointer(p[3], F32), pointer(p[4], F32), pointer(p[5], F32)
        weight, dx = pointer(p[6], F32), pointer(p[7], x_type)
        dresidual, dweight = pointer(p[8], F32), pointer(p[9], F32)
        count, m, items = p[10], p[11], p[1]
        sums, sums_total = np.zeros(m + LANES, np.float32), np.empty(m)
        item = next_item(p)
        while item < items:
            sums_total[:] = 0
            for t in range(item * count // items, (item + 1) * count // items):
                r = inverse[t]
                mean = np.float32(_products(total, weight, dy, t * m, m) * r * r / m)
                _row_back(total, weight, dy, dtotal, dx, dresidual, sums, t * m, m, r, mean, p[3] != 0)
                if t % 64 == 63:
                    drain(sums, m, sums_total, 0)
            drain(sums, m, sums_total, 0)
            for k in range(m):
                dweight[item * m + k] = sums_total[k]
            item = next_item(p)

    return kernel


def add_rms_norm(x, residual, weight, eps, out_dtype):
    """norm(x + residual)·weight in out_dtype, x + residual in float32, and 1/rms (rows,). x (rows,m) contiguous."""
    count, m = x.shape
    out, total, inverse = torch.empty(count, m, dtype=out_dtype), torch.empty(count, m), torch.empty(count)
    types = (launch.STORAGE[x.dtype], launch.STORAGE[out_dtype])
    eps = torch.tensor(eps, dtype=torch.float64)
    launch.launch(norm_forward, types, min(launch.threads(), count), [
        *map(address, (x, residual, weight, out, total, inverse)), count, m, address(eps),
    ], work=count * m)  # fmt: skip
    return out, total, inverse


def add_rms_norm_backward(dy, dtotal, total, inverse, weight, x_dtype):
    """dx in x_dtype, dresidual float32, dweight float32."""
    count, m = total.shape
    teams = max(1, min(launch.threads(), count))
    dx, dresidual = torch.empty(count, m, dtype=x_dtype), torch.empty(count, m)
    dweight = torch.zeros(teams, m)
    types = (launch.STORAGE[x_dtype], launch.STORAGE[dy.dtype])
    launch.launch(norm_backward, types, teams, [
        *map(address, (dy, dtotal, total, inverse, weight, dx, dresidual, dweight)), count, m,
    ], work=count * m)  # fmt: skip
    return dx, dresidual, dweight.sum(0)
