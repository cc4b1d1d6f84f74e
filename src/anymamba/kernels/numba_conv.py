"""Depthwise causal convolution on the CPU, 16 channels at a time, the activation fused.

A chunk of inputs is widened to float32 behind the w-1 inputs before it, so that any width, history and storage type
run through one loop. Backward walks the chunks from last to first and carries the gradients of the w-1 later outputs.
"""

import numpy as np
import torch
from numba import njit

from anymamba.kernels import LANES
from anymamba.kernels import numba_launch as launch
from anymamba.kernels.numba_launch import F32, I64, address, next_item, pointer
from anymamba.kernels.numba_math import drain, sigmoid
from anymamba.kernels.numba_simd import fma, keep_apart, load, splat, store

ZERO, ONE = np.float32(0), np.float32(1)
CHUNK = 64


@njit
def _widen(x, x_row, c, m, t0, t1, out):
    keep_apart()
    for t in range(t0, t1):
        store(out, (t - t0) * LANES, load(x, t * x_row + c, m), LANES)


@njit
def _convolve(w, window, weight, bias, silu, y, y_row, c, m, t0, t1):
    """y[t] = bias + Σ_k weight[k] · window[t + k], through silu if asked."""
    keep_apart()
    b = load(bias, 0, LANES)
    for t in range(t0, t1):
        v = b
        for k in range(w):
            v = fma(load(weight, k * LANES, LANES), load(window, (t - t0 + k) * LANES, LANES), v)
        if silu:
            v = v * sigmoid(v)
        store(y, t * y_row + c, v, m)


@njit
def _convolve4(window, weight, bias, silu, y, y_row, c, m, t0, t1):
    """`_convolve` for w = 4, the published width: weights and window stay in registers (2x faster)."""
    keep_apart()
    b = load(bias, 0, LANES)
    w0, w1 = load(weight, 0, LANES), load(weight, LANES, LANES)
    w2, w3 = load(weight, 2 * LANES, LANES), load(weight, 3 * LANES, LANES)
    x0, x1, x2 = load(window, 0, LANES), load(window, LANES, LANES), load(window, 2 * LANES, LANES)
    for t in range(t0, t1):
        x3 = load(window, (t - t0 + 3) * LANES, LANES)
        v = fma(w3, x3, fma(w2, x2, fma(w1, x1, fma(w0, x0, b))))
        if silu:
            v = v * sigmoid(v)
        store(y, t * y_row + c, v, m)
        x0, x1, x2 = x1, x2, x3


@njit
def _narrow(source, y, y_row, c, m, t0, t1):
    keep_apart()
    for t in range(t0, t1):
        store(y, t * y_row + c, load(source, (t - t0) * LANES, LANES), m)


@njit
def _convolve_back(steps, w, window, weight, dy, dy_row, c, m, t0, silu, pre, dpre, dweight, dbias):
    """dpre[t]: gradient before the activation; the chunk's dweight and dbias."""
    keep_apart()
    sum_b = splat(ZERO)
    for t in range(steps):
        g = load(dy, (t0 + t) * dy_row + c, m)
        if silu:
            v = load(pre, t * LANES, LANES)
            sig = sigmoid(v)
            g = g * fma(v * sig, splat(ONE) - sig, sig)
        store(dpre, t * LANES, g, LANES)
        sum_b = sum_b + g
    store(dbias, 0, sum_b, LANES)
    for k in range(w):
        total = splat(ZERO)
        for t in range(steps):
            total = fma(load(dpre, t * LANES, LANES), load(window, (t + k) * LANES, LANES), total)
        store(dweight, k * LANES, total, LANES)


@njit
def _input_gradient(steps, w, weight, dpre, start, out):
    """out[t] = Σ_k weight[k] · dpre[start + t + w-1 - k]."""
    keep_apart()
    for t in range(steps):
        v = splat(ZERO)
        for k in range(w):
            v = fma(load(weight, k * LANES, LANES), load(dpre, (start + t + w - 1 - k) * LANES, LANES), v)
        store(out, t * LANES, v, LANES)


@njit
def _gather(source, present, c, m, count, out):
    """out[k, lane] = source[c + lane, k], 0 where there is none."""
    for k in range(count):
        for i in range(LANES):
            out[k * LANES + i] = source[(c + i) * count + k] if present and i < m else ZERO


