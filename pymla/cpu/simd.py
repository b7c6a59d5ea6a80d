"""Vector registers as Numba values, so that kernels are plain Python over them.

``f32x8`` is eight float32, ``i8x32`` thirty-two int8, and so on. A kernel keeps them in local variables; LLVM keeps
those in registers. Two levels behind one interface: AVX2, and portable vector code that LLVM lowers on any processor.
Both give the same integers. ``PYMLA_ISA=portable`` forces the second.

Addresses are int64 (``array.ctypes.data``). Loads and stores need no alignment.
"""

import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from pymla.errors import PymlaError


class Vector(types.Type):
    """The Numba type of a vector register: `count` elements of `element`."""

    def __init__(self, element, count):
        self.element = element
        self.count = count
        super().__init__(name=f"{element}x{count}")


_ELEMENT = {"i8": ir.IntType(8), "i16": ir.IntType(16), "i32": ir.IntType(32), "f32": ir.FloatType()}


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _ir_type(fe_type))


def _ir_type(vector):
    return ir.VectorType(_ELEMENT[vector.element], vector.count)


f32x8 = Vector("f32", 8)
i32x8 = Vector("i32", 8)
i8x32 = Vector("i8", 32)
i8x16 = Vector("i8", 16)

_I16, _I32 = ir.IntType(16), ir.IntType(32)


def _isa():
    wanted = os.environ.get("PYMLA_ISA", "")
    levels = ["avx2", "portable"] if llvm.get_host_cpu_features().get("avx2") else ["portable"]
    if wanted and wanted not in levels:
        raise PymlaError(f"PYMLA_ISA={wanted}: this processor runs {' and '.join(levels)}")
    return wanted or levels[0]


#: The level in use.
ISA = _isa()


def _function(builder, name, result, arguments):
    module = builder.module
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


def _constant(ir_vector, value):
    return ir.Constant(ir_vector, [value] * ir_vector.count)


def _splat(builder, value, count):
    vector = ir.VectorType(value.type, count)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, count), [0] * count))


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _load(vector):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            value = builder.load(builder.inttoptr(args[0], _ir_type(vector).as_pointer()))
            value.align = 1
            return value

        return vector(types.int64), codegen

    return load


load_f32x8 = _load(f32x8)
load_i8x32 = _load(i8x32)
load_i8x16 = _load(i8x16)


@intrinsic
def store_i8x32(typingctx, address, value):
    """Thirty-two int8 to memory."""

    def codegen(context, builder, signature, args):
        stored = builder.store(args[1], builder.inttoptr(args[0], _ir_type(i8x32).as_pointer()))
        stored.align = 1
        return context.get_dummy_value()

    return types.void(types.int64, i8x32), codegen


@intrinsic
def store_f32x8(typingctx, address, value):
    """Eight float32 to memory."""

    def codegen(context, builder, signature, args):
        stored = builder.store(args[1], builder.inttoptr(args[0], _ir_type(f32x8).as_pointer()))
        stored.align = 1
        return context.get_dummy_value()

    return types.void(types.int64, f32x8), codegen


def _load_scalar(ir_scalar, numba_type, convert=None):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            value = builder.load(builder.inttoptr(args[0], ir_scalar.as_pointer()))
            value.align = 1
            return convert(builder, value) if convert else value

        return numba_type(types.int64), codegen

    return load


load_f32 = _load_scalar(ir.FloatType(), types.float32)
load_i8 = _load_scalar(ir.IntType(8), types.int8)
load_i8_as_f32 = _load_scalar(ir.IntType(8), types.float32, lambda b, x: b.sitofp(x, ir.FloatType()))
load_f16 = _load_scalar(ir.HalfType(), types.float32, lambda b, x: b.fpext(x, ir.FloatType()))
load_bf16 = _load_scalar(
    _I16, types.float32, lambda b, x: b.bitcast(b.shl(b.zext(x, _I32), ir.Constant(_I32, 16)), ir.FloatType())
)


def _store_scalar(ir_scalar, numba_type):
    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, signature, args):
            builder.store(args[1], builder.inttoptr(args[0], ir_scalar.as_pointer())).align = 1
            return context.get_dummy_value()

        return types.void(types.int64, numba_type), codegen

    return store


