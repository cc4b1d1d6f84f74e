"""Selective scan on the CPU: the loop of `reference/selective.py`, 16 channels at a time.

A *block* is 16 channels of one group; its state, (n, 16 lanes), stays in the L1 cache while time is walked in chunks.
Rows are (batch · time) laid end to end with `bounds` between sequences, so a padded batch and packed sequences are
one code path. Backward is in `numba_scan_backward.py`.

Work items are (group of sequences, part of the channels). Each writes its own outputs; what is summed over items
(dA, dB, …) is summed afterwards in a fixed order: the result is the same bit for bit at a given thread count.
"""

import numpy as np
import torch
from numba import njit

from anymamba.kernels import LANES, chunk_length
from anymamba.kernels import numba_launch as launch
from anymamba.kernels.numba_launch import F32, I64, address, next_item, pointer
from anymamba.kernels.numba_math import LOG2E, STEPS, exp2, sigmoid, softplus
from anymamba.kernels.numba_simd import fma, keep_apart, load, splat, store

ZERO, ONE = np.float32(0), np.float32(1)
A_SCALE = np.float32(LOG2E * STEPS)  # exp(Δ A) is exp2(Δ A_lanes)


# ---- inner loops: one block, one chunk. Scratch arrays are (step, lane) or (step, n, lane). --------------------


@njit
def prepare(x, x_row, dt, dt_row, bias, c, m, t0, t1, use_softplus, s, u):
    """s = Δ and u = Δ·x for rows t0 … t1."""
    keep_apart()
    b = load(bias, 0, LANES)
    for t in range(t0, t1):
        i = (t - t0) * LANES
        v = load(dt, t * dt_row + c, m) + b
        if use_softplus:
            v = softplus(v)
        store(s, i, v, LANES)
        store(u, i, v * load(x, t * x_row + c, m), LANES)


@njit
def _scan(steps, n, s, u, A, h, B, C, bc, bc_row, B_lanes, C_lanes, const_B, const_C, y):
    """Advance the state h over the chunk and write C·h to y."""
    keep_apart()
    for t in range(steps):
        sv, uv, acc = load(s, t * LANES, LANES), load(u, t * LANES, LANES), splat(ZERO)
        for j in range(n):
            i = j * LANES
            b = load(B_lanes, i, LANES) if const_B else splat(B[bc + j])
            c = load(C_lanes, i, LANES) if const_C else splat(C[bc + j])
            hv = fma(exp2(sv * load(A, i, LANES)), load(h, i, LANES), uv * b)
            store(h, i, hv, LANES)
            acc = fma(hv, c, acc)
        store(y, t * LANES, acc, LANES)
        bc += bc_row


@njit
def _finish(x, x_row, z, z_row, y, y_row, D, c, m, t0, t1, has_z, acc):
    """y = (acc + D x) · silu(z)."""
    keep_apart()
    d = load(D, 0, LANES)
    for t in range(t0, t1):
        v = fma(d, load(x, t * x_row + c, m), load(acc, (t - t0) * LANES, LANES))
        if has_z:
            zv = load(z, t * z_row + c, m)
            v = v * (zv * sigmoid(zv))
        store(y, t * y_row + c, v, m)


# ---- moving between (channel, n) and (n, lane) -----------------------------------------------------------------


@njit
def gather(source, c, m, n, scale, out, start):
    """out[j, lane] = source[c + lane, j] · scale, 0 in lanes without a channel or where there is no source."""
    for j in range(n):
        for i in range(LANES):
            out[start + j * LANES + i] = source[(c + i) * n + j] * scale if i < m else ZERO


@njit
def scatter(source, start, c, m, n, out):
    for i in range(m):
        for j in range(n):
            out[(c + i) * n + j] = source[start + j * LANES + i]


@njit
def vector(source, present, c, m, out, start):
    for i in range(LANES):
        out[start + i] = source[c + i] if present and i < m else ZERO


@njit
def block(k, width, per_group):
    """Group, first channel and number of channels of block k."""
    group = k // per_group
    c = group * width + (k % per_group) * LANES
    return group, c, min(LANES, (group + 1) * width - c)


# ---- kernels ---------------------------------------------------------------------------------------------------


