"""Exponential functions on vectors of 16 float32, and sums that keep their digits."""

import os

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit
from numba.extending import intrinsic

from anymamba.kernels.numba_simd import (
    I32,
    VF,
    VI,
    absolute,
    add_exponent,
    call_llvm,
    constant,
    fma,
    maximum,
    minimum,
    splat,
    vec,
)

LOG2E = np.float32(1.4426950408889634)
_LOG2E_REST = np.float32(1.4426950408889634 - float(LOG2E))
_MAGIC = np.float32(1.5 * 2**23)  # adding it rounds to an integer k and leaves k in the low bits


@njit(forceinline=True)
def _two_to(f, t):
    """2^(f + k) for f in [-1/2, 1/2] and the k in the low bits of t."""
    # minimax polynomial of 2^f of degree 6 with p(0) = 1
    p = fma(f, splat(np.float32(1.5353362e-4)), np.float32(1.3398874e-3))
    p = fma(p, f, np.float32(9.6184373e-3))
    p = fma(p, f, np.float32(5.5503324e-2))
    p = fma(p, f, np.float32(2.4022648e-1))
    p = fma(p, f, np.float32(6.9314718e-1))
    p = fma(p, f, np.float32(1.0))
    return add_exponent(p, t)


# The scan's exponentials, 2^(x / STEPS). AVX-512 can look up 2^(i/16) for 16 lanes in one instruction, which saves
# two of the ten multiplications a state element (10 % of a scan); elsewhere STEPS is 1 and the polynomial does it all.
AVX512 = bool(get_host_cpu_features().get("avx512f")) and not os.environ.get("ANYMAMBA_NO_AVX512")
STEPS = 16 if AVX512 else 1
_TABLE = [
    int(bits) - (i << 19) for i, bits in enumerate((2.0 ** (np.arange(16) / 16)).astype(np.float32).view(np.int32))
]


@intrinsic
def _table_two_to(typingctx, t):
    """2^(k/16) for the k in the low bits of t: k's low 4 bits pick the mantissa, the rest is added to the exponent."""

    def codegen(context, builder, sig, args):
        bits = builder.bitcast(args[0], VI)
        table = builder.bitcast(ir.Constant(VI, _TABLE), VF)  # less i << 19, which adding t << 19 puts back
        mantissa = builder.bitcast(call_llvm(builder, "llvm.x86.avx512.permvar.sf.512", [table, bits]), VI)
        return builder.bitcast(builder.add(mantissa, builder.shl(bits, constant(I32, 19))), VF)

    return vec(t), codegen


@njit(forceinline=True)
def _exp2_table(x):
    x = minimum(maximum(x, np.float32(-125.0 * 16)), np.float32(127.0 * 16))
    t = x + _MAGIC
    f = x - (t - _MAGIC)  # in sixteenths
    s = _table_two_to(t)
    q = fma(f, splat(np.float32(0.05550411 / 16**3)), np.float32(0.24022651 / 16**2))
    return fma(s, fma(f, q, np.float32(0.69314718 / 16)) * f, s)


@njit(forceinline=True)
def _exp2_polynomial(x):
    x = minimum(maximum(x, np.float32(-125.0)), np.float32(127.0))
    t = x + _MAGIC
    return _two_to(x - (t - _MAGIC), t)


# 2^(x / STEPS), relative error 1e-7, for every lane; at most 1e-37 below 2^-125, 2^127 from there on; NaN stays.
exp2 = _exp2_table if AVX512 else _exp2_polynomial


@njit(forceinline=True)
def exp(x):
    """e^x, relative error 1e-7 for every x: x·log₂e is carried to more than float32's digits."""
    x = minimum(maximum(x, np.float32(-86.5)), np.float32(88.0))
    t = fma(x, splat(LOG2E), _MAGIC)
    k = t - _MAGIC
    return _two_to(fma(x, splat(_LOG2E_REST), fma(x, splat(LOG2E), k * np.float32(-1.0))), t)


@njit(forceinline=True)
def sigmoid(x):
    return splat(np.float32(1.0)) / (exp(x * np.float32(-1.0)) + np.float32(1.0))


@njit(forceinline=True)
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(u), u = e^-|x|, by the series of 2·artanh(u / (2 + u))."""
    u = exp(absolute(x) * np.float32(-1.0))
    s = u / (u + np.float32(2.0))
    q = s * s
    p = fma(q, splat(np.float32(2.0 / 15)), np.float32(2.0 / 13))
    p = fma(p, q, np.float32(2.0 / 11))
    p = fma(p, q, np.float32(2.0 / 9))
    p = fma(p, q, np.float32(2.0 / 7))
    p = fma(p, q, np.float32(2.0 / 5))
    p = fma(p, q, np.float32(2.0 / 3))
    p = fma(p, q, np.float32(2.0))
    return fma(p, s, maximum(x, np.float32(0.0)))


# ---- sums ---------------------------------------------------------------------------------------------------------


@njit
def drain(lanes, count, total, start):
    """Add a chunk's sums to the totals: float32 within a chunk, float64 across them, so that length costs no digits."""
    for i in range(count):
        total[start + i] += lanes[i]
        lanes[i] = np.float32(0)