store_f32 = _store_scalar(ir.FloatType(), types.float32)
store_i8 = _store_scalar(ir.IntType(8), types.int8)


@intrinsic
def store_f16(typingctx, address, value):
    """A float32 as IEEE half to memory, rounded to nearest even."""

    def codegen(context, builder, signature, args):
        half = builder.fptrunc(args[1], ir.HalfType())
        builder.store(half, builder.inttoptr(args[0], ir.HalfType().as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def store_bf16(typingctx, address, value):
    """A float32 as bfloat16 to memory, rounded to nearest even. NaN stays NaN."""

    def codegen(context, builder, signature, args):
        bits = builder.bitcast(args[1], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
        nan = builder.fcmp_unordered("uno", args[1], args[1])
        chosen = builder.select(nan, builder.or_(bits, ir.Constant(_I32, 0x400000)), rounded)
        top = builder.trunc(builder.lshr(chosen, ir.Constant(_I32, 16)), _I16)
        builder.store(top, builder.inttoptr(args[0], _I16.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def load_f16x8(typingctx, address):
    """Eight IEEE halves from memory as float32."""

    def codegen(context, builder, signature, args):
        halves = builder.load(builder.inttoptr(args[0], ir.VectorType(ir.HalfType(), 8).as_pointer()))
        halves.align = 1
        return builder.fpext(halves, _ir_type(f32x8))

    return f32x8(types.int64), codegen


@intrinsic
def load_bf16x8(typingctx, address):
    """Eight bfloat16 from memory as float32."""

    def codegen(context, builder, signature, args):
        bits = builder.load(builder.inttoptr(args[0], ir.VectorType(_I16, 8).as_pointer()))
        bits.align = 1
        wide = ir.VectorType(_I32, 8)
        return builder.bitcast(builder.shl(builder.zext(bits, wide), _constant(wide, 16)), _ir_type(f32x8))

    return f32x8(types.int64), codegen


@intrinsic
def load_i8_as_f32x8(typingctx, address):
    """Eight int8 from memory as float32."""

    def codegen(context, builder, signature, args):
        codes = builder.load(builder.inttoptr(args[0], ir.VectorType(ir.IntType(8), 8).as_pointer()))
        codes.align = 1
        return builder.sitofp(codes, _ir_type(f32x8))

    return f32x8(types.int64), codegen


@intrinsic
def splat_f32(typingctx, value):
    """A float32 in all eight lanes."""
    return f32x8(types.float32), lambda context, builder, signature, args: _splat(builder, args[0], 8)


@intrinsic
def splat_halves(typingctx, low, high):
    """One float32 in the first four lanes, another in the last four."""

    def codegen(context, builder, signature, args):
        low, high = (_splat(builder, value, 4) for value in args)
        return _shuffle(builder, low, high, list(range(8)))

    return f32x8(types.float32, types.float32), codegen


@intrinsic
def zero_i32x8(typingctx):
    return i32x8(), lambda context, builder, signature, args: _constant(_ir_type(i32x8), 0)


@intrinsic
def low_nibbles(typingctx, x):
    """The low four bits of every byte."""
    return i8x16(i8x16), lambda context, builder, signature, args: builder.and_(args[0], _constant(args[0].type, 15))


@intrinsic
def high_nibbles(typingctx, x):
    """The high four bits of every byte, as numbers from 0 to 15."""
    return i8x16(i8x16), lambda context, builder, signature, args: builder.lshr(args[0], _constant(args[0].type, 4))


@intrinsic
def bits_2(typingctx, x, shift):
    """Two bits of every byte, from bit `shift` on, moved to bits 4 and 5."""

    def codegen(context, builder, signature, args):
        shift = _splat(builder, builder.trunc(args[1], ir.IntType(8)), 16)
        two = builder.and_(builder.lshr(args[0], shift), _constant(args[0].type, 3))
        return builder.shl(two, _constant(args[0].type, 4))

    return i8x16(i8x16, types.int64), codegen


@intrinsic
def bit_or(typingctx, a, b):
    return i8x16(i8x16, i8x16), lambda context, builder, signature, args: builder.or_(*args)


@intrinsic
def subtract_i8(typingctx, x, value):
    """``x - value`` in every byte, wrapping."""

    def codegen(context, builder, signature, args):
        return builder.sub(args[0], _splat(builder, builder.trunc(args[1], ir.IntType(8)), 32))

    return i8x32(i8x32, types.int64), codegen


@intrinsic
def join_i8(typingctx, low, high):
    """Two vectors of sixteen bytes behind each other."""

    def codegen(context, builder, signature, args):
        return _shuffle(builder, args[0], args[1], list(range(32)))

    return i8x32(i8x16, i8x16), codegen


def _portable_dot(builder, acc, a, b):
    wide = ir.VectorType(_I16, 32)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    product = builder.sext(product, ir.VectorType(_I32, 32))
    for lane in range(4):
        acc = builder.add(acc, _shuffle(builder, product, product, list(range(lane, 32, 4))))
    return acc


@intrinsic
def dot_i8(typingctx, acc, a, b):
    """``acc[i] += a[4i] b[4i] + … + a[4i+3] b[4i+3]`` on signed bytes, exact.

    `b` must lie between -127 and 127 (`quantise_activations` sees to it); `a` may also be -128.
    """

    def avx2(builder, acc, a, b):
        # |a| as unsigned bytes times b with a's sign: pairs sum up to 2 * 128 * 127, which an int16 holds.
        bytes_, words = ir.VectorType(ir.IntType(8), 32), ir.VectorType(_I16, 16)
        sign = _function(builder, "llvm.x86.avx2.psign.b", bytes_, [bytes_, bytes_])
        multiply = _function(builder, "llvm.x86.avx2.pmadd.ub.sw", words, [bytes_, bytes_])
        add_pairs = _function(builder, "llvm.x86.avx2.pmadd.wd", _ir_type(i32x8), [words, words])
        pairs = builder.call(multiply, [builder.call(sign, [a, a]), builder.call(sign, [b, a])])
        return builder.add(acc, builder.call(add_pairs, [pairs, _constant(words, 1)]))

    emit = avx2 if ISA == "avx2" else _portable_dot
    return i32x8(i32x8, i8x32, i8x32), lambda context, builder, signature, args: emit(builder, *args)


@intrinsic
def dot_u7(typingctx, acc, a, b):
    """`dot_i8` for `a` from 0 to 127: sums of two products fit an int16 as they are."""

    def avx2(builder, acc, a, b):
        bytes_, words = ir.VectorType(ir.IntType(8), 32), ir.VectorType(_I16, 16)
        multiply = _function(builder, "llvm.x86.avx2.pmadd.ub.sw", words, [bytes_, bytes_])
        add_pairs = _function(builder, "llvm.x86.avx2.pmadd.wd", _ir_type(i32x8), [words, words])
        return builder.add(acc, builder.call(add_pairs, [builder.call(multiply, [a, b]), _constant(words, 1)]))

    emit = avx2 if ISA == "avx2" else _portable_dot
    return i32x8(i32x8, i8x32, i8x32), lambda context, builder, signature, args: emit(builder, *args)


@intrinsic
def to_f32(typingctx, x):
    """int32 as float32."""
    return f32x8(i32x8), lambda context, builder, signature, args: builder.sitofp(args[0], _ir_type(f32x8))


@intrinsic
def fma(typingctx, x, y, z):
    """``x * y + z``."""

    def codegen(context, builder, signature, args):
        vector = _ir_type(f32x8)
        return builder.call(_function(builder, "llvm.fma.v8f32", vector, [vector] * 3), args)

    return f32x8(f32x8, f32x8, f32x8), codegen


@intrinsic
def mul(typingctx, x, y):
    return f32x8(f32x8, f32x8), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def add(typingctx, x, y):
    return f32x8(f32x8, f32x8), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def total(typingctx, x):
    """The sum of all lanes."""

    def codegen(context, builder, signature, args):
        # Halves are added to halves, which is short in instructions and does not depend on compiler flags.
        value = args[0]
        for count in (4, 2, 1):
            low = _shuffle(builder, value, value, list(range(count)))
            high = _shuffle(builder, value, value, list(range(count, 2 * count)))
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(_I32, 0))

    return types.float32(f32x8), codegen
