"""What the hardware has instructions for, as functions that kernels call.

Each function is written once: the decorator names the instruction that a compiled kernel executes, and the body is what
it does in the simulator, lane by lane and with the hardware's layout of fragments. Everything runs from compute
capability 8.0 on.

A *word* is 32 bits in an int32: four bytes, two halves or an integer. Addresses are int64, in bytes, and a multiple of
the size that is accessed. Numba computes ``word >> 4`` and the like in int64; functions take the low 32 bits of such an
argument. Functions that take or give float32 need float32: a Python literal makes an expression float64, so that
constants are written ``np.float32(0.5)``.

Functions of a warp (`shfl_xor` to `ldmatrix_x4`) must be reached by all 32 lanes together.
"""

import inspect
import struct

import numpy as np
from llvmlite import ir
from numba.cuda import types

from pymla.cuda.runtime.driver import SIMULATED
from pymla.cuda.runtime.jit import device

if SIMULATED:
    from pymla.cuda.machine import simulator
else:
    from numba.cuda.extending import intrinsic

#: Threads that execute together.
WARP = 32

I32, I64, F32 = types.int32, types.int64, types.float32
_LLVM = {I32: ir.IntType(32), I64: ir.IntType(64), F32: ir.FloatType(), types.void: ir.VoidType()}
_CONSTRAINT = {I32: "r", I64: "l", F32: "f"}


def _words(count):
    return types.UniTuple(I32, count)


def _floats(count):
    return types.UniTuple(F32, count)


def instruction(result, *arguments, asm=None, emit=None, effects=""):
    """Mark a function as an instruction. In the simulator it stays what it is.

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
        What `asm` does besides computing its result from its arguments. "lanes": it needs the other lanes, so that it
        must not come under another condition. "memory": the same, and memory is not read or written across it.
    """

    def decorate(function):
        if SIMULATED:
            return function
        write = emit or _inline(result, arguments, asm, effects)

        def typer(typingctx, *_):
            def codegen(context, builder, signature, values):
                value = write(builder, values)
                if isinstance(result, types.BaseTuple):
                    return context.make_tuple(builder, result, value)
                return context.get_dummy_value() if result == types.void else value

            return result(*arguments), codegen

        return _intrinsic(function, typer)

    return decorate


def _intrinsic(function, typer):
    """An intrinsic with the name and the parameters of `function`."""
    parameters = list(inspect.signature(function).parameters.values())
    first = inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    typer.__signature__ = inspect.Signature([first, *parameters])
    typer.__name__, typer.__doc__ = function.__name__, function.__doc__
    return intrinsic(typer)


def _inline(result, arguments, asm, effects):
    """The writer of a piece of inline PTX."""
    several = isinstance(result, types.BaseTuple)
    results = list(result) if several else [] if result == types.void else [result]
    kind = ir.LiteralStructType([_LLVM[each] for each in results]) if several else _LLVM[result]
    constraints = ["=" + _CONSTRAINT[each] for each in results] + [_CONSTRAINT[each] for each in arguments]
    if effects == "memory":
        constraints.append("~{memory}")
    attributes = ("nounwind", *(["convergent"] if effects else []), *(["readnone"] if effects != "memory" else []))

    def write(builder, values):
        form = ir.FunctionType(kind, [_LLVM[each] for each in arguments])
        code = ir.InlineAsm(form, asm, ",".join(constraints), side_effect=effects == "memory")
        value = builder.call(code, values, attrs=attributes)
        return [builder.extract_value(value, i) for i in range(len(results))] if several else value

    return write


# Memory by address.

_GLOBAL, _SHARED = 1, 3


def _pointer(builder, address, item, space):
    if address.type.width < 64:
        address = builder.zext(address, ir.IntType(64))
    return builder.inttoptr(address, item.as_pointer(space))


def _load(item, count=1, space=_GLOBAL, constant=False, then=None):
    """A writer of ``ld``: `count` items as one access; `then` converts an item."""

    def write(builder, values):
        kind = item if count == 1 else ir.VectorType(item, count)
        size = 2 if item == ir.HalfType() else (32 if item == ir.FloatType() else item.width) // 8
        value = builder.load(_pointer(builder, values[0], kind, space), align=count * size)
        if constant:
            value.set_metadata("invariant.load", builder.module.add_metadata([]))
        if count == 1:
            return then(builder, value) if then else value
        return [builder.extract_element(value, ir.Constant(_LLVM[I32], i)) for i in range(count)]

    return write


def _store(item, count=1, space=_GLOBAL, then=None):
    """A writer of ``st``; `then` converts the value to an item."""

    def write(builder, values):
        kind = item if count == 1 else ir.VectorType(item, count)
        size = (32 if item == ir.FloatType() else 16 if item == ir.HalfType() else item.width) // 8
        value = then(builder, values[1]) if then else values[1]
        if count > 1:
            value = ir.Constant(kind, ir.Undefined)
            for i, each in enumerate(values[1:]):
                value = builder.insert_element(value, each, ir.Constant(_LLVM[I32], i))
        builder.store(value, _pointer(builder, values[0], kind, space), align=count * size)

    return write


