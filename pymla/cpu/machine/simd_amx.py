"""Tiles of AMX: two-dimensional registers of the processor, and their dot instruction.

A product has three tiles: sums of 16 × 16 int32, codes of 16 rows (`BLOCK` bytes each, signed or not), and a panel of
`BLOCK` codes of 16 other rows, ``[BLOCK / 4][16][4]``. Kernels name tiles by number, as LLVM does not allocate them
here: 0 to 3 hold sums, 4 and 5 rows, 6 and 7 panels (`configure`). Sums leave a tile by way of memory, where float
registers take them from: `Rows` is sixteen of these, one for each row of a tile.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import (
    F32,
    I8,
    I32,
    I64,
    LITERAL,
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
from pymla.cpu.machine.lanes import fused, read_lanes, read_number, write_lanes
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
#: The tiles of the thread, as the NumPy functions see them: uint8 arrays of these shapes, between `configure` and
#: `release`.
_tiles = []


def _instruction(builder, name, tiles, *arguments):
    """Call an instruction on tiles of some numbers."""
    arguments = [*(ir.Constant(I8, each) for each in tiles), *arguments]
    kind = ir.FunctionType(ir.VoidType(), [each.type for each in arguments])
    builder.call(declare(builder, f"llvm.x86.{name}", kind.return_type, kind.args), arguments)


def _on_memory(name):
    """Emits an instruction on a tile and memory, given by an address and the bytes from row to row."""

    def emit(builder, tile, address, stride):
        _instruction(builder, name, [tile], builder.inttoptr(address, _POINTER), stride)

    return emit


def _on_tiles(name):
    """Emits an instruction on tiles."""
    return lambda builder, *tiles: _instruction(builder, name, tiles)


def _configure(builder):
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


@operation(types.void, emit=_configure)
def configure():
    """Give the tiles their shapes; they are there until `release` (ldtilecfg)."""
    _tiles[:] = (np.zeros(shape, np.uint8) for shape in _SHAPES)


@operation(types.void, emit=_on_tiles("tilerelease"))
def release():
    """Give the tiles back, which the system then need not save (tilerelease)."""
    _tiles.clear()


@operation(types.void, LITERAL, emit=_on_tiles("tilezero"))
def zero_tile(tile):
    """Zeros in a tile (tilezero)."""
    _tiles[tile][:] = 0


@operation(types.void, LITERAL, types.int64, types.int64, emit=_on_memory("tileloadd64"))
def load_tile(tile, address, stride):
    """A tile from memory: `stride` bytes from row to row (tileloadd)."""
    rows, width = _SHAPES[tile]
    _tiles[tile][:] = [read_lanes(address + stride * i, np.uint8, width) for i in range(rows)]


@operation(types.void, LITERAL, types.int64, types.int64, emit=_on_memory("tilestored64"))
def store_tile(tile, address, stride):
    """A tile to memory: `stride` bytes from row to row (tilestored)."""
    for i, row in enumerate(_tiles[tile]):
        write_lanes(address + stride * i, row)


def _dot(sums, rows, panel, code):
    """Add to a tile of sums the products of rows of codes, of a dtype, with a panel of signed ones."""
    x = _tiles[rows].view(code).astype(np.int32)
    y = _tiles[panel].view(np.int8).reshape(-1, 16, 4).transpose(0, 2, 1).reshape(-1, 16)
    _tiles[sums].view(np.int32)[:] += x @ y


@operation(types.void, LITERAL, LITERAL, LITERAL, emit=_on_tiles("tdpbssd"))
def dot_tiles(sums, rows, panel):
    """Add to a tile of sums the products of a tile of rows, signed bytes, with a panel (tdpbssd)."""
    _dot(sums, rows, panel, np.int8)


@operation(types.void, LITERAL, LITERAL, LITERAL, emit=_on_tiles("tdpbusd"))
def dot_tiles_u8(sums, rows, panel):
    """`dot_tiles` for rows of bytes from 0 to 255 (tdpbusd)."""
    _dot(sums, rows, panel, np.uint8)


@inlined
def zero_four():
    """Zeros in tiles 0 to 3."""
    zero_tile(0)
    zero_tile(1)
    zero_tile(2)
    zero_tile(3)


@inlined
def store_four(address):
    """Tiles 0 to 3 to memory, one behind the other."""
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


def _sums_at(address):
    """Sums, int32 (16, 16) in memory, as float32."""
    return read_lanes(address, np.int32, 256).reshape(16, 16).astype(np.float32)


def _factor(builder, address, stride, row):
    """A row's own factor in all lanes."""
    return splat(builder, read(builder, _at(builder, address, stride, row), F32), 16)


