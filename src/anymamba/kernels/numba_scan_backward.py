"""Backward of the selective scan on the CPU; see `numba_scan.py` for blocks, chunks and work items.

The chunks are walked from last to first: the states of a chunk are recomputed from the one that forward saved at its
start, so that (b,t,d,n) never exists. The gradient of the state is carried from chunk to chunk.
"""

import numpy as np
import torch
from numba import njit

from anymamba.kernels import LANES, chunk_length
from anymamba.kernels import numba_launch as launch
from anymamba.kernels.numba_launch import F32, I64, address, next_item, pointer
from anymamba.kernels.numba_math import drain, exp2, sigmoid
from anymamba.kernels.numba_scan import A_SCALE, ONE, ZERO, block, gather, prepare, scatter, split_work, vector
from anymamba.kernels.numba_simd import fma, hsum, keep_apart, load, splat, store

A_UNIT = np.float32(1 / A_SCALE)


@njit
def _scan_keep(steps, n, s, u, A, hs, decay, B, C, bc, bc_row, B_lanes, C_lanes, const_B, const_C, y):
    """`_scan` that keeps every state (hs[0] is the one before the chunk) and every decay exp(ΔA)."""
    keep_apart()
    row = n * LANES
    for t in range(steps):
        sv, uv, acc = load(s, t * LANES, LANES), load(u, t * LANES, LANES), splat(ZERO)
        for j in range(n):
            i = t * row + j * LANES
            b = load(B_lanes, j * LANES, LANES) if const_B else splat(B[bc + j])
            c = load(C_lanes, j * LANES, LANES) if const_C else splat(C[bc + j])
            a = exp2(sv * load(A, j * LANES, LANES))
            hv = fma(a, load(hs, i, LANES), uv * b)
            store(decay, i, a, LANES)
            store(hs, i + row, hv, LANES)
            acc = fma(hv, c, acc)
        store(y, t * LANES, acc, LANES)
        bc += bc_row


@njit
def _gate_back(x, x_row, z, z_row, dy, dy_row, dz, dz_row, D, dD, c, m, t0, t1, has_z, acc):
    """From dy: the gradient before the gate (into acc, which held C·h), dz and dD."""
    keep_apart()
    d, sum_d = load(D, 0, LANES), splat(ZERO)
    for t in range(t0, t1):
        i = (t - t0) * LANES
        xv, g = load(x, t * x_row + c, m), load(dy, t * dy_row + c, m)
        if has_z:
            zv = load(z, t * z_row + c, m)
            sig = sigmoid(zv)
            gate = zv * sig
            store(dz, t * dz_row + c, g * fma(d, xv, load(acc, i, LANES)) * fma(sig, splat(ONE) - gate, gate), m)
            g = g * gate
        sum_d = fma(g, xv, sum_d)
        store(acc, i, g, LANES)
    store(dD, 0, sum_d, LANES)


@njit
def _scan_back(steps, n, s, u, A, hs, decay, B, C, bc, bc_row, B_lanes, C_lanes, const_B, const_C, dy,
               g, dA, dB, dC, dB_step, dC_step, ds, dxs):  # fmt: skip
    """Backward in time: g (n, lanes) is the gradient of the state, carried. Leaves ∂/∂Δ through A in ds, Σgb in dxs."""
    keep_apart()
    row = n * LANES
    for t in range(steps - 1, -1, -1):
        sv, uv, dyv = load(s, t * LANES, LANES), load(u, t * LANES, LANES), load(dy, t * LANES, LANES)
        sum_a, sum_b = splat(ZERO), splat(ZERO)
        r = bc + t * bc_row
        for j in range(n):
            i, k = t * row + j * LANES, j * LANES
            b = load(B_lanes, k, LANES) if const_B else splat(B[r + j])
            c = load(C_lanes, k, LANES) if const_C else splat(C[r + j])
            gv = fma(dyv, c, load(g, k, LANES))
            carried = gv * load(decay, i, LANES)
            through_decay = carried * load(hs, i, LANES)
            store(g, k, carried, LANES)
            store(dA, k, fma(through_decay, sv, load(dA, k, LANES)), LANES)
            sum_a = fma(through_decay, load(A, k, LANES), sum_a)
            sum_b = fma(gv, b, sum_b)
            q = t * dB_step + k
            store(dB, q, fma(gv, uv, load(dB, q, LANES)), LANES)
            q = t * dC_step + k
            store(dC, q, fma(dyv, load(hs, i + row, LANES), load(dC, q, LANES)), LANES)
        store(ds, t * LANES, sum_a * A_UNIT, LANES)
        store(dxs, t * LANES, sum_b, LANES)