def _bits(width):
    return ir.IntType(width)


def _unsigned(builder, value):
    return builder.zext(value, _LLVM[I32])


def _signed(builder, value):
    return builder.sext(value, _LLVM[I32])


def _truncated(width):
    return lambda builder, value: builder.trunc(value, _bits(width))


def _from_half(builder, value):
    return builder.fpext(value, _LLVM[F32])


def _to_half(builder, value):
    return builder.fptrunc(value, ir.HalfType())


def _from_bfloat(builder, value):
    return builder.bitcast(builder.shl(_unsigned(builder, value), ir.Constant(_LLVM[I32], 16)), _LLVM[F32])


def _read(form, address):
    values = simulator.GLOBAL.read(form, address)
    return values if len(values) > 1 else values[0]


def _floats_of(values):
    return tuple(np.float32(value) for value in values)


@instruction(I32, I64, emit=_load(_bits(8), constant=True, then=_unsigned))
def load_u8(address):
    """A byte, 0 to 255. This and all of ``load_…`` read what no thread writes while the kernel runs
    (``ld.global.nc``)."""
    return _read("<B", address)


@instruction(I32, I64, emit=_load(_bits(8), constant=True, then=_signed))
def load_i8(address):
    """A signed byte."""
    return _read("<b", address)


@instruction(I32, I64, emit=_load(_bits(16), constant=True, then=_unsigned))
def load_u16(address):
    """A 16-bit integer, 0 to 65535."""
    return _read("<H", address)


@instruction(I32, I64, emit=_load(_bits(16), constant=True, then=_signed))
def load_i16(address):
    """A signed 16-bit integer."""
    return _read("<h", address)


@instruction(I32, I64, emit=_load(_bits(32), constant=True))
def load_u32(address):
    """A word."""
    return _read("<i", address)


@instruction(I64, I64, emit=_load(_bits(64), constant=True))
def load_u64(address):
    """64 bits as an int64."""
    return _read("<q", address)


@instruction(_words(2), I64, emit=_load(_bits(32), 2, constant=True))
def load_u32x2(address):
    """Two words."""
    return _read("<2i", address)


@instruction(_words(4), I64, emit=_load(_bits(32), 4, constant=True))
def load_u32x4(address):
    """Four words (``ld.global.nc.v4.u32``)."""
    return _read("<4i", address)


@instruction(F32, I64, emit=_load(ir.FloatType(), constant=True))
def load_f32(address):
    """A float32."""
    return np.float32(_read("<f", address))


@instruction(_floats(2), I64, emit=_load(ir.FloatType(), 2, constant=True))
def load_f32x2(address):
    """Two float32."""
    return _floats_of(_read("<2f", address))


@instruction(_floats(4), I64, emit=_load(ir.FloatType(), 4, constant=True))
def load_f32x4(address):
    """Four float32."""
    return _floats_of(_read("<4f", address))


@instruction(F32, I64, emit=_load(ir.HalfType(), constant=True, then=_from_half))
def load_f16(address):
    """A float16, as float32."""
    return f16_value(_read("<H", address))


@instruction(F32, I64, emit=_load(_bits(16), constant=True, then=_from_bfloat))
def load_bf16(address):
    """A bfloat16, as float32."""
    return bf16_value(_read("<H", address))


_STREAM = "ld.global.nc.L1::no_allocate"


@instruction(I32, I64, asm=f"{{ .reg .b16 h; {_STREAM}.b16 h, [$1]; cvt.u32.u16 $0, h; }}")
def stream_u16(address):
    """`load_u16` of what is read once, which leaves the first cache alone."""
    return load_u16(address)


@instruction(I32, I64, asm=f"{_STREAM}.b32 $0, [$1];")
def stream_u32(address):
    """`load_u32` of what is read once."""
    return load_u32(address)


@instruction(_words(2), I64, asm=f"{_STREAM}.v2.b32 {{$0, $1}}, [$2];")
def stream_u32x2(address):
    """`load_u32x2` of what is read once."""
    return load_u32x2(address)


@instruction(_words(4), I64, asm=f"{_STREAM}.v4.b32 {{$0, $1, $2, $3}}, [$4];")
def stream_u32x4(address):
    """`load_u32x4` of what is read once."""
    return load_u32x4(address)


@instruction(I32, I64, asm="ld.relaxed.gpu.global.b32 $0, [$1];", effects="memory")
def fresh_u32(address):
    """A word that other threads may have written while the kernel runs (``ld.relaxed.gpu``)."""
    return load_u32(address)


@instruction(F32, I64, asm="ld.relaxed.gpu.global.f32 $0, [$1];", effects="memory")
def fresh_f32(address):
    """A float32 that other threads may have written while the kernel runs."""
    return load_f32(address)


@instruction(_floats(4), I64, asm="ld.relaxed.gpu.global.v4.f32 {$0, $1, $2, $3}, [$4];", effects="memory")
def fresh_f32x4(address):
    """Four float32 that other threads may have written while the kernel runs."""
    return load_f32x4(address)


