"""One token of the selective scan on the CPU: what decoding does.

`numba_scan.py` would do it too, but it lays 16 channels side by side, which for one step costs more than the step. Here
the lanes are the n state entries of a channel, as they lie in memory: A and the state stream through once, in order.
"""

import numpy as np
import torch
from numba import njit

from anymamba.kernels import LANES
from anymamba.kernels import numba_launch as launch
from anymamba.kernels.numba_launch import F32, address, next_item, pointer
from anymamba.kernels.numba_math import exp2, sigmoid, softplus
from anymamba.kernels.numba_scan import A_SCALE, ZERO
from anymamba.kernels.numba_simd import fma, hsum, keep_apart, load, splat, store


@njit
def step_inputs(x, dt, x_start, dt_start, bias, has_bias, c, m, use_softplus, s, u):
    """u = Δ·x of 16 channels, and s = Δ in the unit of exp2."""
    keep_apart()
    v = load(dt, dt_start + c, m)
    if has_bias:
        v = v + load(bias, c, m)
    if use_softplus:
        v = softplus(v)
    store(s, 0, v * A_SCALE, LANES)
    store(u, 0, v * load(x, x_start + c, m), LANES)


@njit
def advance(s, u, A, B, C, h, h_new, has_h, c, m, n, q, acc):
    """The states of m channels, from h to h_new at offset q, and acc = C·h_new."""
    keep_apart()
    for i in range(m):
        total = splat(ZERO)
        for j in range(0, n, LANES):
            k = (c + i) * n + j
            v = load(B, j, n - j) * u[i]
            if has_h:
                v = fma(exp2(load(A, k, n - j) * s[i]), load(h, q + k, n - j), v)
            store(h_new, q + k, v, n - j)
            total = fma(v, load(C, j, n - j), total)
        acc[i] = hsum(total)


@njit
def outputs(acc, x, x_start, z, z_start, D, has_z, has_D, c, m, y, y_start):
    """y = (acc + D x) · silu(z)."""
    keep_apart()
    v = load(acc, 0, LANES)
    if has_D:
        v = fma(load(D, c, m), load(x, x_start + c, m), v)
    if has_z:
        zv = load(z, z_start + c, m)
        v = v * (zv * sigmoid(zv))
    store(y, y_start + c, v, m)


@launch.Kernel
def scan_step(dtype):
    def kernel(p):
        x, dt, z, y = pointer(p[2], dtype), pointer(p[3], dtype), pointer(p[4], dtype), pointer(p[5], dtype)
        x_row, dt_row, z_row = p[6], p[7], p[8]
        A, B, C = pointer(p[9], F32), pointer(p[10], F32), pointer(p[11], F32)
        D, bias, h, h_new = pointer(p[12], F32), pointer(p[13], F32), pointer(p[14], F32), pointer(p[15], F32)
        use_softplus, d, n, groups = p[16] != 0, p[17], p[18], p[19]
        s, u, acc = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        b_group, c_group = np.empty(n + LANES, np.float32), np.empty(n + LANES, np.float32)
        width = d // groups

        item = next_item(p)
        while item < p[1]:  # a row of the batch and a group
            row, group = item // groups, item % groups
            for j in range(n):
                b_group[j], c_group[j] = B[item * n + j], C[item * n + j]
            for c in range(group * width, (group + 1) * width, LANES):
                m = min(LANES, (group + 1) * width - c)
                step_inputs(x, dt, row * x_row, row * dt_row, bias, p[13] != 0, c, m, use_softplus, s, u)
                advance(s, u, A, b_group, c_group, h, h_new, p[14] != 0, c, m, n, row * d * n, acc)
                outputs(acc, x, row * x_row, z, row * z_row, D, p[4] != 0, p[12] != 0, c, m, y, row * d)
            item = next_item(p)

    return kernel


def selective_step(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state):
    """`numba_scan.selective_scan` for one token a row: x, dt, z (b,d); B, C (b,g,n). Returns y and the new state."""
    (b, d), n, groups = x.shape, A.shape[1], B.shape[1]
    y, state = torch.empty(b, d, dtype=x.dtype), torch.empty(b, d, n)
    launch.launch(scan_step, launch.STORAGE[x.dtype], b * groups, [
        *map(address, (x, dt, z, y)), x.stride(0), dt.stride(0), z.stride(0) if z is not None else 0,
        *map(address, (A, B, C, D, dt_bias, initial_state, state)), dt_softplus, d, n, groups,
    ], work=b * d * n)  # fmt: skip
    return y, state
