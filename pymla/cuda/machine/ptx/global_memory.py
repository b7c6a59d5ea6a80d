"""Loads and stores in the device's memory, by address."""

import numpy as np
from llvmlite import ir
from numba.cuda import types

from pymla.cuda.machine.ptx.addresses import (
    as_signed,
    as_unsigned,
    bits,
    from_bfloat,
    from_half,
    loading,
    storing,
    to_half,
    truncated,
)
from pymla.cuda.machine.ptx.floats import bf16_bits, bf16_value, f16_bits, f16_value
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
    from pymla.cuda.runtime import simulated_memory


def _read(form, address):
    values = simulated_memory.GLOBAL.read(form, address)
    return values if len(values) > 1 else values[0]


@instruction(I32, I64, emit=loading(bits(8), constant=True, then=as_unsigned))
def load_u8(address):
    """A byte, 0 to 255. This and all of ``load_…`` read memory that no thread writes while the kernel runs
    (``ld.global.nc``)."""
    return _read("<B", address)


@instruction(I32, I64, emit=loading(bits(8), constant=True, then=as_signed))
def load_i8(address):
    """A signed byte."""
    return _read("<b", address)


@instruction(I32, I64, emit=loading(bits(16), constant=True, then=as_unsigned))
def load_u16(address):
    """A 16-bit integer, 0 to 65535."""
    return _read("<H", address)


@instruction(I32, I64, emit=loading(bits(16), constant=True, then=as_signed))
def load_i16(address):
    """A signed 16-bit integer."""
    return _read("<h", address)


@instruction(I32, I64, emit=loading(bits(32), constant=True))
def load_u32(address):
    """A word."""
    return _read("<i", address)


@instruction(I32, I64, emit=loading(bits(32), constant=True))
def load_u32_around(address):
    """A word of which some bytes lie in an array. All four can be read, as allocations are multiples of 512 bytes; in
    the simulator the others are poison."""
    return int.from_bytes(simulated_memory.GLOBAL.around(address, 4), "little", signed=True)


@instruction(I64, I64, emit=loading(bits(64), constant=True))
def load_u64(address):
    """64 bits as an int64."""
    return _read("<q", address)


@instruction(words(2), I64, emit=loading(bits(32), 2, constant=True))
def load_u32x2(address):
    """Two words."""
    return _read("<2i", address)


@instruction(words(4), I64, emit=loading(bits(32), 4, constant=True))
def load_u32x4(address):
    """Four words (``ld.global.nc.v4.u32``)."""
    return _read("<4i", address)


@instruction(F32, I64, emit=loading(ir.FloatType(), constant=True))
def load_f32(address):
    """A float32."""
    return np.float32(_read("<f", address))


@instruction(floats(2), I64, emit=loading(ir.FloatType(), 2, constant=True))
def load_f32x2(address):
    """Two float32."""
    return float32s(_read("<2f", address))


@instruction(floats(4), I64, emit=loading(ir.FloatType(), 4, constant=True))
def load_f32x4(address):
    """Four float32."""
    return float32s(_read("<4f", address))


@instruction(F32, I64, emit=loading(ir.HalfType(), constant=True, then=from_half))
def load_f16(address):
    """A float16, as float32."""
    return f16_value(_read("<H", address))


@instruction(F32, I64, emit=loading(bits(16), constant=True, then=from_bfloat))
def load_bf16(address):
    """A bfloat16, as float32."""
    return bf16_value(_read("<H", address))


_STREAM = "ld.global.nc.L1::no_allocate"


@instruction(I32, I64, asm=f"{{ .reg .b16 h; {_STREAM}.b16 h, [$1]; cvt.u32.u16 $0, h; }}")
def stream_u16(address):
    """`load_u16` of memory that is read once, which leaves the first cache alone."""
    return load_u16(address)


@instruction(I32, I64, asm=f"{_STREAM}.b32 $0, [$1];")
def stream_u32(address):
    """`load_u32` of memory that is read once."""
    return load_u32(address)