@njit
def _finish_back(x, x_row, dt, dt_row, dx, dx_row, ddt, ddt_row, bias, D, dbias, c, m, t0, t1, use_softplus, s, dy, ds,
                 dxs):  # fmt: skip
    """dx = Δ Σ g B + D dy;  dΔ = ds + x Σ g B, through the softplus to the raw dt and its bias."""
    keep_apart()
    d, b, sum_b = load(D, 0, LANES), load(bias, 0, LANES), splat(ZERO)
    for t in range(t0, t1):
        i = (t - t0) * LANES
        gb = load(dxs, i, LANES)
        store(dx, t * dx_row + c, fma(gb, load(s, i, LANES), d * load(dy, i, LANES)), m)
        v = fma(gb, load(x, t * x_row + c, m), load(ds, i, LANES))
        if use_softplus:
            v = v * sigmoid(load(dt, t * dt_row + c, m) + b)
        sum_b = sum_b + v
        store(ddt, t * ddt_row + c, v, m)
    store(dbias, 0, sum_b, LANES)


@njit
def _flush(lanes, steps, n, out, start, out_row):
    """Sums over lanes to out, and zeros for the next group."""
    for t in range(steps):
        for j in range(n):
            i = (t * n + j) * LANES
            out[start + t * out_row + j] = hsum(load(lanes, i, LANES))
            store(lanes, i, splat(ZERO), LANES)


