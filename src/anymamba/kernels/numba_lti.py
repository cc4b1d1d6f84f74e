"""A time-invariant state-space model on the CPU, as a recurrence: complex states, constant matrices, one row a time.

The lanes are 16 channels. A tile of steps is walked for four pairs of states at a time, whose chains of products do not
wait for each other, and their outputs are added up in a small array.
"""

import numpy as np
import torch
from numba import njit

from anymamba.kernels import LANES
from anymamba.kernels import numba_launch as launch
from anymamba.kernels.numba_launch import F32, address, next_item, pointer
from anymamba.kernels.numba_simd import fma, keep_apart, load, store

TILE = 128  # steps
SIDE_BY_SIDE = 4  # pairs of states
PARTS = 7  # of the constants: Re a, Im a, -Im a, Re b, Im b, 2 Re c, -2 Im c


@njit
def _four(v, at):
    """Of four pairs."""
    return (load(v, at, LANES), load(v, at + LANES, LANES), load(v, at + 2 * LANES, LANES),
            load(v, at + 3 * LANES, LANES))  # fmt: skip


@njit
def _next(a, i, b, h, g, x):
    """a h + i g + b x"""
    return fma(a, h, fma(i, g, b * x))


@njit
def _walk(steps, xs, acc, constants, part, h, at):
    """Four pairs of states h + i g over a tile: xs, acc (steps,LANES); `part` numbers lie between two of PARTS."""
    keep_apart()
    a0, a1, a2, a3 = _four(constants, at)
    i0, i1, i2, i3 = _four(constants, at + part)
    n0, n1, n2, n3 = _four(constants, at + 2 * part)
    b0, b1, b2, b3 = _four(constants, at + 3 * part)
    bi0, bi1, bi2, bi3 = _four(constants, at + 4 * part)
    c0, c1, c2, c3 = _four(constants, at + 5 * part)
    ci0, ci1, ci2, ci3 = _four(constants, at + 6 * part)
    h0, h1, h2, h3 = _four(h, at)
    g0, g1, g2, g3 = _four(h, at + part)
    for t in range(steps):
        x = load(xs, t * LANES, LANES)
        h0, g0 = _next(a0, n0, b0, h0, g0, x), _next(a0, i0, bi0, g0, h0, x)
        h1, g1 = _next(a1, n1, b1, h1, g1, x), _next(a1, i1, bi1, g1, h1, x)
        h2, g2 = _next(a2, n2, b2, h2, g2, x), _next(a2, i2, bi2, g2, h2, x)
        h3, g3 = _next(a3, n3, b3, h3, g3, x), _next(a3, i3, bi3, g3, h3, x)
        first = fma(c0, h0, fma(ci0, g0, load(acc, t * LANES, LANES)))
        second = fma(c1, h1, ci1 * g1)
        third, fourth = fma(c2, h2, ci2 * g2), fma(c3, h3, ci3 * g3)
        store(acc, t * LANES, (first + second) + (third + fourth), LANES)
    for k, v in ((0, h0), (1, h1), (2, h2), (3, h3)):
        store(h, at + k * LANES, v, LANES)
    for k, v in ((0, g0), (1, g1), (2, g2), (3, g3)):
        store(h, at + part + k * LANES, v, LANES)


@launch.Kernel
def lti_scan(dtype):
    def kernel(p):
        x, y, given = pointer(p[2], dtype), pointer(p[3], dtype), pointer(p[4], F32)
        before, after = pointer(p[5], F32), pointer(p[6], F32)
        x_row, t, d, n, padded = p[7], p[8], p[9], p[10], p[11]
        blocks, part = (d + LANES - 1) // LANES, padded * LANES
        constants, h = np.zeros(PARTS * part, np.float32), np.zeros(2 * part, np.float32)
        xs, acc = np.empty(TILE * LANES, np.float32), np.empty(TILE * LANES, np.float32)
        item = next_item(p)
        while item < p[1]:  # a row of the batch and a block of channels
            row, c = item // blocks, item % blocks * LANES
            m = min(LANES, d - c)
            for k in range(PARTS):
                for j in range(n):
                    for v in range(m):
                        constants[k * part + j * LANES + v] = given[(k * d + c + v) * n + j]
            for k in range(2):
                for j in range(n):
                    for v in range(m):
                        at = ((row * d + c + v) * n + j) * 2 + k
                        h[k * part + j * LANES + v] = before[at] if p[5] != 0 else np.float32(0)
            for start in range(0, t, TILE):
                steps = min(TILE, t - start)
                for i in range(steps):
                    store(xs, i * LANES, load(x, (row * t + start + i) * x_row + c, m), LANES)
                acc[:] = 0
                for j in range(0, padded, SIDE_BY_SIDE):
                    _walk(steps, xs, acc, constants, part, h, j * LANES)
                for i in range(steps):
                    store(y, (row * t + start + i) * d + c, load(acc, i * LANES, LANES), m)
            for k in range(2):
                for j in range(n):
                    for v in range(m):
                        after[((row * d + c + v) * n + j) * 2 + k] = h[k * part + j * LANES + v]
            item = next_item(p)

    return kernel


def recurrence(x, A_bar, B_bar, C, initial_state=None):
    """`reference.lti.recurrence` in float32: x (b,t,d); A_bar, B_bar, C (d,n) complex; states (b,d,n) complex."""
    (b, t, d), n = x.shape, A_bar.shape[1]
    x = x.contiguous()
    parts = A_bar.real, A_bar.imag, -A_bar.imag, B_bar.real, B_bar.imag, 2 * C.real, -2 * C.imag  # y is 2 Re(C h)
    given = torch.stack([v.expand(d, n) for v in parts]).contiguous()
    before = None if initial_state is None else torch.view_as_real(initial_state.contiguous())
    y, after = torch.empty(b, t, d), torch.empty(b, d, n, 2)
    padded = -(-n // SIDE_BY_SIDE) * SIDE_BY_SIDE
    launch.launch(lti_scan, launch.STORAGE[x.dtype], b * -(-d // LANES), [
        *map(address, (x, y, given, before, after)), d, t, d, n, padded,
    ], work=b * t * d * n // 4)  # fmt: skip
    return y, torch.view_as_complex(after)
