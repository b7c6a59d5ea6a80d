"""Tiles of AMX: two-dimensional registers of the processor, and their dot instruction.

A product has three tiles: sums of 16 × 16 int32, codes of 16 rows (`BLOCK` bytes each, signed or not), and a panel of
`BLOCK` codes of 16 other rows, ``[BLOCK / 4][16][4]``. Kernels name tiles by number, as LLVM does not allocate them
here: 0 to 3 hold sums, 4 and 5 rows, 6 and 7 panels (`configure`). Sums leave a tile by way of memory, where float
registers take them from: `Rows` is sixteen of these, one for each row of a tile.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pymla.cpu.machine.intrinsics import (
    F32,
    I8,
    I32,
    I64,
    constant,
    declare,
    f32x16,
    in_order,
    operation,
    read,
    splat,
    write,
)
from pymla.cpu.machine.isa import AMX
from pymla.cpu.runtime.compiling import inlined

#: Codes of a row that a dot instruction takes.
BLOCK = 32
#: Bytes of a tile of sums, in memory.
SUMS = 16 * 64
#: Bytes of scratch of products by tiles: the sums of four, or of two and as much for what is multiplied next. Without
#: AMX none are needed.
SCRATCH = 6 * SUMS if AMX else 0
#: Sixteen registers, for the rows of a tile.
Rows = types.UniTuple(f32x16, 16)

_POINTER = I8.as_pointer()
_FLOATS, _WORDS = ir.VectorType(F32, 16), ir.VectorType(I32, 16)
#: Rows and bytes of a row of each tile.
_SHAPES = 4 * [(16, 64)] + 2 * [(16, BLOCK)] + 2 * [(BLOCK // 4, 64)]


def _instruction(builder, name, tiles, *arguments):
    """Call an instruction on tiles of some numbers."""
    arguments = [*(ir.Constant(I8, each) for each in tiles), *arguments]
    kind = ir.FunctionType(ir.VoidType(), [each.type for each in arguments])
    builder.call(declare(builder, f"llvm.x86.{name}", kind.return_type, kind.args), arguments)


def _tiles(name, count, addressed=False):
    """Make an intrinsic of an instruction on `count` tiles, whose numbers are literals; `addressed`: and on memory,
    given by an address and the bytes from row to row."""

    def made(numbers, arguments):
        def codegen(context, builder, signature, args):
            at = [builder.inttoptr(args[-2], _POINTER), args[-1]] if addressed else []
            _instruction(builder, name, [each.literal_value for each in numbers], *at)
            return context.get_dummy_value()

        return types.void(*numbers, *arguments), codegen

    if addressed:
        return intrinsic(prefer_literal=True)(lambda typingctx, a, address, stride: made([a], [types.int64] * 2))
    if count == 1:
        return intrinsic(prefer_literal=True)(lambda typingctx, a: made([a], []))
    return intrinsic(prefer_literal=True)(lambda typingctx, a, b, c: made([a, b, c], []))


load_tile, store_tile = _tiles("tileloadd64", 1, addressed=True), _tiles("tilestored64", 1, addressed=True)
zero_tile = _tiles("tilezero", 1)
#: Add to the sums of the first tile the products of the second, rows, with the third, a panel: of signed bytes, and of
#: rows from 0 to 255.
dot_tiles, dot_tiles_u8 = _tiles("tdpbssd", 3), _tiles("tdpbusd", 3)


@operation(types.void)
def configure(builder):
    """Give the tiles their shapes; they are there until `release`."""
    table = bytearray(64)
    table[0] = 1
    for tile, (rows, width) in enumerate(_SHAPES):
        table[16 + 2 * tile], table[48 + tile] = width, rows
    kind, name = ir.ArrayType(I8, 64), "pymla_tile_shapes"
    shapes = builder.module.globals.get(name)
    if shapes is None:
        shapes = ir.GlobalVariable(builder.module, kind, name)
        shapes.initializer, shapes.global_constant, shapes.linkage = ir.Constant(kind, table), True, "internal"
    _instruction(builder, "ldtilecfg", [], builder.bitcast(shapes, _POINTER))


@operation(types.void)
def release(builder):
    """Give the tiles back, which the system then need not save."""
    _instruction(builder, "tilerelease", [])


@inlined
def zero_four():
    """Tiles 0 to 3 without sums."""
    zero_tile(0)
    zero_tile(1)
    zero_tile(2)
    zero_tile(3)


@inlined
def store_four(address):
    """Tiles 0 to 3 to memory."""
    store_tile(0, address, 64)
    store_tile(1, address + SUMS, 64)
    store_tile(2, address + 2 * SUMS, 64)
    store_tile(3, address + 3 * SUMS, 64)


def _at(builder, address, stride, row):
    return builder.add(address, builder.mul(stride, ir.Constant(I64, row)))


def _fma(builder, x, y, z):
    return builder.call(declare(builder, "llvm.fma.v16f32", _FLOATS, [_FLOATS] * 3), [x, y, z])


def _sums(builder, address, row):
    """A row of sums, int32 (16, 16) in memory, as float32."""
    return builder.sitofp(read(builder, builder.add(address, ir.Constant(I64, 64 * row)), _WORDS), _FLOATS)


def _factor(builder, address, stride, row):
    """A row's own factor in all lanes."""
    return splat(builder, read(builder, _at(builder, address, stride, row), F32), 16)


@intrinsic
def zero_rows(typingctx):
    """Rows of zeros."""
    return Rows(), lambda context, builder, signature, args: context.make_tuple(
        builder, Rows, [constant(_FLOATS, 0.0)] * 16
    )


@intrinsic
def add_sums(typingctx, rows, sums, scale):
    """``rows[i] + sums[i] * scale``; `sums` is the address of a tile's."""

    def codegen(context, builder, signature, args):
        rows, sums, scale = args
        added = [
            in_order(builder, _fma(builder, _sums(builder, sums, i), scale, builder.extract_value(rows, i)))
            for i in range(16)
        ]
        return context.make_tuple(builder, Rows, added)

    return Rows(Rows, types.int64, f32x16), codegen


@intrinsic
def add_scaled_sums(typingctx, rows, sums, scale, factors, stride):
    """``rows[i] + sums[i] * scale * factors[i]``; `factors` is the address of float32, `stride` bytes apart."""

    def codegen(context, builder, signature, args):
        rows, sums, scale, factors, stride = args
        added = []
        for i in range(16):
            scaled = builder.fmul(_sums(builder, sums, i), scale)
            factor = _factor(builder, factors, stride, i)
            added.append(in_order(builder, _fma(builder, scaled, factor, builder.extract_value(rows, i))))
        return context.make_tuple(builder, Rows, added)

    return Rows(Rows, types.int64, f32x16, types.int64, types.int64), codegen


@operation(types.void, types.int64, types.int64, Rows)
def store_rows(builder, address, stride, rows):
    """Rows to memory, `stride` bytes apart."""
    for i in range(16):
        write(builder, _at(builder, address, stride, i), builder.extract_value(rows, i))


@operation(types.void, types.int64, types.int64, Rows)
def add_rows_to(builder, address, stride, rows):
    """Add rows to float32 in memory, `stride` bytes apart."""
    for i in range(16):
        at = _at(builder, address, stride, i)
        write(builder, at, builder.fadd(builder.extract_value(rows, i), read(builder, at, _FLOATS)))


@operation(types.void, types.int64, types.int64, types.int64, types.int64, types.int64)
def add_sums_to(builder, address, stride, sums, factors, factor_stride):
    """Add ``sums[i] * factors[i]`` to float32 in memory."""
    for i in range(16):
        at, factor = _at(builder, address, stride, i), _factor(builder, factors, factor_stride, i)
        write(builder, at, _fma(builder, _sums(builder, sums, i), factor, read(builder, at, _FLOATS)))