@launch.Kernel
def scan_backward(dtype):
    def kernel(p):
        x, dt, z, dy = pointer(p[2], dtype), pointer(p[3], dtype), pointer(p[4], dtype), pointer(p[5], dtype)
        x_row, dt_row, z_row, dy_row = p[6], p[7], p[8], p[9]
        dx, ddt, dz = pointer(p[10], dtype), pointer(p[11], dtype), pointer(p[12], dtype)
        A, B, C = pointer(p[13], F32), pointer(p[14], F32), pointer(p[15], F32)
        D, bias = pointer(p[16], F32), pointer(p[17], F32)
        saved, dh_last, bounds = pointer(p[18], F32), pointer(p[19], F32), pointer(p[20], I64)
        dA, dB, dC = pointer(p[21], F32), pointer(p[22], F32), pointer(p[23], F32)
        dD, dbias, dh0 = pointer(p[24], F32), pointer(p[25], F32), pointer(p[26], F32)
        has_z, has_D, has_bias, has_dh_last = p[4] != 0, p[16] != 0, p[17] != 0, p[19] != 0
        use_softplus, const_B, const_C = p[27] != 0, p[28] != 0, p[29] != 0
        sequences, d, n, groups, chunk, teams, parts = p[30], p[31], p[32], p[33], p[34], p[35], p[36]
        dz_row = p[37]
        total = bounds[sequences]

        width = d // groups
        per_group = (width + LANES - 1) // LANES
        blocks = per_group * groups
        share = (blocks + parts - 1) // parts
        row = n * LANES
        # per block, kept over time: A, the carried gradient of h, constants, and sums over all of time in float64
        A_lanes, g = np.empty(share * row, np.float32), np.empty(share * row, np.float32)
        B_lanes, C_lanes = np.empty(share * row, np.float32), np.empty(share * row, np.float32)
        D_lanes, bias_lanes = np.empty(share * LANES, np.float32), np.empty(share * LANES, np.float32)
        dA_total, dD_total, dbias_total = np.empty(share * row), np.empty(share * LANES), np.empty(share * LANES)
        dB_total, dC_total = np.empty(share * row if const_B else 0), np.empty(share * row if const_C else 0)
        # per chunk: sums in float32. Those for B and C have time steps, over the blocks of a group, unless constant
        dA_lanes, dD_lanes = np.zeros(row, np.float32), np.zeros(LANES, np.float32)
        dbias_lanes = np.zeros(LANES, np.float32)
        dB_lanes = np.zeros(row if const_B else chunk * row, np.float32)
        dC_lanes = np.zeros(row if const_C else chunk * row, np.float32)
        dB_step, dC_step = (0 if const_B else row), (0 if const_C else row)
        hs, decay = np.empty((chunk + 1) * row, np.float32), np.empty(chunk * row, np.float32)
        s, u = np.empty(chunk * LANES, np.float32), np.empty(chunk * LANES, np.float32)
        acc, ds = np.empty(chunk * LANES, np.float32), np.empty(chunk * LANES, np.float32)
        dxs = np.empty(chunk * LANES, np.float32)

        item = next_item(p)
        while item < p[1]:
            team, part = item // parts, item % parts
            low = part * share
            high = min(low + share, blocks)
            for k in range(low, high):
                _, c, m = block(k, width, per_group)
                gather(A, c, m, n, A_SCALE, A_lanes, (k - low) * row)
                vector(D, has_D, c, m, D_lanes, (k - low) * LANES)
                vector(bias, has_bias, c, m, bias_lanes, (k - low) * LANES)
                if const_B:
                    gather(B, c, m, n, ONE, B_lanes, (k - low) * row)
                if const_C:
                    gather(C, c, m, n, ONE, C_lanes, (k - low) * row)
            dA_total[:], dB_total[:], dC_total[:], dD_total[:], dbias_total[:] = 0, 0, 0, 0, 0
            for q in range(team * sequences // teams, (team + 1) * sequences // teams):
                for k in range(low, high):
                    _, c, m = block(k, width, per_group)
                    if has_dh_last:
                        gather(dh_last, q * d + c, m, n, ONE, g, (k - low) * row)
                    else:
                        g[(k - low) * row : (k - low + 1) * row] = ZERO
                begin, end = bounds[q], bounds[q + 1]
                chunks = (end - begin + chunk - 1) // chunk
                for chunk_index in range(chunks - 1, -1, -1):
                    t0 = begin + chunk_index * chunk
                    t1 = min(t0 + chunk, end)
                    slot = begin // chunk + q + chunk_index
                    for k in range(low, high):
                        group, c, m = block(k, width, per_group)
                        i, e = (k - low) * row, (k - low) * LANES
                        base = (slot * blocks + k) * row
                        for v in range(row):
                            hs[v] = saved[base + v]
                        bc = (t0 * groups + group) * n
                        prepare(x, x_row, dt, dt_row, bias_lanes[e:], c, m, t0, t1, use_softplus, s, u)
                        _scan_keep(t1 - t0, n, s, u, A_lanes[i:], hs, decay, B, C, bc, groups * n, B_lanes[i:],
                                   C_lanes[i:], const_B, const_C, acc)  # fmt: skip
                        _gate_back(x, x_row, z, z_row, dy, dy_row, dz, dz_row, D_lanes[e:], dD_lanes, c, m, t0, t1,
                                   has_z, acc)  # fmt: skip
                        _scan_back(t1 - t0, n, s, u, A_lanes[i:], hs, decay, B, C, bc, groups * n, B_lanes[i:],
                                   C_lanes[i:], const_B, const_C, acc, g[i:], dA_lanes, dB_lanes, dC_lanes,
                                   dB_step, dC_step, ds, dxs)  # fmt: skip
                        _finish_back(x, x_row, dt, dt_row, dx, d, ddt, d, bias_lanes[e:], D_lanes[e:], dbias_lanes,
                                     c, m, t0, t1, use_softplus, s, acc, ds, dxs)  # fmt: skip
                        drain(dA_lanes, row, dA_total, i)
                        drain(dD_lanes, LANES, dD_total, e)
                        drain(dbias_lanes, LANES, dbias_total, e)
                        if const_B:
                            drain(dB_lanes, row, dB_total, i)
                        if const_C:
                            drain(dC_lanes, row, dC_total, i)
                        if (k + 1) % per_group == 0 or k + 1 == high:  # the group's last block here: sum over lanes
                            out = part * total * groups * n + bc
                            if not const_B:
                                _flush(dB_lanes, t1 - t0, n, dB, out, groups * n)
                            if not const_C:
                                _flush(dC_lanes, t1 - t0, n, dC, out, groups * n)
                for k in range(low, high):
                    _, c, m = block(k, width, per_group)
                    scatter(g, (k - low) * row, q * d + c, m, n, dh0)
            for k in range(low, high):
                _, c, m = block(k, width, per_group)
                i, e = (k - low) * row, (k - low) * LANES
                scatter(dA_total, i, team * d + c, m, n, dA)
                if const_B:
                    scatter(dB_total, i, team * d + c, m, n, dB)
                if const_C:
                    scatter(dC_total, i, team * d + c, m, n, dC)
                scatter(dD_total, e, team * d + c, m, 1, dD)
                scatter(dbias_total, e, team * d + c, m, 1, dbias)
            item = next_item(p)

    return kernel


def selective_scan_backward(dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, bounds, saved,
                            dz_out=None):  # fmt: skip
    """Gradients dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state; None where the input was None."""
    (total, d), n, sequences = x.shape, A.shape[1], bounds.numel() - 1
    groups = next((v.shape[1] for v in (B, C) if v.dim() == 3), 1)
    teams, parts = split_work(sequences)
    dx, ddt = torch.empty(total, d, dtype=x.dtype), torch.empty(total, d, dtype=x.dtype)
    dz = None if z is None else torch.empty(total, d, dtype=x.dtype) if dz_out is None else dz_out
    dA, dD, dbias = torch.empty(teams, d, n), torch.empty(teams, d), torch.empty(teams, d)
    dB, dC = (torch.empty(teams, d, n) if v.dim() == 2 else torch.zeros(parts, *v.shape) for v in (B, C))
    dinitial = torch.empty(sequences, d, n)
    launch.launch(scan_backward, launch.STORAGE[x.dtype], teams * parts, [
        *map(address, (x, dt, z, dy)), x.stride(0), dt.stride(0), z.stride(0) if z is not None else 0, dy.stride(0),
        *map(address, (dx, ddt, dz, A, B, C, D, dt_bias, saved, dfinal_state, bounds)),
        *map(address, (dA, dB, dC, dD, dbias, dinitial)),
        dt_softplus, B.dim() == 2, C.dim() == 2, sequences, d, n, groups, chunk_length(n), teams, parts,
        0 if dz is None else dz.stride(0),
    ], work=total * d * n)  # fmt: skip
    sums = [v[0] if v.shape[0] == 1 else v.sum(0) for v in (dA, dB, dC, dD, dbias)]
    dA, dB, dC, dD, dbias = sums
    return dx, ddt, dA, dB, dC, None if D is None else dD, dz, None if dt_bias is None else dbias, dinitial