@instruction(types.void, I64, I32, emit=_store(_bits(8), then=_truncated(8)))
def store_u8(address, value):
    """The low byte of an integer."""
    simulator.GLOBAL.write("<B", address, int(value) & 0xFF)


@instruction(types.void, I64, I32, emit=_store(_bits(16), then=_truncated(16)))
def store_u16(address, value):
    """The low 16 bits of an integer."""
    simulator.GLOBAL.write("<H", address, int(value) & 0xFFFF)


@instruction(types.void, I64, I32, emit=_store(_bits(32)))
def store_u32(address, word):
    """A word."""
    simulator.GLOBAL.write("<i", address, _word(word))


@instruction(types.void, I64, I32, I32, emit=_store(_bits(32), 2))
def store_u32x2(address, w0, w1):
    """Two words."""
    simulator.GLOBAL.write("<2i", address, _word(w0), _word(w1))


@instruction(types.void, I64, I32, I32, I32, I32, emit=_store(_bits(32), 4))
def store_u32x4(address, w0, w1, w2, w3):
    """Four words."""
    simulator.GLOBAL.write("<4i", address, _word(w0), _word(w1), _word(w2), _word(w3))


@instruction(types.void, I64, F32, emit=_store(ir.FloatType()))
def store_f32(address, x):
    """A float32."""
    simulator.GLOBAL.write("<f", address, _float(x))


@instruction(types.void, I64, F32, F32, emit=_store(ir.FloatType(), 2))
def store_f32x2(address, x0, x1):
    """Two float32."""
    simulator.GLOBAL.write("<2f", address, _float(x0), _float(x1))


@instruction(types.void, I64, F32, F32, F32, F32, emit=_store(ir.FloatType(), 4))
def store_f32x4(address, x0, x1, x2, x3):
    """Four float32."""
    simulator.GLOBAL.write("<4f", address, _float(x0), _float(x1), _float(x2), _float(x3))


@instruction(types.void, I64, F32, emit=_store(ir.HalfType(), then=_to_half))
def store_f16(address, x):
    """A float32, rounded to float16."""
    simulator.GLOBAL.write("<H", address, f16_bits(x))


@instruction(
    types.void, I64, F32, asm="{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h; }", effects="memory"
)
def store_bf16(address, x):
    """A float32, rounded to bfloat16."""
    simulator.GLOBAL.write("<H", address, bf16_bits(x))


def _global_address_typer(typingctx, array):
    def codegen(context, builder, signature, values):
        return builder.ptrtoint(context.make_array(signature.args[0])(context, builder, values[0]).data, _LLVM[I64])

    return I64(array), codegen


def global_address(array):
    """The address of the first element of a kernel's argument."""
    return array.__array_interface__["data"][0]


if not SIMULATED:
    global_address = _intrinsic(global_address, _global_address_typer)


# Shared memory by address, for accesses that are wider than an array's elements.


def _shared_address_typer(typingctx, array):
    def codegen(context, builder, signature, values):
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        pointer = builder.addrspacecast(data, data.type.pointee.as_pointer(_SHARED))
        return builder.trunc(builder.ptrtoint(pointer, _LLVM[I64]), _LLVM[I32])

    return I32(array), codegen


def shared_address(array):
    """The address of a shared array's first element for `load_shared_…`, `cp_async_16` and `ldmatrix_x4`: an int32 on
    the device. Arrays need ``alignment=16`` for accesses of 16 bytes."""
    return array.__array_interface__["data"][0]


if not SIMULATED:
    shared_address = _intrinsic(shared_address, _shared_address_typer)


def _shared(form, address):
    values = simulator.running().block.shared.memory.read(form, address)
    return values if len(values) > 1 else values[0]


def _write_shared(form, address, *values):
    simulator.running().block.shared.memory.write(form, address, *values)


@instruction(I32, I64, emit=_load(_bits(16), space=_SHARED, then=_unsigned))
def load_shared_u16(address):
    """A 16-bit integer, 0 to 65535, of shared memory."""
    return _shared("<H", address)


@instruction(I32, I64, emit=_load(_bits(32), space=_SHARED))
def load_shared_u32(address):
    """A word of shared memory."""
    return _shared("<i", address)


@instruction(types.UniTuple(I64, 2), I64, emit=_load(_bits(64), 2, space=_SHARED))
def load_shared_u64x2(address):
    """Two times 64 bits of shared memory as int64."""
    return _shared("<2q", address)


@instruction(_words(2), I64, emit=_load(_bits(32), 2, space=_SHARED))
def load_shared_u32x2(address):
    """Two words of shared memory."""
    return _shared("<2i", address)


@instruction(_words(4), I64, emit=_load(_bits(32), 4, space=_SHARED))
def load_shared_u32x4(address):
    """Four words of shared memory."""
    return _shared("<4i", address)


@instruction(F32, I64, emit=_load(ir.FloatType(), space=_SHARED))
def load_shared_f32(address):
    """A float32 of shared memory."""
    return np.float32(_shared("<f", address))


