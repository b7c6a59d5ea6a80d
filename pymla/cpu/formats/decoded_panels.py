"""Panels of types that can be decoded (gemm): rows are decoded to a scratch memory, and transposed from there."""

from pymla.cpu.formats.decoder import REGISTER, REGISTERS, no_minima
from pymla.cpu.formats.panels import DECODED_ROW, store_columns, store_columns_twice
from pymla.cpu.machine.simd import (
    store_f32,
    store_f32x8,
    store_i8x32,
    store_i8xL,
)
from pymla.cpu.machine.simd_decoded import (
    add_i8,
    store_f32x16,
)
from pymla.cpu.machine.simd_panels import load_columns, panel_rows
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.cpu.runtime.isa import AMX, LANES, VNNI

#: Where a decoded row has its scales and minima, float32, behind the codes of 256 columns.
ROW_SCALES, ROW_MINIMA = 256, 256 + 64


def unpack_for(decoder):
    """Make `unpack`."""
    header, nbytes = decoder.header, decoder.nbytes
    decode, decode_rest, take = _decode_for(decoder), _decode_rest_for(decoder), _take_for(decoder)

    has_rest, minimum_bytes = decoder.has_rest, 128 * LANES // decoder.each
    scale_bytes = 32 // decoder.scale_each * 4 * LANES

    @helper
    def unpack(rows, first, count, codes, scales, minima, scratch):
        for start in range(first, first + count, 8):
            blocks, at = min(8, first + count - start), scratch
            for row in rows:
                if has_rest and blocks < 8:
                    decode_rest(row, row + header, start, blocks, at)
                else:
                    decode(row, row + header + start // 8 * nbytes, at)
                at += DECODED_ROW
            take(scratch, blocks, codes, scales, minima)
            codes, scales = codes + 32 * LANES * blocks, scales + scale_bytes * blocks
            minima += minimum_bytes * blocks

    return unpack


def _panel_add(decoder, offset):
    """What is added to codes that are `offset` too large, so that they are as tiles take them: `tile_16` takes signed
    codes as `simd_panels.panel_codes8` makes them, tiles of AMX signed codes, `tile_32` unsigned ones."""
    if decoder.scale_each == 32:
        return (0 if AMX else decoder.zero_point) - offset
    return (128 if VNNI else 0) - offset


def _decode_for(decoder):
    """Make a function that decodes 256 columns of a row to scratch memory."""
    load_codes, load_scales, load_minima = decoder.load_codes, decoder.load_scales, decoder.load_minima or no_minima
    add, has_minima = _panel_add(decoder, decoder.offset), decoder.load_minima is not None
    store_minima = store_f32x8 if decoder.each == 32 else store_f32x16
    store_scales, multiples = store_minima, decoder.multiples
    if multiples:
        load_codes, add, load_scales, store_scales = multiples.load_codes, 0, multiples.load_scales, store_f32x8

    @inlined
    def put(at, codes):
        store_i8xL(at, add_i8(codes, add) if add != 0 else codes)

    @helper
    def decode(row, address, at):
        put(at, load_codes(address, 0))
        put(at + REGISTER, load_codes(address, 1))
        put(at + 2 * REGISTER, load_codes(address, 2))
        put(at + 3 * REGISTER, load_codes(address, 3))
        if REGISTERS == 8:
            put(at + 4 * REGISTER, load_codes(address, 4))
            put(at + 5 * REGISTER, load_codes(address, 5))
            put(at + 6 * REGISTER, load_codes(address, 6))
            put(at + 7 * REGISTER, load_codes(address, 7))
        store_scales(at + ROW_SCALES, load_scales(row, address))
        if has_minima:
            store_minima(at + ROW_MINIMA, load_minima(address))

    return decode


def _decode_rest_for(decoder):
    """Make a function that decodes fewer blocks of 32 columns, of types with smaller blocks. They have no minima."""
    load_codes_32, load_scale = decoder.load_codes_32, decoder.load_scale
    add, scales_each = _panel_add(decoder, 0), 32 // decoder.each

    @helper
    def decode_rest(row, address, first, blocks, at):
        for i in range(blocks):
            codes = load_codes_32(address, first + i)
            store_i8x32(at + 32 * i, add_i8(codes, add) if add != 0 else codes)
            low, high = load_scale(row, address, first + i)
            store_f32(at + ROW_SCALES + 4 * scales_each * i, low)
            if scales_each == 2:
                store_f32(at + ROW_SCALES + 8 * i + 4, high)

    return decode_rest


def _take_for(decoder):
    """Make a function that turns decoded rows into blocks of a panel."""
    # Minima of 32 columns, and scales that a decoded row has of them.
    minima_32, has_minima = 32 // decoder.each, decoder.load_minima is not None
    scales_32 = 1 if decoder.multiples else minima_32
    twice = 32 // decoder.scale_each > scales_32

    @helper
    def take(scratch, blocks, codes, scales, minima):
        rows = panel_rows(scratch, DECODED_ROW, LANES)
        for i in range(2 * blocks):
            store_columns(codes + 16 * LANES * i, load_columns(rows, 16 * i))
        # Four numbers of each row at a time; the last of them may be for blocks that do not count.
        for i in range((scales_32 * blocks + 3) // 4):
            fours = load_columns(rows, ROW_SCALES + 16 * i)
            if twice:
                store_columns_twice(scales + 32 * LANES * i, fours)
            else:
                store_columns(scales + 16 * LANES * i, fours)
        if has_minima:
            for i in range((minima_32 * blocks + 3) // 4):
                store_columns(minima + 16 * LANES * i, load_columns(rows, ROW_MINIMA + 16 * i))

    return take
