"""Selective scan on the CPU with other discretisations than Mamba's own, forward and backward.

Blocks of 16 channels, chunks of time and work items are those of `numba_scan.py`. With z = Δ A a rule is two functions:
h_t = a(z) h_{t-1} + Δ p(z) B x. Backward needs their derivatives too, which are cheap once a and p are there. In every
rule a = 1 + z p: where A h + B x = 0 the state stays. So ∂h/∂Δ is a'(z) (A h + B x), in which nothing cancels.
"""

import numpy as np
import torch
from numba import njit

from anymamba.kernels import LANES, chunk_length
from anymamba.kernels import numba_launch as launch
from anymamba.kernels.numba_launch import F32, I64, address, next_item, pointer
from anymamba.kernels.numba_math import drain, exp
from anymamba.kernels.numba_ops import bounds_of, saved_shape
from anymamba.kernels.numba_scan import ONE, ZERO, block, gather, scatter, slots, split_work
from anymamba.kernels.numba_simd import absolute, fma, hsum, keep_apart, load, splat, store, where_less

__all__ = ["discretized_scan", "discretized_scan_backward", "saved_shape"]

HALF = np.float32(0.5)
_RULES = ("zoh", "bilinear", "euler")  # by their number in the kernels
_PHI = tuple(np.float32(1 / float(torch.arange(1.0, k + 3).double().prod())) for k in range(10))  # 1 / (k + 2)!

# ---- the rules: a, p, da/dz, dp/dz of z ------------------------------------------------------------------------


@njit(forceinline=True)
def _zoh(z):
    """e^z and p = (e^z - 1)/z. For |z| < 1 by the series of φ₂ = (p - 1)/z: p = 1 + z φ₂, e^z = 1 + z p, p' = p - φ₂,
    where nothing cancels; beyond p' = (e^z - p)/z."""
    phi = fma(z, splat(_PHI[9]), _PHI[8])
    phi = fma(phi, z, _PHI[7])
    phi = fma(phi, z, _PHI[6])
    phi = fma(phi, z, _PHI[5])
    phi = fma(phi, z, _PHI[4])
    phi = fma(phi, z, _PHI[3])
    phi = fma(phi, z, _PHI[2])
    phi = fma(phi, z, _PHI[1])
    phi = fma(phi, z, _PHI[0])
    p = fma(z, phi, ONE)
    e, size, inverse = exp(z), absolute(z), splat(ONE) / z
    far = (e - ONE) * inverse
    a = where_less(size, ONE, fma(z, p, ONE), e)
    return a, where_less(size, ONE, p, far), a, where_less(size, ONE, p - phi, (e - far) * inverse)


@njit(forceinline=True)
def _bilinear(z):
    p = splat(ONE) / fma(z, splat(-HALF), ONE)
    square = p * p
    return fma(z, splat(HALF), ONE) * p, p, square, square * HALF


@njit(forceinline=True)
def _euler(z):
    return z + ONE, splat(ONE), splat(ONE), splat(ZERO)


# ---- inner loops: one block, one chunk -------------------------------------------------------------------------