@instruction(_floats(4), I64, emit=_load(ir.FloatType(), 4, space=_SHARED))
def load_shared_f32x4(address):
    """Four float32 of shared memory."""
    return _floats_of(_shared("<4f", address))


@instruction(types.void, I64, I32, emit=_store(_bits(8), space=_SHARED, then=_truncated(8)))
def store_shared_u8(address, value):
    """The low byte of an integer to shared memory."""
    _write_shared("<B", address, int(value) & 0xFF)


@instruction(types.void, I64, I32, emit=_store(_bits(16), space=_SHARED, then=_truncated(16)))
def store_shared_u16(address, value):
    """The low 16 bits of an integer to shared memory."""
    _write_shared("<H", address, int(value) & 0xFFFF)


@instruction(types.void, I64, I32, emit=_store(_bits(32), space=_SHARED))
def store_shared_u32(address, word):
    """A word to shared memory."""
    _write_shared("<i", address, _word(word))


@instruction(types.void, I64, I64, emit=_store(_bits(64), space=_SHARED))
def store_shared_u64(address, value):
    """64 bits to shared memory."""
    _write_shared("<q", address, int(value))


@instruction(types.void, I64, I32, I32, emit=_store(_bits(32), 2, space=_SHARED))
def store_shared_u32x2(address, w0, w1):
    """Two words to shared memory."""
    _write_shared("<2i", address, _word(w0), _word(w1))


@instruction(types.void, I64, I32, I32, I32, I32, emit=_store(_bits(32), 4, space=_SHARED))
def store_shared_u32x4(address, w0, w1, w2, w3):
    """Four words to shared memory."""
    _write_shared("<4i", address, _word(w0), _word(w1), _word(w2), _word(w3))


@instruction(types.void, I64, F32, emit=_store(ir.FloatType(), space=_SHARED))
def store_shared_f32(address, x):
    """A float32 to shared memory."""
    _write_shared("<f", address, _float(x))


@instruction(types.void, I64, F32, F32, F32, F32, emit=_store(ir.FloatType(), 4, space=_SHARED))
def store_shared_f32x4(address, x0, x1, x2, x3):
    """Four float32 to shared memory."""
    _write_shared("<4f", address, _float(x0), _float(x1), _float(x2), _float(x3))


@instruction(types.void, I32, I64, I32, asm="cp.async.cg.shared.global [$0], [$1], 16, $2;", effects="memory")
def cp_async_16(shared, address, nbytes):
    """Begin to copy 16 bytes from global to shared memory: `nbytes` of them, 0 to 16, and zeros behind. With 0 the
    address is not read, but must be aligned. All 16 may reach beyond an array, whose memory is a multiple of 16 bytes.
    In the simulator the target is poisoned until the copy is waited for, and what is no part of the array stays so."""
    _begin_copy(16, shared, address, nbytes)


@instruction(types.void, I32, I64, I32, asm="cp.async.ca.shared.global [$0], [$1], 4, $2;", effects="memory")
def cp_async_4(shared, address, nbytes):
    """`cp_async_16` of 4 bytes."""
    _begin_copy(4, shared, address, nbytes)


def _begin_copy(size, shared, address, nbytes):
    if not 0 <= nbytes <= size:
        raise ValueError(f"cp_async_{size} of {nbytes} bytes")
    if address % size:
        raise IndexError(f"cp_async_{size} from address {address}, which {size} does not divide")
    _write_shared(f"{size}s", shared, b"\xff" * size)
    simulator.running().copies.append((size, shared, address, nbytes))


@instruction(types.void, asm="cp.async.commit_group;", effects="memory")
def cp_async_commit():
    """Make a group of the copies that this thread began since the last call; the group may be empty."""
    thread = simulator.running()
    thread.groups.append(thread.copies)
    thread.copies = []


def _cp_async_wait_typer(typingctx, groups):
    if not isinstance(groups, types.IntegerLiteral):
        return None  # Numba then tries again with the literal, if it is one
    write = _inline(types.void, (), f"cp.async.wait_group {groups.literal_value};", "memory")

    def codegen(context, builder, signature, values):
        write(builder, ())
        return context.get_dummy_value()

    return types.void(groups), codegen


def cp_async_wait(groups):
    """Wait until at most so many of this thread's latest groups, a literal, are under way. Other threads' copies are
    there behind `cuda.syncthreads`."""
    thread = simulator.running()
    while len(thread.groups) > groups:
        for size, shared, address, nbytes in thread.groups.pop(0):
            data = simulator.GLOBAL.around(address, size)[:nbytes] if nbytes else b""
            _write_shared(f"{size}s", shared, data.ljust(size, b"\0"))


if not SIMULATED:
    cp_async_wait = _intrinsic(cp_async_wait, _cp_async_wait_typer)


# Integers.


