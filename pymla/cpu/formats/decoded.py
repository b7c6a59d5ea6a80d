"""Types whose codes and scales can be decoded in the order of the columns: what makes a `Format` of their functions.

A type says how 256 weights become registers of codes and the scales of their small blocks, of 16 or 32 weights
(`Decoder`). Products by rows multiply these registers with the activations (`decoded_rows`); panels are the same
registers, transposed (`decoded_panels`).
"""

from pymla.cpu.formats.decoded_panels import unpack_for
from pymla.cpu.formats.decoded_rows import dot_four_for, dot_tokens_for
from pymla.cpu.formats.format import Format
from pymla.cpu.machine.orders import COLUMNS, EIGHTS
from pymla.cpu.machine.simd import (
    add,
    bytes_to_f32,
    fma,
    splat_sixteens,
)
from pymla.cpu.runtime.compiling import inlined


def format_of(decoder):
    """The `Format` of a type that can be decoded."""
    return Format(
        _add_block_for(decoder),
        dot_four=dot_four_for(decoder),
        dot_tokens=dot_tokens_for(decoder),
        order=COLUMNS if decoder.load_eights is None else EIGHTS,
        unpack=unpack_for(decoder),
        code_bits=decoder.code_bits,
        scale_each=decoder.scale_each,
        zero_point=decoder.zero_point,
        minimum_each=decoder.each if decoder.load_minima else 0,
        bytes_256=decoder.nbytes,
    )


def _add_block_for(decoder):
    header, has_minimum = decoder.header, decoder.load_minimum is not None
    load_codes_32, load_scale, load_minimum = decoder.load_codes_32, decoder.load_scale, decoder.load_minimum

    if has_minimum:

        @inlined
        def add_block(row, block, weight, acc):
            low, high = load_minimum(row + header, block)
            acc = add(acc, splat_sixteens(weight * low, weight * high))
            low, high = load_scale(row, row + header, block)
            codes = bytes_to_f32(load_codes_32(row + header, block))
            return fma(codes, splat_sixteens(weight * low, weight * high), acc)

    else:

        @inlined
        def add_block(row, block, weight, acc):
            low, high = load_scale(row, row + header, block)
            codes = bytes_to_f32(load_codes_32(row + header, block))
            return fma(codes, splat_sixteens(weight * low, weight * high), acc)

    return add_block