def _loops(rule):
    @njit
    def advance(steps, n, x, dt, y, at, d, m, A, h, hop, B, C, bc, bc_row, B_lanes, C_lanes, const_B, const_C):
        """C·h to y. hop: between the states in h (n, lanes); 0 leaves only the last one, n · lanes all of them."""
        keep_apart()
        for t in range(steps):
            o = at + t * d
            s, acc = load(dt, o, m), splat(ZERO)
            u = s * load(x, o, m)
            for j in range(n):
                k = j * LANES
                b = load(B_lanes, k, LANES) if const_B else splat(B[bc + j])
                c = load(C_lanes, k, LANES) if const_C else splat(C[bc + j])
                a, p, _, _ = rule(s * load(A, k, LANES))
                hv = fma(a, load(h, t * hop + k, LANES), u * p * b)
                store(h, (t + 1) * hop + k, hv, LANES)
                acc = fma(hv, c, acc)
            store(y, o, acc, m)
            bc += bc_row

    @njit
    def retreat(steps, n, x, dt, dy, dx, ddt, at, d, m, A, hs, g, B, C, dB, dC, bc, bc_row, B_lanes, C_lanes,
                dB_lanes, dC_lanes, const_B, const_C, dA):  # fmt: skip
        """Backward in time over the states hs; g (n, lanes) is the gradient of the state, carried."""
        keep_apart()
        row = n * LANES
        for t in range(steps - 1, -1, -1):
            o, r = at + t * d, bc + t * bc_row
            s, xv, dyv = load(dt, o, m), load(x, o, m), load(dy, o, m)
            u, sum_s, sum_x = s * xv, splat(ZERO), splat(ZERO)
            for j in range(n):
                k = j * LANES
                i = t * row + k
                b = load(B_lanes, k, LANES) if const_B else splat(B[r + j])
                c = load(C_lanes, k, LANES) if const_C else splat(C[r + j])
                av = load(A, k, LANES)
                a, p, da, dp = rule(s * av)
                gv = fma(dyv, c, load(g, k, LANES))
                gp, ga, hv = gv * p, gv * da, load(hs, i, LANES)
                store(g, k, gv * a, LANES)
                store(dA, k, fma(fma(gv * b * u, dp, ga * hv), s, load(dA, k, LANES)), LANES)
                sum_s = fma(ga, fma(av, hv, xv * b), sum_s)
                sum_x = fma(gp, b, sum_x)
                by_C = dyv * load(hs, i + row, LANES)
                if const_B:
                    store(dB_lanes, k, fma(gp, u, load(dB_lanes, k, LANES)), LANES)
                else:
                    dB[r + j] += hsum(gp * u)
                if const_C:
                    store(dC_lanes, k, load(dC_lanes, k, LANES) + by_C, LANES)
                else:
                    dC[r + j] += hsum(by_C)
            store(dx, o, s * sum_x, m)
            store(ddt, o, sum_s, m)

    return advance, retreat


_advance_zoh, _retreat_zoh = _loops(_zoh)
_advance_bilinear, _retreat_bilinear = _loops(_bilinear)
_advance_euler, _retreat_euler = _loops(_euler)


@njit
def _advance(rule, steps, n, x, dt, y, at, d, m, A, h, hop, B, C, bc, bc_row, B_lanes, C_lanes, const_B, const_C):
    walk = (steps, n, x, dt, y, at, d, m, A, h, hop, B, C, bc, bc_row, B_lanes, C_lanes, const_B, const_C)
    if rule == 0:
        _advance_zoh(*walk)
    elif rule == 1:
        _advance_bilinear(*walk)
    else:
        _advance_euler(*walk)


@njit
def _retreat(rule, steps, n, x, dt, dy, dx, ddt, at, d, m, A, hs, g, B, C, dB, dC, bc, bc_row, B_lanes, C_lanes,
             dB_lanes, dC_lanes, const_B, const_C, dA):  # fmt: skip
    walk = (steps, n, x, dt, dy, dx, ddt, at, d, m, A, hs, g, B, C, dB, dC, bc, bc_row, B_lanes, C_lanes,
            dB_lanes, dC_lanes, const_B, const_C, dA)  # fmt: skip
    if rule == 0:
        _retreat_zoh(*walk)
    elif rule == 1:
        _retreat_bilinear(*walk)
    else:
        _retreat_euler(*walk)


@njit
def _constants(A, B, C, const_B, const_C, c, m, n, A_lanes, B_lanes, C_lanes):
    """What a block of channels has that does not change over time, in lanes."""
    gather(A, c, m, n, ONE, A_lanes, 0)
    if const_B:
        gather(B, c, m, n, ONE, B_lanes, 0)
    if const_C:
        gather(C, c, m, n, ONE, C_lanes, 0)


# ---- kernels ---------------------------------------------------------------------------------------------------


