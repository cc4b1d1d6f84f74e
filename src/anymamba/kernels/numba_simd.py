"""A 16-lane float32 vector type for Numba kernels.

Why: a selective scan is one exponential and three multiply-adds per state element, so it runs at the speed of
the vector units or not at all. LLVM's loop vectoriser needs proofs (no aliasing, unit strides) that NumPy arrays
cannot give; a vector *type* needs none. `<16 x float>` is one AVX-512 register, two AVX2 or four NEON registers:
LLVM splits it to whatever the machine has, so the same source is fast on every CPU.

Storage types: float32 arrays hold float32, int16 arrays hold bfloat16 bits, uint16 arrays hold float16 bits; of
quantised weights int8 arrays hold 8-bit integers, uint8 arrays two 4-bit ones a byte. Arithmetic is always float32.
"""

import operator

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from anymamba.kernels import LANES

F32, I32, I16, I8 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)
VF, VI, VH, VB = (ir.VectorType(t, LANES) for t in (F32, I32, I16, ir.IntType(1)))


class VecType(types.Type):
    """Numba type of 16 float32 lanes."""

    def __init__(self):
        super().__init__(name="f32x16")


vec = VecType()


@register_model(VecType)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, VF)


def constant(element_type, value):
    return ir.Constant(ir.VectorType(element_type, LANES), [value] * LANES)


