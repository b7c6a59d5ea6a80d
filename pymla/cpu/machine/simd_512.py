"""Registers of 64 bytes, for rows of weights where the processor has them (`pymla.cpu.matmul.gemv_512`).

Each quarter of a register belongs to one of four blocks of 32 weights: sixteen codes, or four sums of products; or each
eighth to one of eight.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pymla.cpu.machine.intrinsics import (
    F16,
    I8,
    I16,
    I32,
    I64,
    constant,
    declare,
    dpbusd,
    f32x8,
    f32x16,
    i8x64,
    i32x16,
    ir_type,
    loader,
    operation,
    read,
    shuffle,
)


@operation(i8x64, i8x64, i8x64)
def first_quarters_20(builder, x, y):
    """The last sixteen of each of four blocks of 20 bytes; `x` and `y` are the first and the second 64 bytes of
    eight."""
    return shuffle(builder, x, y, [20 * (i // 16) + 4 + i % 16 for i in range(64)])


@operation(i8x64, i8x64, i8x64)
def last_quarters_20(builder, x, y):
    """The same for the other four; `x` and `y` are the second and the last 64 bytes."""
    at = [80 + 20 * (i // 16) + 4 + i % 16 for i in range(64)]
    return shuffle(builder, x, y, [each - 64 if each < 128 else each - 32 for each in at])


@operation(f32x8, i8x64, i8x64)
def halves_18(builder, x, y):
    """The IEEE half at the beginning of each of eight blocks of 18 bytes as float32: four of them begin in `x`, the
    others in `y`."""
    words = ir.VectorType(I16, 32)
    lanes = [32 * (i // 4) + 9 * (i % 4) for i in range(8)]
    halves = shuffle(builder, builder.bitcast(x, words), builder.bitcast(y, words), lanes)
    return builder.fpext(builder.bitcast(halves, ir.VectorType(F16, 8)), ir_type(f32x8))


@operation(i8x64, i8x64, i8x64)
def eighths_18(builder, x, y):
    """Eight bytes, from the third on, of each of eight blocks of 18 bytes: four of them begin in `x`, the others in
    `y`."""
    return shuffle(builder, x, y, [64 * (i // 32) + 18 * (i // 8 % 4) + 2 + i % 8 for i in range(64)])


@intrinsic(prefer_literal=True)
def load_quarters(typingctx, address, size, offset):
    """Sixteen bytes from `offset` on of each of four blocks of `size` bytes; both are literals."""
    first = offset.literal_value
    # Two loads have all of them: one begins with the first block's bytes, the other ends with the last block's.
    second = first + 3 * size.literal_value - 48
    wanted = [size.literal_value * (i // 16) + i % 16 for i in range(64)]
    lanes = [at if at < 64 else 64 + first + at - second for at in wanted]

    def codegen(context, builder, signature, args):
        loads = (builder.add(args[0], ir.Constant(I64, at)) for at in (first, second))
        return shuffle(builder, *(read(builder, at, ir_type(i8x64)) for at in loads), lanes)

    return i8x64(types.int64, size, offset), codegen


load_i8x64 = loader(i8x64)
zero_i32x16 = operation(i32x16)(lambda builder: constant(ir_type(i32x16), 0))
zero_f32x16 = operation(f32x16)(lambda builder: constant(ir_type(f32x16), 0.0))
to_f32x16 = operation(f32x16, i32x16)(lambda builder, x: builder.sitofp(x, ir_type(f32x16)))
dot_u8x64 = operation(i32x16, i32x16, i8x64, i8x64)(dpbusd)
flip_sign_bits = operation(i8x64, i8x64)(lambda builder, x: builder.xor(x, constant(x.type, -128)))
all_128 = operation(i8x64)(lambda builder: constant(ir_type(i8x64), -128))
subtract_i32x16 = operation(i32x16, i32x16, i32x16)(lambda builder, x, y: builder.sub(x, y))


@intrinsic(prefer_literal=True)
def spread(typingctx, x, half):
    """Four of eight float32, the `half`-th ones, each in a quarter of the lanes; `half` is a literal."""
    lanes = [4 * half.literal_value + i // 4 for i in range(16)]
    return f32x16(f32x8, half), lambda context, builder, signature, args: shuffle(builder, args[0], args[0], lanes)


@operation(f32x16, f32x8)
def spread_pairs(builder, x):
    """Eight float32, each in two lanes."""
    return shuffle(builder, x, x, [i // 2 for i in range(16)])


@operation(i32x16, types.int64)
def load_starts(builder, address):
    """Eight int32 from memory, each in the first of two lanes; the second is 0."""
    wide = builder.zext(read(builder, address, ir.VectorType(I32, 8)), ir.VectorType(I64, 8))
    return builder.bitcast(wide, ir_type(i32x16))


@operation(f32x8, f32x16)
def halve(builder, x):
    """The sum of both halves."""
    low, high = (shuffle(builder, x, x, range(8 * i, 8 * i + 8)) for i in (0, 1))
    return builder.fadd(low, high)


@operation(i8x64, i8x64, i8x64)
def even_quarters(builder, x, y):
    """The first and third quarters of two registers."""
    return shuffle(builder, x, y, [32 * (i // 16) + i % 16 for i in range(64)])


@operation(i8x64, i8x64, i8x64)
def odd_quarters(builder, x, y):
    """The second and fourth quarters of two registers."""
    return shuffle(builder, x, y, [32 * (i // 16) + 16 + i % 16 for i in range(64)])


@operation(i8x64, types.int64)
def load_bits_2(builder, address):
    """Sixteen bytes of four codes each, 2 bits of every code: quarter i has the i-th codes, at bits 4 and 5."""
    sixteen = read(builder, address, ir.VectorType(I32, 4))
    words = ir.VectorType(I32, 16)
    four = shuffle(builder, sixteen, sixteen, [0, 1, 2, 3] * 4)
    rotate = declare(builder, "llvm.fshl.v16i32", words, [words] * 3)
    amounts = ir.Constant(words, [4] * 4 + [2] * 4 + [0] * 4 + [30] * 4)
    rotated = builder.call(rotate, [four, four, amounts])
    return builder.and_(builder.bitcast(rotated, ir_type(i8x64)), constant(ir_type(i8x64), 0x30))


@operation(i32x16, i32x16, i32x16, types.int64)
def times_scales_8(builder, low, high, address):
    """Sums of products, within int16, of the first and the second sixteen codes of four blocks times int8 scales, of
    which each block has two behind each other; a quarter of the result belongs to each block."""
    words = ir.VectorType(I16, 32)
    pack = declare(builder, "llvm.x86.avx512.packssdw.512", words, [low.type] * 2)
    scales = read(builder, address, ir.VectorType(I8, 8))
    scales = builder.sext(shuffle(builder, scales, scales, [i // 4 for i in range(32)]), words)
    multiply = declare(builder, "llvm.x86.avx512.pmaddw.d.512", low.type, [words] * 2)
    return builder.call(multiply, [builder.call(pack, [low, high]), scales])
