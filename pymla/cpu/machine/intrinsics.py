"""How a vector register becomes a Numba value, and an instruction a function that kernels call.

An operation is a Python function that emits LLVM IR: ``emit(builder, *values)``. `operation`, `elementwise` and
`reduction` make Numba intrinsics of such functions; the helpers below emit what many of them need.
"""

from inspect import Parameter, Signature

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from pymla.cpu.machine.isa import ISA, LANES


class Vector(types.Type):
    """The Numba type of a vector register: `count` elements of `element`."""

    def __init__(self, element, count):
        self.element = element
        self.count = count
        super().__init__(name=f"{element}x{count}")


I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
_ELEMENT = {"i8": I8, "i16": I16, "i32": I32, "f32": F32}


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir_type(fe_type))


def ir_type(vector):
    """The LLVM type of a register."""
    return ir.VectorType(_ELEMENT[vector.element], vector.count)


f32x8 = Vector("f32", 8)
i32x8 = Vector("i32", 8)
i16x16 = Vector("i16", 16)
i8x32 = Vector("i8", 32)
f32x16 = Vector("f32", 16)
f32x32 = Vector("f32", 32)
i32x16 = Vector("i32", 16)
i8x64 = Vector("i8", 64)
f32xL = Vector("f32", LANES)
i32xL = Vector("i32", LANES)
i8xL = Vector("i8", 4 * LANES)


def _intrinsic(typed, emit, arguments):
    """An intrinsic that takes so many arguments; Numba reads the number from the signature."""
    typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
    names = ["typingctx", *(f"argument_{i}" for i in range(arguments))]
    typed.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    return intrinsic(typed)


def operation(result, *arguments):
    """Make an intrinsic of fixed types from a function that emits its IR: ``emit(builder, *values)``."""

    def decorate(emit):
        def typed(typingctx, *_):
            def codegen(context, builder, signature, args):
                value = emit(builder, *args)
                return context.get_dummy_value() if result is types.void else value

            return result(*arguments), codegen

        return _intrinsic(typed, emit, len(arguments))

    return decorate


def elementwise(emit):
    """Make an intrinsic whose result has the type of its first argument."""

    def typed(typingctx, first, *rest):
        return first(first, *rest), lambda context, builder, signature, args: emit(builder, *args)

    return _intrinsic(typed, emit, emit.__code__.co_argcount - 1)


def reduction(emit):
    """Make an intrinsic from float lanes to one number."""

    def typed(typingctx, x):
        return types.float32(x), lambda context, builder, signature, args: emit(builder, *args)

    return _intrinsic(typed, emit, 1)


def declare(builder, name, result, arguments):
    """An LLVM intrinsic of that name in the module that is built."""
    module = builder.module
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


def constant(ir_vector, value):
    """A constant register: one number in all lanes."""
    return ir.Constant(ir_vector, [value] * ir_vector.count)


def splat(builder, value, count):
    """One value in so many lanes."""
    vector = ir.VectorType(value.type, count)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, count), [0] * count))


def shuffle(builder, a, b, lanes):
    """Lanes of two registers, by number; those of `b` follow those of `a`."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def read(builder, address, ir_type):
    """A value from memory, whatever its alignment."""
    value = builder.load(builder.inttoptr(address, ir_type.as_pointer()))
    value.align = 1
    return value


def write(builder, address, value):
    """A value to memory."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def loader(vector):
    """An operation that reads a register from an address."""
    return operation(vector, types.int64)(lambda builder, address: read(builder, address, ir_type(vector)))


def storer(kind):
    """An operation that writes a register or number to an address."""
    return operation(types.void, types.int64, kind)(write)


def reduced(builder, value, combine):
    """Halves combined with halves, so that the order does not depend on compiler flags."""
    count = value.type.count
    while count > 1:
        count //= 2
        low = shuffle(builder, value, value, list(range(count)))
        high = shuffle(builder, value, value, list(range(count, 2 * count)))
        value = combine(low, high)
    return builder.extract_element(value, ir.Constant(I32, 0))


def dpbusd(builder, acc, unsigned, signed):
    """``acc[i] += Σ unsigned[4i+j] * signed[4i+j]`` by the VNNI instruction."""
    name = f"llvm.x86.avx512.vpdpbusd.{32 * acc.type.count}"
    args = [acc, builder.bitcast(unsigned, acc.type), builder.bitcast(signed, acc.type)]
    return builder.call(declare(builder, name, acc.type, [acc.type] * 3), args)


def in_order(builder, value):
    """The same value, computed here. LLVM would otherwise sum in another order, and keep so many loaded values for it
    that it runs out of registers (a third of the speed)."""
    if ISA == "portable":
        return value
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=v,0", [value], side_effect=True)
