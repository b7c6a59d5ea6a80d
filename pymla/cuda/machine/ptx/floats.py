"""Floats: arithmetic in float32, and conversions from and to 16 bits."""

import struct

import numpy as np

from pymla.cuda.machine.ptx.instruction import F32, I32, LLVM, float32, floats, instruction, word_of


@instruction(F32, I32, emit=lambda builder, values: builder.bitcast(values[0], LLVM[F32]))
def as_f32(word):
    """The float32 of these bits."""
    return np.float32(struct.unpack("<f", struct.pack("<i", word_of(word)))[0])


@instruction(I32, F32, emit=lambda builder, values: builder.bitcast(values[0], LLVM[I32]))
def as_word(x):
    """The bits of a float32."""
    return struct.unpack("<i", struct.pack("<f", float32(x)))[0]


@instruction(F32, F32, F32, F32, asm="fma.rn.f32 $0, $1, $2, $3;")
def fma(a, b, c):
    """``a * b + c``, rounded once (in the simulator, in rare cases, the last bit differs)."""
    return np.float32(float(float32(a)) * float(float32(b)) + float(float32(c)))


@instruction(F32, F32, F32, asm="max.f32 $0, $1, $2;")
def fmax(a, b):
    """The larger one; the other one where one is NaN."""
    return np.fmax(float32(a), float32(b))


@instruction(F32, F32, F32, asm="min.f32 $0, $1, $2;")
def fmin(a, b):
    """The smaller one; the other one where one is NaN."""
    return np.fmin(float32(a), float32(b))


@instruction(F32, F32, asm="ex2.approx.ftz.f32 $0, $1;")
def exp2(x):
    """``2 ** x`` with a relative error of 2 ulp; −inf gives 0, denormal results are 0."""
    return _flushed(np.exp2(float32(x)))


@instruction(F32, F32, asm="lg2.approx.ftz.f32 $0, $1;")
def log2(x):
    """The logarithm to base 2 with an absolute error of 2 ** −22."""
    return np.log2(float32(x))


@instruction(F32, F32, asm="rcp.approx.ftz.f32 $0, $1;")
def rcp(x):
    """``1 / x`` with an error of 1 ulp."""
    return _flushed(np.float32(1) / float32(x))


@instruction(F32, F32, asm="rsqrt.approx.ftz.f32 $0, $1;")
def rsqrt(x):
    """``1 / sqrt(x)`` with a relative error of 2 ** −22."""
    return np.float32(1 / np.sqrt(np.float64(float32(x))))


@instruction(F32, F32, asm="sqrt.rn.f32 $0, $1;")
def sqrt(x):
    """The square root, correctly rounded."""
    return np.sqrt(float32(x))


@instruction(F32, F32, F32, asm="div.rn.f32 $0, $1, $2;")
def div(a, b):
    """``a / b``, correctly rounded."""
    return float32(a) / float32(b)


@instruction(I32, F32, asm="cvt.rni.s32.f32 $0, $1;")
def nearest_int(x):
    """The nearest int32, of two equally near ones the even one; larger numbers saturate, NaN gives 0."""
    x = float(float32(x))
    return 0 if x != x else int(np.clip(np.rint(x), -(2**31), 2**31 - 1))


@instruction(F32, I32, emit=lambda builder, values: builder.sitofp(values[0], LLVM[F32]))
def to_f32(i):
    """An int32 as float32."""
    return np.float32(word_of(i))


def _flushed(x):
    return np.float32(0) if abs(x) < np.finfo(np.float32).tiny else x


@instruction(I32, F32, asm="{ .reg .b16 h; cvt.rn.f16.f32 h, $1; cvt.u32.u16 $0, h; }")
def f16_bits(x):
    """The float16 nearest to a float32, as its 16 bits."""
    x = float32(x)
    return 0x7FFF if np.isnan(x) else int(np.float16(x).view(np.uint16))


@instruction(I32, F32, asm="{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; cvt.u32.u16 $0, h; }")
def bf16_bits(x):
    """The bfloat16 nearest to a float32, as its 16 bits."""
    x = float32(x)
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
    return word_of(f16_bits(low) | f16_bits(high) << 16)


@instruction(I32, F32, F32, asm="cvt.rn.bf16x2.f32 $0, $2, $1;")
def pack_bf16x2(low, high):
    """Two float32 as a word of two bfloat16."""
    return word_of(bf16_bits(low) | bf16_bits(high) << 16)


@instruction(floats(2), I32, asm="{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }")
def unpack_f16x2(word):
    """The low and the high float16 of a word, as float32."""
    return f16_value(word), f16_value(int(word) >> 16)


@instruction(
    floats(2),
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