@launch.Kernel
def scan_forward(dtype):
    def kernel(p):
        x, dt, z, y = pointer(p[2], dtype), pointer(p[3], dtype), pointer(p[4], dtype), pointer(p[5], dtype)
        x_row, dt_row, z_row, y_row = p[6], p[7], p[8], p[9]
        A, B, C = pointer(p[10], F32), pointer(p[11], F32), pointer(p[12], F32)
        D, bias = pointer(p[13], F32), pointer(p[14], F32)
        h0, h_last, saved, bounds = pointer(p[15], F32), pointer(p[16], F32), pointer(p[17], F32), pointer(p[18], I64)
        has_z, has_D, has_bias, has_h0, save = p[4] != 0, p[13] != 0, p[14] != 0, p[15] != 0, p[17] != 0
        use_softplus, const_B, const_C = p[19] != 0, p[20] != 0, p[21] != 0
        sequences, d, n, groups, chunk, teams, parts = p[22], p[23], p[24], p[25], p[26], p[27], p[28]

        width = d // groups
        per_group = (width + LANES - 1) // LANES
        blocks = per_group * groups
        share = (blocks + parts - 1) // parts
        row = n * LANES
        A_lanes, h = np.empty(share * row, np.float32), np.empty(share * row, np.float32)
        B_lanes, C_lanes = np.empty(row, np.float32), np.empty(row, np.float32)
        D_lanes, bias_lanes = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        s, u = np.empty(chunk * LANES, np.float32), np.empty(chunk * LANES, np.float32)
        acc = np.empty(chunk * LANES, np.float32)

        item = next_item(p)
        while item < p[1]:
            team, part = item // parts, item % parts
            low = part * share
            high = min(low + share, blocks)
            for k in range(low, high):
                _, c, m = block(k, width, per_group)
                gather(A, c, m, n, A_SCALE, A_lanes, (k - low) * row)
            for q in range(team * sequences // teams, (team + 1) * sequences // teams):
                for k in range(low, high):
                    _, c, m = block(k, width, per_group)
                    if has_h0:
                        gather(h0, q * d + c, m, n, ONE, h, (k - low) * row)
                    else:
                        h[(k - low) * row : (k - low + 1) * row] = ZERO
                for t0 in range(bounds[q], bounds[q + 1], chunk):
                    t1 = min(t0 + chunk, bounds[q + 1])
                    slot = bounds[q] // chunk + q + (t0 - bounds[q]) // chunk
                    for k in range(low, high):
                        group, c, m = block(k, width, per_group)
                        hk = h[(k - low) * row : (k - low + 1) * row]
                        vector(D, has_D, c, m, D_lanes, 0)
                        vector(bias, has_bias, c, m, bias_lanes, 0)
                        if const_B:
                            gather(B, c, m, n, ONE, B_lanes, 0)
                        if const_C:
                            gather(C, c, m, n, ONE, C_lanes, 0)
                        if save:
                            base = (slot * blocks + k) * row
                            for i in range(row):
                                saved[base + i] = hk[i]
                        prepare(x, x_row, dt, dt_row, bias_lanes, c, m, t0, t1, use_softplus, s, u)
                        _scan(t1 - t0, n, s, u, A_lanes[(k - low) * row :], hk, B, C, (t0 * groups + group) * n,
                              groups * n, B_lanes, C_lanes, const_B, const_C, acc)  # fmt: skip
                        _finish(x, x_row, z, z_row, y, y_row, D_lanes, c, m, t0, t1, has_z, acc)
                for k in range(low, high):
                    _, c, m = block(k, width, per_group)
                    scatter(h, (k - low) * row, q * d + c, m, n, h_last)
            item = next_item(p)

    return kernel


# ---- the functions that `ops` calls ----------------------------------------------------------------------------


def split_work(sequences):
    """Groups of sequences and parts of the channels, so that every thread has work."""
    workers = launch.threads()
    teams = min(sequences, 4 * workers)
    return teams, 1 if teams % workers == 0 or teams == 4 * workers else workers


def slots(bounds, total, chunk, blocks, n):
    """Room for the state at each chunk's start. Chunk k of sequence q is slot bounds[q] // chunk + q + k; sequences
    that are no whole number of chunks leave slots between them, which are set to 0."""
    counts = -(-bounds.diff() // chunk)
    first = bounds[:-1] // chunk + torch.arange(len(counts))
    saved = torch.empty(total // chunk + len(counts) + 1, blocks, n, LANES)
    used = torch.zeros(len(saved), dtype=torch.bool)
    used[torch.repeat_interleave(first - counts.cumsum(0) + counts, counts) + torch.arange(int(counts.sum()))] = True
    saved[~used] = 0
    return saved


def selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, bounds, save):
    """y, final_state (s,d,n) and, if `save`, the states that `selective_scan_backward` starts from, else None.

    x, dt, z (rows, d) of one dtype with unit stride in d; B, C contiguous float32 (rows,g,n) or constant (d,n);
    A, D, dt_bias, initial_state contiguous float32; bounds (s+1,) int64 offsets of the s sequences in rows.
    """
    (total, d), n, sequences = x.shape, A.shape[1], bounds.numel() - 1
    groups = next((v.shape[1] for v in (B, C) if v.dim() == 3), 1)
    chunk = chunk_length(n)
    blocks = groups * -(-(d // groups) // LANES)
    y = torch.empty(total, d, dtype=x.dtype)
    final_state = torch.empty(sequences, d, n)
    saved = slots(bounds, total, chunk, blocks, n) if save else None
    teams, parts = split_work(sequences)
    launch.launch(scan_forward, launch.STORAGE[x.dtype], teams * parts, [
        *map(address, (x, dt, z, y)), x.stride(0), dt.stride(0), z.stride(0) if z is not None else 0, d,
        *map(address, (A, B, C, D, dt_bias, initial_state, final_state, saved, bounds)),
        dt_softplus, B.dim() == 2, C.dim() == 2, sequences, d, n, groups, chunk, teams, parts,
    ], work=total * d * n)  # fmt: skip
    return y, final_state, saved
