"""How a vector register becomes a Numba value, and an instruction a function that kernels call.

An operation is defined twice: by a NumPy function, which says what it does and can be called from Python, and by a
function that emits its LLVM IR, ``emit(builder, *values)``. `operation`, `elementwise` and `reduction` bring the
two together. The helpers below emit the IR that many operations need.
"""

import functools
import inspect
from inspect import Parameter, Signature

from llvmlite import ir
from numba import types
from numba.core.extending import _Intrinsic
from numba.extending import models, register_model

from pymla.cpu.runtime.isa import ISA, LANES


class Vector(types.Type):
    """The Numba type of a vector register: `count` elements of `element`."""

    def __init__(self, element, count):
        self.element = element
        self.count = count
        super().__init__(name=f"{element}x{count}")


I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
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


class Operation(_Intrinsic):
    """An operation on registers that kernels call, made by `operation`, `elementwise` or `reduction`.

    Numba puts the instructions that `emit` writes where a kernel calls it. Called from Python, the NumPy function runs
    that was decorated, on arrays and addresses: so whole kernels can run as Python, and tests compare the two.

    Attributes
    ----------
    py_func : function
        The NumPy function; it has the operation's docstring and arguments.
    signature : (Numba type, tuple) or None
        Types of the result and of the arguments where they are always the same.
    """

    def __init__(self, py_func, typed, signature=None, prefer_literal=False):
        names = ["typingctx", *inspect.signature(py_func).parameters]
        # Numba reads the number of arguments here.
        typed.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
        super().__init__(py_func.__name__, typed, prefer_literal)
        functools.update_wrapper(self, py_func)
        self.__signature__ = inspect.signature(py_func)
        self.py_func, self.signature = py_func, signature
        self._register()
        OPERATIONS[f"{self.__module__}.{self.__name__}"] = self

    def __call__(self, *arguments):
        return self.py_func(*arguments)

    def __repr__(self):
        return f"<operation {self.__module__}.{self.__name__}{self.__signature__}>"

    def __get__(self, instance, owner=None):
        # `help` takes objects with this method for routines, and shows their signature and docstring.
        return self


#: Every operation by the name of its module and its own.
OPERATIONS = {}


#: Stands for the type of an argument that must be a literal, which the instructions contain.
LITERAL = object()


def operation(result, *arguments, emit):
    """Make an `Operation` of fixed types from a NumPy function.

    Parameters
    ----------
    result : Numba type
    *arguments : Numba types or `LITERAL`
    emit : callable(builder, *values)
        Emits the LLVM IR of the operation and returns its result: a value, several for a tuple, or None for void.
        Literals are integers.
    """
    is_literal = [each is LITERAL for each in arguments]

    def typed(typingctx, *given):
        kinds = [own if literal else fixed for own, fixed, literal in zip(given, arguments, is_literal, strict=True)]

        def codegen(context, builder, signature, args):
            values = [
                kind.literal_value if literal else arg
                for kind, arg, literal in zip(kinds, args, is_literal, strict=True)
            ]
            return _returned(context, builder, result, emit(builder, *values))

        return result(*kinds), codegen

    return lambda py_func: Operation(py_func, typed, (result, arguments), prefer_literal=any(is_literal))


def elementwise(emit):
    """Make an `Operation` whose result has the type of its first argument; `emit` as for `operation`."""

    def typed(typingctx, first, *rest):
        return first(first, *rest), lambda context, builder, signature, args: emit(builder, *args)

    return lambda py_func: Operation(py_func, typed)


def reduction(emit):
    """Make an `Operation` from float lanes to one number; `emit` as for `operation`."""

    def typed(typingctx, x):
        return types.float32(x), lambda context, builder, signature, args: emit(builder, *args)

    return lambda py_func: Operation(py_func, typed)


def _returned(context, builder, kind, value):
    """What an operation emitted as the value that Numba expects of a type."""
    if kind is types.void:
        return context.get_dummy_value()
    return context.make_tuple(builder, kind, value) if isinstance(kind, types.BaseTuple) else value


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
    """Read a value from memory, whatever its alignment."""
    value = builder.load(builder.inttoptr(address, ir_type.as_pointer()))
    value.align = 1
    return value


def write(builder, address, value):
    """Write a value to memory, whatever its alignment."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def reduced(builder, value, combine):
    """All lanes combined to one: the upper half with the lower half, again and again, so that the order of the sums
    does not depend on compiler flags."""
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