@launch.Kernel
def discretized_forward(dtype):
    def kernel(p):
        x, dt, y = pointer(p[2], dtype), pointer(p[3], dtype), pointer(p[4], dtype)
        A, B, C = pointer(p[5], F32), pointer(p[6], F32), pointer(p[7], F32)
        h0, h_last, saved, bounds = pointer(p[8], F32), pointer(p[9], F32), pointer(p[10], F32), pointer(p[11], I64)
        has_h0, save, const_B, const_C, rule = p[8] != 0, p[10] != 0, p[12] != 0, p[13] != 0, p[14]
        sequences, d, n, groups, chunk, teams, parts = p[15], p[16], p[17], p[18], p[19], p[20], p[21]

        width = d // groups
        per_group = (width + LANES - 1) // LANES
        blocks = per_group * groups
        share = (blocks + parts - 1) // parts
        row = n * LANES
        A_lanes, h = np.empty(row, np.float32), np.empty(row, np.float32)
        B_lanes, C_lanes = np.empty(row, np.float32), np.empty(row, np.float32)

        item = next_item(p)
        while item < p[1]:
            team, part = item // parts, item % parts
            for k in range(part * share, min((part + 1) * share, blocks)):
                group, c, m = block(k, width, per_group)
                _constants(A, B, C, const_B, const_C, c, m, n, A_lanes, B_lanes, C_lanes)
                for q in range(team * sequences // teams, (team + 1) * sequences // teams):
                    if has_h0:
                        gather(h0, q * d + c, m, n, ONE, h, 0)
                    else:
                        h[:] = ZERO
                    for t0 in range(bounds[q], bounds[q + 1], chunk):
                        if save:
                            slot = bounds[q] // chunk + q + (t0 - bounds[q]) // chunk
                            for i in range(row):
                                saved[(slot * blocks + k) * row + i] = h[i]
                        _advance(rule, min(chunk, bounds[q + 1] - t0), n, x, dt, y, t0 * d + c, d, m, A_lanes, h, 0, B,
                                 C, (t0 * groups + group) * n, groups * n, B_lanes, C_lanes, const_B,
                                 const_C)  # fmt: skip
                    scatter(h, 0, q * d + c, m, n, h_last)
            item = next_item(p)

    return kernel


@launch.Kernel
def discretized_backward(dtype):
    def kernel(p):
        x, dt, dy = pointer(p[2], dtype), pointer(p[3], dtype), pointer(p[4], dtype)
        dx, ddt = pointer(p[5], dtype), pointer(p[6], dtype)
        A, B, C = pointer(p[7], F32), pointer(p[8], F32), pointer(p[9], F32)
        dA, dB, dC = pointer(p[10], F32), pointer(p[11], F32), pointer(p[12], F32)
        dh_last, dh0, saved, bounds = pointer(p[13], F32), pointer(p[14], F32), pointer(p[15], F32), pointer(p[16], I64)
        has_dh_last, const_B, const_C, rule = p[13] != 0, p[17] != 0, p[18] != 0, p[19]
        sequences, d, n, groups, chunk, teams, parts = p[20], p[21], p[22], p[23], p[24], p[25], p[26]

        width = d // groups
        per_group = (width + LANES - 1) // LANES
        blocks = per_group * groups
        share = (blocks + parts - 1) // parts
        row, total = n * LANES, bounds[sequences]
        A_lanes, g, hs = np.empty(row, np.float32), np.empty(row, np.float32), np.empty((chunk + 1) * row, np.float32)
        B_lanes, C_lanes = np.empty(row, np.float32), np.empty(row, np.float32)
        dA_lanes, dB_lanes, dC_lanes = np.zeros(row, np.float32), np.zeros(row, np.float32), np.zeros(row, np.float32)
        dA_total, dB_total, dC_total = np.empty(row), np.empty(row), np.empty(row)

        item = next_item(p)
        while item < p[1]:
            team, part = item // parts, item % parts
            of_part = part * total * groups * n  # dB and dC of this part of the channels
            dB_part, dC_part = pointer(p[11] + 4 * of_part, F32), pointer(p[12] + 4 * of_part, F32)
            for k in range(part * share, min((part + 1) * share, blocks)):
                group, c, m = block(k, width, per_group)
                _constants(A, B, C, const_B, const_C, c, m, n, A_lanes, B_lanes, C_lanes)
                dA_total[:], dB_total[:], dC_total[:] = 0, 0, 0
                for q in range(team * sequences // teams, (team + 1) * sequences // teams):
                    if has_dh_last:
                        gather(dh_last, q * d + c, m, n, ONE, g, 0)
                    else:
                        g[:] = ZERO
                    begin, end = bounds[q], bounds[q + 1]
                    for index in range((end - begin + chunk - 1) // chunk - 1, -1, -1):
                        t0, slot = begin + index * chunk, begin // chunk + q + index
                        steps, at, bc = min(chunk, end - t0), t0 * d + c, (t0 * groups + group) * n
                        for i in range(row):
                            hs[i] = saved[(slot * blocks + k) * row + i]
                        # the outputs are not needed again: they lie where dx comes
                        _advance(rule, steps, n, x, dt, dx, at, d, m, A_lanes, hs, row, B, C, bc, groups * n, B_lanes,
                                 C_lanes, const_B, const_C)  # fmt: skip
                        _retreat(rule, steps, n, x, dt, dy, dx, ddt, at, d, m, A_lanes, hs, g, B, C, dB_part, dC_part,
                                 bc, groups * n, B_lanes, C_lanes, dB_lanes, dC_lanes, const_B, const_C,
                                 dA_lanes)  # fmt: skip
                        drain(dA_lanes, row, dA_total, 0)
                        drain(dB_lanes, row, dB_total, 0)
                        drain(dC_lanes, row, dC_total, 0)
                    scatter(g, 0, q * d + c, m, n, dh0)
                scatter(dA_total, 0, team * d + c, m, n, dA)
                if const_B:
                    scatter(dB_total, 0, team * d + c, m, n, dB)
                if const_C:
                    scatter(dC_total, 0, team * d + c, m, n, dC)
            item = next_item(p)

    return kernel


# ---- the functions that `discretized` calls --------------------------------------------------------------------


def _sizes(x, A, B, C, bounds):
    (b, t, d), n, sequences = x.shape, A.shape[1], bounds.numel() - 1
    groups = next((v.shape[2] for v in (B, C) if v.dim() == 4), 1)
    return b * t, sequences, d, n, groups, chunk_length(n), *split_work(sequences)


def discretized_scan(x, dt, A, B, C, initial_state, cu_seqlens, rule, save):
    """y (b,t,d), final_state (s,d,n) and, if `save`, the states that backward starts from, else None.

    All float32: x, dt (b,t,d), A (d,n), B and C (b,t,g,n) or constant (d,n).
    """
    bounds = bounds_of(x, cu_seqlens)
    total, *sizes = _sizes(x, A, B, C, bounds)
    sequences, d, n, groups, chunk, teams, parts = sizes
    x, dt, A, B, C = (v.contiguous() for v in (x, dt, A, B, C))
    initial_state = None if initial_state is None else initial_state.contiguous()
    y, final_state = torch.empty_like(x), torch.empty(sequences, d, n)
    saved = slots(bounds, total, chunk, groups * -(-(d // groups) // LANES), n) if save else None
    launch.launch(discretized_forward, F32, teams * parts, [
        *map(address, (x, dt, y, A, B, C, initial_state, final_state, saved, bounds)),
        B.dim() == 2, C.dim() == 2, _RULES.index(rule), *sizes,
    ], work=total * d * n)  # fmt: skip
    return y, final_state, saved


def discretized_scan_backward(dy, dfinal_state, x, dt, A, B, C, cu_seqlens, rule, saved):
    """dx, ddt, dA, dB, dC, each as its input, and dinitial_state (s,d,n)."""
    bounds = bounds_of(x, cu_seqlens)
    total, *sizes = _sizes(x, A, B, C, bounds)
    sequences, d, n, _, _, teams, parts = sizes
    dy, x, dt, A, B, C = (v.contiguous() for v in (dy, x, dt, A, B, C))
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    dx, ddt, dA, dinitial_state = map(torch.empty, (x.shape, x.shape, (teams, d, n), (sequences, d, n)))
    dB, dC = (torch.empty(teams, d, n) if v.dim() == 2 else torch.zeros(parts, *v.shape) for v in (B, C))
    launch.launch(discretized_backward, F32, teams * parts, [
        *map(address, (x, dt, dy, dx, ddt, A, B, C, dA, dB, dC, dfinal_state, dinitial_state, saved, bounds)),
        B.dim() == 2, C.dim() == 2, _RULES.index(rule), *sizes,
    ], work=total * d * n)  # fmt: skip
    return dx, ddt, *(v.sum(0) for v in (dA, dB, dC)), dinitial_state