def _factors_at(address, stride):
    """The factors of the rows, each in sixteen lanes."""
    return [np.full(16, read_number(address + stride * i, np.float32)) for i in range(16)]


@operation(Rows, emit=lambda builder: [constant(_FLOATS, 0.0)] * 16)
def zero_rows():
    """Rows of zeros."""
    return tuple(np.zeros((16, 16), np.float32))


def _add_sums(builder, rows, sums, scale):
    return [
        in_order(builder, _fma(builder, _sums(builder, sums, i), scale, builder.extract_value(rows, i)))
        for i in range(16)
    ]


@operation(Rows, Rows, types.int64, f32x16, emit=_add_sums)
def add_sums(rows, sums, scale):
    """``rows[i] + sums[i] * scale``; `sums` is the address of a tile's."""
    return tuple(fused(each, scale, row) for row, each in zip(rows, _sums_at(sums), strict=True))


def _add_scaled_sums(builder, rows, sums, scale, factors, stride):
    added = []
    for i in range(16):
        scaled = builder.fmul(_sums(builder, sums, i), scale)
        factor = _factor(builder, factors, stride, i)
        added.append(in_order(builder, _fma(builder, scaled, factor, builder.extract_value(rows, i))))
    return added


@operation(Rows, Rows, types.int64, f32x16, types.int64, types.int64, emit=_add_scaled_sums)
def add_scaled_sums(rows, sums, scale, factors, stride):
    """``rows[i] + sums[i] * scale * factors[i]``; `factors` is the address of float32, `stride` bytes apart."""
    scaled = zip(_sums_at(sums) * scale, _factors_at(factors, stride), rows, strict=True)
    return tuple(fused(each, factor, row) for each, factor, row in scaled)


def _store_rows(builder, address, stride, rows):
    for i in range(16):
        write(builder, _at(builder, address, stride, i), builder.extract_value(rows, i))


@operation(types.void, types.int64, types.int64, Rows, emit=_store_rows)
def store_rows(address, stride, rows):
    """Rows to memory, `stride` bytes apart."""
    for i, row in enumerate(rows):
        write_lanes(address + stride * i, row)


def _add_rows_to(builder, address, stride, rows):
    for i in range(16):
        at = _at(builder, address, stride, i)
        write(builder, at, builder.fadd(builder.extract_value(rows, i), read(builder, at, _FLOATS)))


@operation(types.void, types.int64, types.int64, Rows, emit=_add_rows_to)
def add_rows_to(address, stride, rows):
    """Add rows to float32 in memory, `stride` bytes apart."""
    for i, row in enumerate(rows):
        write_lanes(address + stride * i, row + read_lanes(address + stride * i, np.float32, 16))


def _add_sums_to(builder, address, stride, sums, factors, factor_stride):
    for i in range(16):
        at, factor = _at(builder, address, stride, i), _factor(builder, factors, factor_stride, i)
        write(builder, at, _fma(builder, _sums(builder, sums, i), factor, read(builder, at, _FLOATS)))


@operation(types.void, types.int64, types.int64, types.int64, types.int64, types.int64, emit=_add_sums_to)
def add_sums_to(address, stride, sums, factors, factor_stride):
    """Add ``sums[i] * factors[i]`` to float32 in memory, rows `stride` bytes apart."""
    for i, (row, factor) in enumerate(zip(_sums_at(sums), _factors_at(factors, factor_stride), strict=True)):
        write_lanes(address + stride * i, fused(row, factor, read_lanes(address + stride * i, np.float32, 16)))