@njit
def _scatter(source, start, c, m, count, out):
    for i in range(m):
        for k in range(count):
            out[(c + i) * count + k] = source[start + k * LANES + i]


@njit
def _history(x, x_row, initial, c, m, begin, t0, past, window):
    """The `past` inputs before row t0 of a sequence that begins at `begin`: from x, before that from `initial`."""
    for i in range(past):
        t = t0 - past + i
        row = window[i * LANES :]
        if t >= begin:
            _widen(x, x_row, c, m, t, t + 1, row)
        else:
            for v in range(LANES):
                row[v] = initial[(t - begin + past) * LANES + v]


@launch.Kernel
def conv_forward(dtype):
    def kernel(p):
        x, y, x_row, y_row = pointer(p[2], dtype), pointer(p[3], dtype), p[4], p[5]
        weight, bias, initial, final = pointer(p[6], F32), pointer(p[7], F32), pointer(p[8], F32), pointer(p[9], F32)
        bounds, silu, d, w, chunks = pointer(p[10], I64), p[11] != 0, p[12], p[13], p[14]
        past = w - 1
        window, first = np.empty((past + CHUNK) * LANES, np.float32), np.empty(past * LANES, np.float32)
        weight_lanes, bias_lanes = np.empty(w * LANES, np.float32), np.empty(LANES, np.float32)

        item = next_item(p)
        while item < p[1]:  # a chunk of a sequence, all channels: rows are read along, as they lie in memory
            q, chunk = item // chunks, item % chunks
            begin, end = bounds[q], bounds[q + 1]
            t0 = begin + chunk * CHUNK
            t1 = min(t0 + CHUNK, end)
            for c in range(0, d if t0 < end or chunk == 0 else 0, LANES):
                m = min(LANES, d - c)
                _gather(weight, True, c, m, w, weight_lanes)
                _gather(bias, p[7] != 0, c, m, 1, bias_lanes)
                if t0 - past < begin or t1 - past < begin:
                    _gather(initial, p[8] != 0, q * d + c, m, past, first)
                _history(x, x_row, first, c, m, begin, t0, past, window)
                _widen(x, x_row, c, m, t0, t1, window[past * LANES :])
                if w == 4:
                    _convolve4(window, weight_lanes, bias_lanes, silu, y, y_row, c, m, t0, t1)
                else:
                    _convolve(w, window, weight_lanes, bias_lanes, silu, y, y_row, c, m, t0, t1)
                if t1 == end:
                    _scatter(window, (t1 - t0) * LANES, q * d + c, m, past, final)
            item = next_item(p)

    return kernel


@launch.Kernel
def conv_backward(dtype):
    def kernel(p):
        x, dy, dx = pointer(p[2], dtype), pointer(p[3], dtype), pointer(p[4], dtype)
        x_row, dy_row, dx_row = p[5], p[6], p[7]
        weight, bias, initial, dfinal = pointer(p[8], F32), pointer(p[9], F32), pointer(p[10], F32), pointer(p[11], F32)
        dweight, dbias, dinitial = pointer(p[12], F32), pointer(p[13], F32), pointer(p[14], F32)
        bounds, silu, d, w, sequences = pointer(p[15], I64), p[16] != 0, p[17], p[18], p[19]
        past = w - 1
        window, out = np.empty((past + CHUNK) * LANES, np.float32), np.empty(max(CHUNK, past) * LANES, np.float32)
        pre, dpre = np.empty(CHUNK * LANES, np.float32), np.empty((CHUNK + 2 * past) * LANES, np.float32)
        weight_lanes, bias_lanes = np.empty(w * LANES, np.float32), np.empty(LANES, np.float32)
        dweight_lanes, dbias_lanes = np.empty(w * LANES, np.float32), np.empty(LANES, np.float32)
        dweight_total, dbias_total = np.empty(w * LANES), np.empty(LANES)
        first, last = np.empty(past * LANES, np.float32), np.empty(past * LANES, np.float32)

        item = next_item(p)
        while item < p[1]:  # one block of channels, all sequences: the sums for the weight need no second pass
            c = item * LANES
            m = min(LANES, d - c)
            _gather(weight, True, c, m, w, weight_lanes)
            _gather(bias, p[9] != 0, c, m, 1, bias_lanes)
            dweight_total[:], dbias_total[:] = 0, 0
            for q in range(sequences):
                begin, end = bounds[q], bounds[q + 1]
                _gather(initial, p[10] != 0, q * d + c, m, past, first)
                _gather(dfinal, p[11] != 0, q * d + c, m, past, last)
                dpre[:] = ZERO
                for chunk in range((end - begin + CHUNK - 1) // CHUNK - 1, -1, -1):
                    t0 = begin + chunk * CHUNK
                    t1 = min(t0 + CHUNK, end)
                    _history(x, x_row, first, c, m, begin, t0, past, window)
                    _widen(x, x_row, c, m, t0, t1, window[past * LANES :])
                    for i in range(past * LANES - 1, -1, -1):  # the later chunk's first rows come after this one's
                        dpre[(t1 - t0) * LANES + i] = dpre[i]
                    if silu:
                        _convolve(w, window, weight_lanes, bias_lanes, False, pre, LANES, 0, LANES, 0, t1 - t0)
                    _convolve_back(t1 - t0, w, window, weight_lanes, dy, dy_row, c, m, t0, silu, pre, dpre,
                                   dweight_lanes, dbias_lanes)  # fmt: skip
                    drain(dweight_lanes, w * LANES, dweight_total, 0)
                    drain(dbias_lanes, LANES, dbias_total, 0)
                    _input_gradient(t1 - t0, w, weight_lanes, dpre, 0, out)
                    for t in range(max(t0, end - past), t1):
                        for v in range(LANES):
                            out[(t - t0) * LANES + v] += last[(t - end + past) * LANES + v]
                    _narrow(out, dx, dx_row, c, m, t0, t1)
                # the initial state is rows -past … -1: shift the gradients up and treat it as one more chunk
                for i in range(past * LANES - 1, -1, -1):
                    dpre[past * LANES + i] = dpre[i]
                dpre[: past * LANES] = ZERO
                _input_gradient(past, w, weight_lanes, dpre, 0, out)
                for i in range(end - begin, past):  # shorter than its history: part of that is the final state too
                    for v in range(LANES):
                        out[i * LANES + v] += last[(i - (end - begin)) * LANES + v]
                _scatter(out, 0, q * d + c, m, past, dinitial)
            _scatter(dweight_total, 0, c, m, w, dweight)
            _scatter(dbias_total, 0, c, m, 1, dbias)
            item = next_item(p)

    return kernel


def causal_conv1d(x, weight, bias, silu, initial_state, bounds):
    """y (rows,d) and final_state (s,d,w-1) float32. x (rows,d) with unit stride in d; the rest contiguous float32."""
    (total, d), w, sequences = x.shape, weight.shape[1], bounds.numel() - 1
    y, final_state = torch.empty(total, d, dtype=x.dtype), torch.empty(sequences, d, w - 1)
    longest = total // max(1, sequences) if sequences == 1 or total == 0 else int(bounds.diff().max())
    chunks = max(1, -(-longest // CHUNK))
    launch.launch(conv_forward, launch.STORAGE[x.dtype], sequences * chunks, [
        *map(address, (x, y)), x.stride(0), d, *map(address, (weight, bias, initial_state, final_state, bounds)),
        silu, d, w, chunks,
    ], work=4 * total * d)  # fmt: skip
    return y, final_state


def causal_conv1d_backward(dy, dfinal_state, x, weight, bias, silu, initial_state, bounds, dx_out=None):
    """Gradients dx, dweight, dbias, dinitial_state."""
    (total, d), w, sequences = x.shape, weight.shape[1], bounds.numel() - 1
    dx = torch.empty(total, d, dtype=x.dtype) if dx_out is None else dx_out
    dweight, dbias = torch.empty(d, w), torch.empty(d)
    dinitial = torch.empty(sequences, d, w - 1)
    blocks = -(-d // LANES)
    launch.launch(conv_backward, launch.STORAGE[x.dtype], blocks, [
        *map(address, (x, dy, dx)), x.stride(0), dy.stride(0), dx.stride(0),
        *map(address, (weight, bias, initial_state, dfinal_state, dweight, dbias, dinitial, bounds)),
        silu, d, w, sequences,
    ], work=4 * total * d)  # fmt: skip
    return dx, dweight, dbias, dinitial