def _splat(builder, scalar):
    one = builder.insert_element(ir.Constant(VF, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(VF, ir.Undefined), constant(I32, 0))


def _as_vec(context, builder, value, ty):
    if isinstance(ty, VecType):
        return value
    return _splat(builder, context.cast(builder, value, ty, types.float32))


def call_llvm(builder, name, args, ret=VF):
    fnty = ir.FunctionType(ret, [a.type for a in args])
    fn = builder.module.globals.get(name) or ir.Function(builder.module, fnty, name)
    return builder.call(fn, args)


# ---- arithmetic ------------------------------------------------------------------------------------------------


def _binary(op, instruction):
    @intrinsic
    def impl(typingctx, a, b):
        def codegen(context, builder, sig, args):
            x, y = (_as_vec(context, builder, v, t) for v, t in zip(args, sig.args, strict=True))
            return getattr(builder, instruction)(x, y)

        return vec(a, b), codegen

    @overload(op, inline="always")
    def _(a, b):
        if isinstance(a, VecType) or isinstance(b, VecType):
            return lambda a, b: impl(a, b)


for _op, _instruction in [
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
]:
    _binary(_op, _instruction)


@intrinsic
def fma(typingctx, a, b, c):
    """a·b + c, rounded once; scalars are broadcast."""

    def codegen(context, builder, sig, args):
        return call_llvm(
            builder,
            f"llvm.fma.v{LANES}f32",
            [_as_vec(context, builder, v, t) for v, t in zip(args, sig.args, strict=True)],
        )

    return vec(a, b, c), codegen


@intrinsic
def splat(typingctx, a):
    """The same scalar in every lane."""
    return vec(a), lambda context, builder, sig, args: _as_vec(context, builder, args[0], sig.args[0])


def _select(predicate):
    @intrinsic
    def impl(typingctx, a, b):
        def codegen(context, builder, sig, args):
            x, y = (_as_vec(context, builder, v, t) for v, t in zip(args, sig.args, strict=True))
            # `y < x ? y : x` is false for NaN in x, so a NaN passes through: a bad input stays visible.
            return builder.select(builder.fcmp_ordered(predicate, y, x), y, x)

        return vec(a, b), codegen

    return impl


minimum, maximum = _select("<"), _select(">")


@intrinsic
def where_less(typingctx, a, b, yes, no):
    """yes in the lanes where a < b, else no; a NaN is not less."""

    def codegen(context, builder, sig, args):
        a, b, yes, no = (_as_vec(context, builder, v, t) for v, t in zip(args, sig.args, strict=True))
        return builder.select(builder.fcmp_ordered("<", a, b), yes, no)

    return vec(a, b, yes, no), codegen


@intrinsic
def absolute(typingctx, a):
    return vec(a), lambda context, builder, sig, args: call_llvm(builder, f"llvm.fabs.v{LANES}f32", args)


@intrinsic
def hsum(typingctx, a):
    """Sum of the lanes, pairwise and therefore in one fixed order."""

    def codegen(context, builder, sig, args):
        v = args[0]
        width = LANES
        while width > 1:
            width //= 2
            halves = [
                builder.shuffle_vector(v, v, ir.Constant(ir.VectorType(I32, width), [first + k for k in range(width)]))
                for first in (0, width)
            ]
            v = builder.fadd(*halves)
        return builder.extract_element(v, ir.Constant(I32, 0))

    return types.float32(a), codegen


@intrinsic
def add_exponent(typingctx, p, t):
    """p · 2^k for the k in the low bits of a magic-number sum t, by integer addition to p's exponent field.

    A multiplication would do too, but the multipliers are what a scan waits for; integer units are idle.
    """

    def codegen(context, builder, sig, args):
        mantissa, bits = (builder.bitcast(v, VI) for v in args)
        return builder.bitcast(builder.add(mantissa, builder.shl(bits, constant(I32, 23))), VF)

    return vec(p, t), codegen


# ---- memory ----------------------------------------------------------------------------------------------------


def _lane_mask(builder, count):
    lanes = ir.Constant(VI, list(range(LANES)))
    n = builder.insert_element(ir.Constant(VI, ir.Undefined), count, ir.Constant(I32, 0))
    n = builder.shuffle_vector(n, ir.Constant(VI, ir.Undefined), constant(I32, 0))
    return builder.icmp_signed("<", lanes, n)


def _pointer(context, builder, ty, value, index):
    """Address of an element of a typed pointer or of a 1-d array."""
    if isinstance(ty, types.Array):
        value = context.make_array(ty)(context, builder, value).data
    return builder.gep(value, [index], source_etype=_ELEMENT[ty.dtype])


_ELEMENT = {types.float32: F32, types.int16: I16, types.uint16: I16, types.int8: I8, types.uint8: I8}


def _widen(builder, v, dtype):
    if dtype == types.float32:
        return v
    if dtype == types.int16:  # bfloat16 is the upper half of a float32
        return builder.bitcast(builder.shl(builder.zext(v, VI), constant(I32, 16)), VF)
    return builder.fpext(builder.bitcast(v, ir.VectorType(ir.HalfType(), LANES)), VF)


def _narrow(builder, v, dtype):
    if dtype == types.float32:
        return v
    if dtype == types.uint16:
        return builder.bitcast(builder.fptrunc(v, ir.VectorType(ir.HalfType(), LANES)), VH)
    bits = builder.bitcast(v, VI)  # round to nearest even; a NaN keeps its payload's top bits, and is made quiet
    odd = builder.and_(builder.lshr(bits, constant(I32, 16)), constant(I32, 1))
    rounded = builder.add(builder.add(bits, odd), constant(I32, 0x7FFF))
    quiet = builder.or_(bits, constant(I32, 0x400000))
    is_nan = builder.fcmp_unordered("uno", v, v)
    return builder.trunc(builder.lshr(builder.select(is_nan, quiet, rounded), constant(I32, 16)), VH)


@intrinsic
def load(typingctx, arr, index, count):
    """16 elements of a 1-d array from `index` on; lanes from `count` on read as 0 and touch no memory."""
    element = _ELEMENT[arr.dtype]
    vt = ir.VectorType(element, LANES)

    def codegen(context, builder, sig, args):
        index_, count_ = (context.cast(builder, args[k], sig.args[k], types.int64) for k in (1, 2))
        p = builder.bitcast(_pointer(context, builder, sig.args[0], args[0], index_), vt.as_pointer())
        full = builder.icmp_signed(">=", count_, ir.Constant(ir.IntType(64), LANES))
        out = builder.alloca(vt)
        with builder.if_else(full, likely=True) as (then, other):
            with then:
                ins = builder.load(p)
                ins.align = 2
                builder.store(ins, out)
            with other:
                zero = ir.Constant(vt, [0.0 if element is F32 else 0] * LANES)
                mask = _lane_mask(builder, builder.trunc(count_, I32))
                name = f"llvm.masked.load.v{LANES}{'f32' if element is F32 else 'i16'}.p0"
                builder.store(call_llvm(builder, name, [p, ir.Constant(I32, 2), mask, zero], vt), out)
        return _widen(builder, builder.load(out), sig.args[0].dtype)

    return vec(arr, index, count), codegen


def _four_bits(builder, wide, mask, power):
    """The masked bits of each lane, a number from -8 to 7, as bits of the mantissa of 2^power + number + 8, where their
    unit is 1, less that constant: with AVX-512 two instructions, where shifts and a conversion are two or three.
    """
    bits = (power + 127 << 23) + (mask & 136)  # 136: the two signs, which xor turns into + 8
    mantissa = builder.xor(builder.and_(wide, constant(I32, mask)), constant(I32, bits))
    return builder.fsub(builder.bitcast(mantissa, VF), constant(F32, float(2**power + 8)))


@intrinsic
def load_integers(typingctx, arr, index):
    """32 weights as two vectors: 32 bytes of an int8 array from `index` on, or 16 of a uint8 array from index / 2 on,
    whose low halves are the first vector and whose high halves the second, both in two's complement."""
    packed = arr.dtype == types.uint8

    def codegen(context, builder, sig, args):
        index_ = context.cast(builder, args[1], sig.args[1], types.int64)
        at = builder.ashr(index_, ir.Constant(index_.type, 1)) if packed else index_
        vt = ir.VectorType(I8, LANES if packed else 2 * LANES)
        ins = builder.load(builder.bitcast(_pointer(context, builder, sig.args[0], args[0], at), vt.as_pointer()))
        ins.align = 1
        if packed:
            wide = builder.zext(ins, VI)
            parts = [_four_bits(builder, wide, *of_half) for of_half in ((15, 23), (240, 19))]
        else:
            halves = (ir.Constant(VI, list(range(first, first + LANES))) for first in (0, LANES))
            parts = [builder.sitofp(builder.sext(builder.shuffle_vector(ins, ins, v), VI), VF) for v in halves]
        return context.make_tuple(builder, sig.return_type, parts)

    return types.UniTuple(vec, 2)(arr, index), codegen


@intrinsic
def prefetch(typingctx, arr, index, ahead):
    """Ask for the memory `ahead` bytes after an element: the processor's own prefetcher stops at pages of 4 KB."""

    def codegen(context, builder, sig, args):
        index_, ahead_ = (context.cast(builder, args[k], sig.args[k], types.int64) for k in (1, 2))
        p = builder.bitcast(_pointer(context, builder, sig.args[0], args[0], index_), I8.as_pointer())
        read, keep, data = (ir.Constant(I32, v) for v in (0, 3, 1))
        p = builder.gep(p, [ahead_], source_etype=I8)
        call_llvm(builder, "llvm.prefetch.p0", [p, read, keep, data], ir.VoidType())
        return context.get_dummy_value()

    return types.void(arr, index, ahead), codegen


@intrinsic
def store(typingctx, arr, index, value, count):
    """Write the first `count` lanes to a 1-d array from `index` on, rounded to nearest even for 16-bit storage."""
    element = _ELEMENT[arr.dtype]
    vt = ir.VectorType(element, LANES)

    def codegen(context, builder, sig, args):
        index_, count_ = (context.cast(builder, args[k], sig.args[k], types.int64) for k in (1, 3))
        p = builder.bitcast(_pointer(context, builder, sig.args[0], args[0], index_), vt.as_pointer())
        v = _narrow(builder, args[2], sig.args[0].dtype)
        full = builder.icmp_signed(">=", count_, ir.Constant(ir.IntType(64), LANES))
        with builder.if_else(full, likely=True) as (then, other):
            with then:
                ins = builder.store(v, p)
                ins.align = 2
            with other:
                mask = _lane_mask(builder, builder.trunc(count_, I32))
                name = f"llvm.masked.store.v{LANES}{'f32' if element is F32 else 'i16'}.p0"
                call_llvm(builder, name, [v, p, ir.Constant(I32, 2), mask], ir.VoidType())
        return context.get_dummy_value()

    return types.void(arr, index, value, count), codegen


@intrinsic
def keep_apart(typingctx):
    """Keep LLVM from inlining the function that calls this. An inner loop in a function of its own has the
    registers to itself; inlined into a large one, its constants are re-read from memory at every step (2x slower).
    """

    def codegen(context, builder, sig, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen
