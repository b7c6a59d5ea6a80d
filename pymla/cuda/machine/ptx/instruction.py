"""How a function becomes an instruction: PTX or LLVM instructions for the compiler, its own body in the simulator.

Here are also the checked 32-bit words and float32 that the instructions' bodies compute with in the simulator.
"""

import inspect

import numpy as np
from llvmlite import ir
from numba.cuda import types

from pymla.cuda.runtime.driver import SIMULATED

if not SIMULATED:
    from numba.cuda.extending import intrinsic

#: Threads that execute together.
WARP = 32


#: Types of registers, and their names in LLVM and in inline PTX.
I32, I64, F32 = types.int32, types.int64, types.float32
LLVM = {I32: ir.IntType(32), I64: ir.IntType(64), F32: ir.FloatType(), types.void: ir.VoidType()}
CONSTRAINT = {I32: "r", I64: "l", F32: "f"}


def words(count):
    """The type of several words."""
    return types.UniTuple(I32, count)


def floats(count):
    """The type of several float32."""
    return types.UniTuple(F32, count)


def instruction(result, *arguments, asm=None, emit=None, effects=""):
    """Mark a function as an instruction. In the simulator it stays a Python function.

    Parameters
    ----------
    result : Numba type
        A tuple for several registers.
    arguments : Numba types
    asm : str, optional
        PTX, with results and arguments as $0, $1, …
    emit : callable(builder, values), optional
        Instead of `asm`: writes LLVM instructions and returns their value, or a list for a tuple.
    effects : str
        Effects of `asm` besides its result. "lanes": it needs the other lanes, so that it must not come under another
        condition. "memory": the same, and memory is not read or written across it.
    """

    def decorate(function):
        if SIMULATED:
            return function
        write = emit or inline_ptx(result, arguments, asm, effects)

        def typer(typingctx, *_):
            def codegen(context, builder, signature, values):
                value = write(builder, values)
                if isinstance(result, types.BaseTuple):
                    return context.make_tuple(builder, result, value)
                return context.get_dummy_value() if result == types.void else value

            return result(*arguments), codegen

        return intrinsic_like(function, typer)

    return decorate


def intrinsic_like(function, typer):
    """An intrinsic with the name and the parameters of `function`."""
    parameters = list(inspect.signature(function).parameters.values())
    first = inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    typer.__signature__ = inspect.Signature([first, *parameters])
    typer.__name__, typer.__doc__ = function.__name__, function.__doc__
    return intrinsic(typer)


def inline_ptx(result, arguments, asm, effects):
    """The writer of a piece of inline PTX."""
    several = isinstance(result, types.BaseTuple)
    results = list(result) if several else [] if result == types.void else [result]
    kind = ir.LiteralStructType([LLVM[each] for each in results]) if several else LLVM[result]
    constraints = ["=" + CONSTRAINT[each] for each in results] + [CONSTRAINT[each] for each in arguments]
    if effects == "memory":
        constraints.append("~{memory}")
    attributes = ("nounwind", *(["convergent"] if effects else []), *(["readnone"] if effects != "memory" else []))

    def write(builder, values):
        form = ir.FunctionType(kind, [LLVM[each] for each in arguments])
        code = ir.InlineAsm(form, asm, ",".join(constraints), side_effect=effects == "memory")
        value = builder.call(code, values, attrs=attributes)
        return [builder.extract_value(value, i) for i in range(len(results))] if several else value

    return write


def word_of(value):
    """The low 32 bits of an integer as int32."""
    return ((int(value) & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def float32(value):
    """A float32, which it must be already: compiled kernels would compute in float64."""
    if type(value) is np.float32:
        return value
    if not isinstance(value, (np.float32, int)):
        raise TypeError(f"expected float32, got {type(value).__name__} {value}")
    return np.float32(value)


def unsigned_bytes(word):
    """The four bytes of a word, the lowest first."""
    return tuple((int(word) & 0xFFFFFFFF).to_bytes(4, "little"))


def signed_bytes(word):
    """The same from -128 to 127."""
    return tuple((byte ^ 0x80) - 0x80 for byte in unsigned_bytes(word))


def float32s(values):
    """Several numbers as float32."""
    return tuple(np.float32(value) for value in values)