@instruction(words(2), I64, asm=f"{_STREAM}.v2.b32 {{$0, $1}}, [$2];")
def stream_u32x2(address):
    """`load_u32x2` of memory that is read once."""
    return load_u32x2(address)


@instruction(words(4), I64, asm=f"{_STREAM}.v4.b32 {{$0, $1, $2, $3}}, [$4];")
def stream_u32x4(address):
    """`load_u32x4` of memory that is read once."""
    return load_u32x4(address)


@instruction(I32, I64, asm="ld.relaxed.gpu.global.b32 $0, [$1];", effects="memory")
def fresh_u32(address):
    """A word that other threads may have written while the kernel runs (``ld.relaxed.gpu``)."""
    return load_u32(address)


@instruction(F32, I64, asm="ld.relaxed.gpu.global.f32 $0, [$1];", effects="memory")
def fresh_f32(address):
    """A float32 that other threads may have written while the kernel runs."""
    return load_f32(address)


@instruction(floats(4), I64, asm="ld.relaxed.gpu.global.v4.f32 {$0, $1, $2, $3}, [$4];", effects="memory")
def fresh_f32x4(address):
    """Four float32 that other threads may have written while the kernel runs."""
    return load_f32x4(address)


@instruction(types.void, I64, I32, emit=storing(bits(8), then=truncated(8)))
def store_u8(address, value):
    """The low byte of an integer."""
    simulated_memory.GLOBAL.write("<B", address, int(value) & 0xFF)


@instruction(types.void, I64, I32, emit=storing(bits(16), then=truncated(16)))
def store_u16(address, value):
    """The low 16 bits of an integer."""
    simulated_memory.GLOBAL.write("<H", address, int(value) & 0xFFFF)


@instruction(types.void, I64, I32, emit=storing(bits(32)))
def store_u32(address, word):
    """A word."""
    simulated_memory.GLOBAL.write("<i", address, word_of(word))


@instruction(types.void, I64, I32, I32, emit=storing(bits(32), 2))
def store_u32x2(address, w0, w1):
    """Two words."""
    simulated_memory.GLOBAL.write("<2i", address, word_of(w0), word_of(w1))


@instruction(types.void, I64, I32, I32, I32, I32, emit=storing(bits(32), 4))
def store_u32x4(address, w0, w1, w2, w3):
    """Four words."""
    simulated_memory.GLOBAL.write("<4i", address, word_of(w0), word_of(w1), word_of(w2), word_of(w3))


@instruction(types.void, I64, F32, emit=storing(ir.FloatType()))
def store_f32(address, x):
    """A float32."""
    simulated_memory.GLOBAL.write("<f", address, float32(x))


@instruction(types.void, I64, F32, F32, emit=storing(ir.FloatType(), 2))
def store_f32x2(address, x0, x1):
    """Two float32."""
    simulated_memory.GLOBAL.write("<2f", address, float32(x0), float32(x1))


@instruction(types.void, I64, F32, F32, F32, F32, emit=storing(ir.FloatType(), 4))
def store_f32x4(address, x0, x1, x2, x3):
    """Four float32."""
    simulated_memory.GLOBAL.write("<4f", address, float32(x0), float32(x1), float32(x2), float32(x3))


@instruction(types.void, I64, F32, emit=storing(ir.HalfType(), then=to_half))
def store_f16(address, x):
    """A float32, rounded to float16."""
    simulated_memory.GLOBAL.write("<H", address, f16_bits(x))


@instruction(
    types.void, I64, F32, asm="{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h; }", effects="memory"
)
def store_bf16(address, x):
    """A float32, rounded to bfloat16."""
    simulated_memory.GLOBAL.write("<H", address, bf16_bits(x))


def _global_address_typer(typingctx, array):
    def codegen(context, builder, signature, values):
        return builder.ptrtoint(context.make_array(signature.args[0])(context, builder, values[0]).data, LLVM[I64])

    return I64(array), codegen


def global_address(array):
    """The address of the first element of a kernel's argument."""
    return array.__array_interface__["data"][0]


if not SIMULATED:
    global_address = intrinsic_like(global_address, _global_address_typer)