def _word(value):
    """The low 32 bits of an integer as int32."""
    return ((int(value) & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _float(value):
    """A float32, which it must be already: compiled kernels would compute in float64."""
    if not isinstance(value, (np.float32, int)):
        raise TypeError(f"expected float32, got {type(value).__name__} {value}")
    return np.float32(value)


def _bytes(word, kind="i1"):
    """The bytes of words: (..., 4)."""
    return np.asarray(word, np.int64).astype(np.uint32).astype("<u4")[..., None].view(kind)


@instruction(I32, I32, I32, I32, asm="dp4a.s32.s32 $0, $1, $2, $3;")
def dp4a(a, b, c):
    """``c + Σ a[i] * b[i]`` over four signed bytes."""
    return _word(c + int(np.dot(_bytes(a).astype(int), _bytes(b).astype(int))))


@instruction(I32, I32, I32, I32, asm="dp4a.u32.s32 $0, $1, $2, $3;")
def dp4a_us(a, b, c):
    """``c + Σ a[i] * b[i]``, the bytes of `a` unsigned, those of `b` signed."""
    return _word(c + int(np.dot(_bytes(a, "u1").astype(int), _bytes(b).astype(int))))


@instruction(I32, I32, I32, I32, asm="prmt.b32 $0, $1, $2, $3;")
def prmt(a, b, selector):
    """Four of the eight bytes of `a` (0 to 3) and `b` (4 to 7): byte i is number ``selector >> 4 * i & 7``; with bit 3
    set, its sign bit eight times."""
    source, result = [*_bytes(a, "u1"), *_bytes(b, "u1")], 0
    for i in range(4):
        nibble = int(selector) >> 4 * i
        byte = int(source[nibble & 7])
        result |= (byte if not nibble & 8 else 0xFF * (byte >> 7)) << 8 * i
    return _word(result)


@instruction(I64, I64, asm="mov.b64 $0, $1;")
def kept(address):
    """The same. The compiler cannot see through it, so that it keeps the address, where it would compute it, or parts
    of it, again at every use."""
    return address


@instruction(I32, I32, I32, I32, asm="shf.r.wrap.b32 $0, $1, $2, $3;")
def funnel_shift_r(low, high, shift):
    """32 bits of the 64 in ``high:low``, from bit ``shift & 31`` on."""
    return _word(((int(high) & 0xFFFFFFFF) << 32 | int(low) & 0xFFFFFFFF) >> (int(shift) & 31))


# Floats.


@instruction(F32, I32, emit=lambda builder, values: builder.bitcast(values[0], _LLVM[F32]))
def as_f32(word):
    """The float32 of these bits."""
    return np.float32(struct.unpack("<f", struct.pack("<i", _word(word)))[0])


@instruction(I32, F32, emit=lambda builder, values: builder.bitcast(values[0], _LLVM[I32]))
def as_word(x):
    """The bits of a float32."""
    return struct.unpack("<i", struct.pack("<f", _float(x)))[0]


@instruction(F32, F32, F32, F32, asm="fma.rn.f32 $0, $1, $2, $3;")
def fma(a, b, c):
    """``a * b + c``, rounded once (in the simulator, in rare cases, the last bit differs)."""
    return np.float32(np.float64(_float(a)) * np.float64(_float(b)) + np.float64(_float(c)))


@instruction(F32, F32, F32, asm="max.f32 $0, $1, $2;")
def fmax(a, b):
    """The larger one; the other one where one is NaN."""
    return np.fmax(_float(a), _float(b))


@instruction(F32, F32, F32, asm="min.f32 $0, $1, $2;")
def fmin(a, b):
    """The smaller one; the other one where one is NaN."""
    return np.fmin(_float(a), _float(b))


@instruction(F32, F32, asm="ex2.approx.ftz.f32 $0, $1;")
def exp2(x):
    """``2 ** x`` with a relative error of 2 ulp; −inf gives 0, denormal results are 0."""
    return _flushed(np.exp2(_float(x)))


@instruction(F32, F32, asm="lg2.approx.ftz.f32 $0, $1;")
def log2(x):
    """The logarithm to base 2 with an absolute error of 2 ** −22."""
    return np.log2(_float(x))


@instruction(F32, F32, asm="rcp.approx.ftz.f32 $0, $1;")
def rcp(x):
    """``1 / x`` with an error of 1 ulp."""
    return _flushed(np.float32(1) / _float(x))


@instruction(F32, F32, asm="rsqrt.approx.ftz.f32 $0, $1;")
def rsqrt(x):
    """``1 / sqrt(x)`` with a relative error of 2 ** −22."""
    return np.float32(1 / np.sqrt(np.float64(_float(x))))


@instruction(F32, F32, asm="sqrt.rn.f32 $0, $1;")
def sqrt(x):
    """The square root, correctly rounded."""
    return np.sqrt(_float(x))


@instruction(F32, F32, F32, asm="div.rn.f32 $0, $1, $2;")
def div(a, b):
    """``a / b``, correctly rounded."""
    return _float(a) / _float(b)


@instruction(I32, F32, asm="cvt.rni.s32.f32 $0, $1;")
def nearest_int(x):
    """The nearest int32, of two the even one; what is beyond saturates, NaN is 0."""
    x = float(_float(x))
    return 0 if x != x else int(np.clip(np.rint(x), -(2**31), 2**31 - 1))


@instruction(F32, I32, emit=lambda builder, values: builder.sitofp(values[0], _LLVM[F32]))
def to_f32(i):
    """An int32 as float32."""
    return np.float32(_word(i))


def _flushed(x):
    return np.float32(0) if abs(x) < np.finfo(np.float32).tiny else x


@instruction(I32, F32, asm="{ .reg .b16 h; cvt.rn.f16.f32 h, $1; cvt.u32.u16 $0, h; }")
def f16_bits(x):
    """The float16 nearest to a float32, as its 16 bits."""
    x = _float(x)
    return 0x7FFF if np.isnan(x) else int(np.float16(x).view(np.uint16))


@instruction(I32, F32, asm="{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; cvt.u32.u16 $0, h; }")
def bf16_bits(x):
    """The bfloat16 nearest to a float32, as its 16 bits."""
    x = _float(x)
    if np.isnan(x):
        return 0x7FFF
    bits = as_word(x) & 0xFFFFFFFF
    return bits + 0x7FFF + (bits >> 16 & 1) >> 16


@instruction(F32, I32, asm="{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.f32.f16 $0, h; }")
def f16_value(bits):
    """The float16 in the low 16 bits, as float32."""
    return np.float32(np.uint16(int(bits) & 0xFFFF).view(np.float16))


@instruction(F32, I32, asm="{ .reg .b32 w; shl.b32 w, $1, 16; mov.b32 $0, w; }")
def bf16_value(bits):
    """The bfloat16 in the low 16 bits, as float32."""
    return as_f32(int(bits) << 16)


@instruction(I32, F32, F32, asm="cvt.rn.f16x2.f32 $0, $2, $1;")
def pack_f16x2(low, high):
    """Two float32 as a word of two float16."""
    return _word(f16_bits(low) | f16_bits(high) << 16)


@instruction(I32, F32, F32, asm="cvt.rn.bf16x2.f32 $0, $2, $1;")
def pack_bf16x2(low, high):
    """Two float32 as a word of two bfloat16."""
    return _word(bf16_bits(low) | bf16_bits(high) << 16)


@instruction(_floats(2), I32, asm="{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }")
def unpack_f16x2(word):
    """The low and the high float16 of a word, as float32."""
    return f16_value(word), f16_value(int(word) >> 16)


@instruction(
    _floats(2),
    I32,
    asm="{ .reg .b32 l, h; shl.b32 l, $2, 16; and.b32 h, $2, 0xffff0000; mov.b32 $0, l; mov.b32 $1, h; }",
)
def unpack_bf16x2(word):
    """The low and the high bfloat16 of a word, as float32."""
    return bf16_value(word), bf16_value(int(word) >> 16)


@instruction(I32, I32, I32, I32, asm="fma.rn.f16x2 $0, $1, $2, $3;")
def fma_f16x2(a, b, c):
    """``a * b + c`` of two float16 each."""
    halves = ((unpack_f16x2(each)) for each in (a, b, c))
    return pack_f16x2(*(_rounded_odd(*each) for each in zip(*halves, strict=True)))


@instruction(I32, I32, I32, I32, asm="fma.rn.bf16x2 $0, $1, $2, $3;")
def fma_bf16x2(a, b, c):
    """``a * b + c`` of two bfloat16 each."""
    halves = ((unpack_bf16x2(each)) for each in (a, b, c))
    return pack_bf16x2(*(_rounded_odd(*each) for each in zip(*halves, strict=True)))


def _rounded_odd(a, b, c):
    """``a * b + c`` as a float32 that rounds further as the exact value does."""
    exact = float(a) * float(b) + float(c)
    x = np.float32(exact)
    if not np.isfinite(x) or x == exact or as_word(x) & 1:
        return x
    return np.nextafter(x, np.float32(np.inf if exact > x else -np.inf))


# Warps.


@instruction(I32, asm="mov.u32 $0, %laneid;")
def lane():
    """The thread's number in its warp, 0 to 31."""
    return simulator.running().lane


def _shuffle(form):
    """The typer of a ``shfl``, for float32 and for integers, of which it moves 32 bits."""

    def typer(typingctx, x, other):
        kind = F32 if x == F32 else I32
        if kind == I32 and not isinstance(x, (types.Integer, types.Boolean)):
            raise TypeError(f"lanes exchange float32 and integers, not {x}")
        write = _inline(kind, (kind, I32), f"shfl.sync.{form}.b32 $0, $1, $2, 0x1f, 0xffffffff;", "lanes")
        return kind(kind, I32), lambda context, builder, signature, values: write(builder, values)

    return typer


def _value(x):
    """What a shuffle moves."""
    return _word(x) if isinstance(x, (int, bool, np.bool_)) else _float(x)


def shfl_xor(x, mask):
    """The value of lane ``lane() ^ mask``: float32, or an integer of 32 bits."""
    me = simulator.running().lane
    return simulator.meet("shfl_xor", (_value(x), me ^ mask), lambda lanes: [lanes[source][0] for _, source in lanes])


def shfl_idx(x, source):
    """The value of lane ``source & 31``: float32, or an integer of 32 bits."""
    return simulator.meet("shfl_idx", (_value(x), source & 31), lambda lanes: [lanes[other][0] for _, other in lanes])


if not SIMULATED:
    shfl_xor = _intrinsic(shfl_xor, _shuffle("bfly"))
    shfl_idx = _intrinsic(shfl_idx, _shuffle("idx"))


@device
def group_sum(x, width):
    """The sum over the neighbouring `width` lanes, a power of two, for all of them. Integers wrap at 32 bits."""
    while width > 1:
        width >>= 1
        x = x + shfl_xor(x, width)
    return x


@device
def group_max(x, width):
    """The maximum over the neighbouring `width` lanes, a power of two, for all of them."""
    while width > 1:
        width >>= 1
        x = max(x, shfl_xor(x, width))
    return x


@device
def warp_sum(x):
    """The sum over the warp, for all lanes. Integers wrap at 32 bits."""
    return group_sum(x, 32)


@device
def warp_max(x):
    """The maximum over the warp, for all lanes."""
    return group_max(x, 32)


@instruction(
    I32,
    types.boolean,
    emit=lambda builder, values: _inline(
        I32, (I32,), "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }", "lanes"
    )(builder, [builder.zext(values[0], _LLVM[I32])]),
)
def ballot(condition):
    """A word with bit i set where the condition holds for lane i."""
    return simulator.meet(
        "ballot", bool(condition), lambda lanes: [_word(sum(bit << i for i, bit in enumerate(lanes)))] * WARP
    )


@instruction(types.void, asm="bar.warp.sync 0xffffffff;", effects="memory")
def syncwarp():
    """Wait for the warp; what its lanes wrote to memory before can be read behind."""
    simulator.meet("syncwarp", None, lambda lanes: lanes)


# Tensor cores. With ``g = lane >> 2`` and ``t = lane & 3``, a lane holds of the result (16 × 8) the elements
# c0, c1 = C[g, 2t], C[g, 2t+1] and c2, c3 = C[g+8, 2t], C[g+8, 2t+1].

_G, _T = np.arange(WARP) >> 2, np.arange(WARP) & 3
_C_ROWS = _G[:, None] + np.array([0, 0, 8, 8])
_C_COLUMNS = 2 * _T[:, None] + np.array([0, 1, 0, 1])


def _fragments(words, kind, per_word, rows, columns):
    """A matrix from the words of 32 lanes: register i holds `per_word` elements of a row from (rows, columns)[i] on."""
    values = np.asarray(words, np.int64).astype(np.uint32).astype("<u4")[..., None].view(kind)
    matrix = np.empty((16, 4 * 2 * per_word), values.dtype)
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        for j in range(per_word):
            matrix[_G + row, per_word * _T + column + j] = values[:, i, j]
    return matrix


def _product(kind_a, kind_b, wide, to_value=lambda matrix: matrix):
    """The combination of lanes that multiplies their fragments in type `wide`."""

    def combine(lanes):
        words, c = np.array([each[0] for each in lanes]), np.array([each[1] for each in lanes], wide)
        per_word = 4 // np.dtype(kind_a).itemsize
        half = 4 * per_word
        a = to_value(_fragments(words[:, :4], kind_a, per_word, (0, 8, 0, 8), (0, 0, half, half)))
        # B comes by columns, so that a lane's words are elements of a row of its transpose.
        b = to_value(_fragments(words[:, 4:], kind_b, per_word, (0, 0), (0, half)))[:8]
        return (a.astype(wide) @ b.astype(wide).T)[_C_ROWS, _C_COLUMNS] + c

    return combine


def _mma_int(kind_a):
    product = _product(kind_a, "i1", np.int64)
    return lambda lanes: [tuple(_word(each) for each in row) for row in product(lanes)]


def _mma_float(kind, to_value):
    product = _product(kind, kind, np.float64, to_value)
    return lambda lanes: [tuple(np.float32(each) for each in row) for row in product(lanes)]


_mma_s8, _mma_u8 = _mma_int("i1"), _mma_int("u1")
_mma_f16 = _mma_float("<f2", lambda matrix: matrix)
_mma_bf16 = _mma_float("<u2", lambda matrix: (matrix.astype(np.uint32) << 16).view(np.float32))
_MMA = "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"


@instruction(_words(4), *[I32] * 10, asm=f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {_MMA}", effects="lanes")
def mma_s8(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """``C + A @ B``, A 16 × 32 and B 32 × 8 of int8, C 16 × 8 of int32.

    With ``g = lane() >> 2`` and ``t = lane() & 3``, words hold four bytes of neighbouring k:
    a0 = A[g, 4t:], a1 = A[g+8, 4t:], a2 = A[g, 16+4t:], a3 = A[g+8, 16+4t:]; b0 = B[4t:, g], b1 = B[16+4t:, g];
    c0, c1 = C[g, 2t], C[g, 2t+1] and c2, c3 = C[g+8, 2t], C[g+8, 2t+1], as the result.
    """
    c = [_word(each) for each in (c0, c1, c2, c3)]
    return simulator.meet("mma_s8", ((a0, a1, a2, a3, b0, b1), c), _mma_s8)


@instruction(
    _words(4),
    *[I32] * 7,
    asm="mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};",
    effects="lanes",
)
def mma_s8_k16(a0, a1, b0, c0, c1, c2, c3):
    """`mma_s8` of A 16 × 16 and B 16 × 8: a0, a1 and b0 are those of there, or a2, a3 and b1."""
    c = [_word(each) for each in (c0, c1, c2, c3)]
    return simulator.meet("mma_s8_k16", ((a0, a1, 0, 0, b0, 0), c), _mma_s8)


@instruction(_words(4), *[I32] * 10, asm=f"mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {_MMA}", effects="lanes")
def mma_u8(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """`mma_s8` with unsigned bytes in A."""
    c = [_word(each) for each in (c0, c1, c2, c3)]
    return simulator.meet("mma_u8", ((a0, a1, a2, a3, b0, b1), c), _mma_u8)


@instruction(
    _floats(4),
    *[I32] * 6,
    *[F32] * 4,
    asm=f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {_MMA}",
    effects="lanes",
)
def mma_f16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """``C + A @ B``, A 16 × 16 and B 16 × 8 of float16, C 16 × 8 of float32. The simulator adds up in float64.

    With ``g = lane() >> 2`` and ``t = lane() & 3``, words hold two halves of neighbouring k, the lower one first:
    a0 = A[g, 2t:], a1 = A[g+8, 2t:], a2 = A[g, 8+2t:], a3 = A[g+8, 8+2t:]; b0 = B[2t:, g], b1 = B[8+2t:, g];
    c0 to c3 and the result as for `mma_s8`.
    """
    c = [_float(each) for each in (c0, c1, c2, c3)]
    return simulator.meet("mma_f16", ((a0, a1, a2, a3, b0, b1), c), _mma_f16)


@instruction(
    _floats(4),
    *[I32] * 6,
    *[F32] * 4,
    asm=f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {_MMA}",
    effects="lanes",
)
def mma_bf16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """`mma_f16` with bfloat16 in A and B."""
    c = [_float(each) for each in (c0, c1, c2, c3)]
    return simulator.meet("mma_bf16", ((a0, a1, a2, a3, b0, b1), c), _mma_bf16)


def _matrices(count, transposed):
    """The combination of lanes that reads `count` matrices of 8 × 8 halves, whose rows lanes 8i to 8i+7 name."""

    def combine(lanes):
        memory = simulator.running().block.shared.memory
        rows = [memory.read("<8H", address) for address in lanes[: 8 * count]]
        halves = np.array(rows, np.int64).reshape(count, 8, 8)
        if transposed:
            halves = halves.transpose(0, 2, 1)
        words = halves[:, _G, 2 * _T] | halves[:, _G, 2 * _T + 1] << 16
        return [tuple(_word(each) for each in column) for column in words.T]

    return combine


_LDMATRIX = "ldmatrix.sync.aligned.m8n8"
_combine_x2, _combine_x2_trans = _matrices(2, False), _matrices(2, True)
_combine_x4, _combine_x4_trans = _matrices(4, False), _matrices(4, True)


@instruction(_words(2), I32, asm=f"{_LDMATRIX}.x2.shared.b16 {{$0, $1}}, [$2];", effects="memory")
def ldmatrix_x2(address):
    """Two matrices of 8 rows of 16 bytes in shared memory, their rows at the addresses of lanes 0 to 7 and 8 to 15.

    Word i is bytes ``4 * (lane() & 3)`` to +3 of row ``lane() >> 2`` of matrix i.
    """
    return simulator.meet("ldmatrix_x2", address, _combine_x2)


@instruction(_words(2), I32, asm=f"{_LDMATRIX}.x2.trans.shared.b16 {{$0, $1}}, [$2];", effects="memory")
def ldmatrix_x2_trans(address):
    """`ldmatrix_x2` of matrices that are transposed, as 8 × 8 halves, while they are read."""
    return simulator.meet("ldmatrix_x2_trans", address, _combine_x2_trans)


@instruction(_words(4), I32, asm=f"{_LDMATRIX}.x4.shared.b16 {{$0, $1, $2, $3}}, [$4];", effects="memory")
def ldmatrix_x4(address):
    """`ldmatrix_x2` of four matrices: all 32 lanes name a row."""
    return simulator.meet("ldmatrix_x4", address, _combine_x4)


@instruction(_words(4), I32, asm=f"{_LDMATRIX}.x4.trans.shared.b16 {{$0, $1, $2, $3}}, [$4];", effects="memory")
def ldmatrix_x4_trans(address):
    """`ldmatrix_x4` of matrices that are transposed, as 8 × 8 halves, while they are read."""
    return simulator.meet("ldmatrix_x4_trans", address, _combine_x4_trans)
