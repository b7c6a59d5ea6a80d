"""Loads and stores in a block's shared memory, by address: for accesses that are wider than an array's elements."""

import numpy as np
from llvmlite import ir
from numba.cuda import types

from pymla.cuda.machine.ptx.addresses import SHARED, as_unsigned, bits, loading, storing, truncated
from pymla.cuda.machine.ptx.instruction import (
    F32,
    I32,
    I64,
    LLVM,
    float32,
    float32s,
    floats,
    instruction,
    intrinsic_like,
    word_of,
    words,
)
from pymla.cuda.runtime.driver import SIMULATED

if SIMULATED:
    from pymla.cuda.runtime import simulator


def _shared_address_typer(typingctx, array):
    def codegen(context, builder, signature, values):
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        pointer = builder.addrspacecast(data, data.type.pointee.as_pointer(SHARED))
        return builder.trunc(builder.ptrtoint(pointer, LLVM[I64]), LLVM[I32])

    return I32(array), codegen


def shared_address(array):
    """The address of a shared array's first element for `load_shared_…`, `cp_async_16` and `ldmatrix_x4`: an int32 on
    the device. Arrays need ``alignment=16`` for accesses of 16 bytes."""
    return array.__array_interface__["data"][0]


if not SIMULATED:
    shared_address = intrinsic_like(shared_address, _shared_address_typer)


def _shared(form, address):
    values = simulator.running().block.shared.memory.read(form, address)
    return values if len(values) > 1 else values[0]


def write_shared(form, address, *values):
    simulator.running().block.shared.memory.write(form, address, *values)


@instruction(I32, I64, emit=loading(bits(8), space=SHARED, then=as_unsigned))
def load_shared_u8(address):
    """A byte, 0 to 255, of shared memory."""
    return _shared("<B", address)


@instruction(I32, I64, emit=loading(bits(16), space=SHARED, then=as_unsigned))
def load_shared_u16(address):
    """A 16-bit integer, 0 to 65535, of shared memory."""
    return _shared("<H", address)


@instruction(I32, I64, emit=loading(bits(32), space=SHARED))
def load_shared_u32(address):
    """A word of shared memory."""
    return _shared("<i", address)


@instruction(types.UniTuple(I64, 2), I64, emit=loading(bits(64), 2, space=SHARED))
def load_shared_u64x2(address):
    """Two times 64 bits of shared memory as int64."""
    return _shared("<2q", address)


@instruction(words(2), I64, emit=loading(bits(32), 2, space=SHARED))
def load_shared_u32x2(address):
    """Two words of shared memory."""
    return _shared("<2i", address)


@instruction(words(4), I64, emit=loading(bits(32), 4, space=SHARED))
def load_shared_u32x4(address):
    """Four words of shared memory."""
    return _shared("<4i", address)


@instruction(F32, I64, emit=loading(ir.FloatType(), space=SHARED))
def load_shared_f32(address):
    """A float32 of shared memory."""
    return np.float32(_shared("<f", address))


@instruction(floats(4), I64, emit=loading(ir.FloatType(), 4, space=SHARED))
def load_shared_f32x4(address):
    """Four float32 of shared memory."""
    return float32s(_shared("<4f", address))


@instruction(types.void, I64, I32, emit=storing(bits(8), space=SHARED, then=truncated(8)))
def store_shared_u8(address, value):
    """The low byte of an integer to shared memory."""
    write_shared("<B", address, int(value) & 0xFF)


@instruction(types.void, I64, I32, emit=storing(bits(16), space=SHARED, then=truncated(16)))
def store_shared_u16(address, value):
    """The low 16 bits of an integer to shared memory."""
    write_shared("<H", address, int(value) & 0xFFFF)


@instruction(types.void, I64, I32, emit=storing(bits(32), space=SHARED))
def store_shared_u32(address, word):
    """A word to shared memory."""
    write_shared("<i", address, word_of(word))


@instruction(types.void, I64, I64, emit=storing(bits(64), space=SHARED))
def store_shared_u64(address, value):
    """64 bits to shared memory."""
    write_shared("<q", address, int(value))


@instruction(types.void, I64, I32, I32, emit=storing(bits(32), 2, space=SHARED))
def store_shared_u32x2(address, w0, w1):
    """Two words to shared memory."""
    write_shared("<2i", address, word_of(w0), word_of(w1))


@instruction(types.void, I64, I32, I32, I32, I32, emit=storing(bits(32), 4, space=SHARED))
def store_shared_u32x4(address, w0, w1, w2, w3):
    """Four words to shared memory."""
    write_shared("<4i", address, word_of(w0), word_of(w1), word_of(w2), word_of(w3))


@instruction(types.void, I64, F32, emit=storing(ir.FloatType(), space=SHARED))
def store_shared_f32(address, x):
    """A float32 to shared memory."""
    write_shared("<f", address, float32(x))


@instruction(types.void, I64, F32, F32, F32, F32, emit=storing(ir.FloatType(), 4, space=SHARED))
def store_shared_f32x4(address, x0, x1, x2, x3):
    """Four float32 to shared memory."""
    write_shared("<4f", address, float32(x0), float32(x1), float32(x2), float32(x3))
