"""From functions that read 32 weights of one block to a type: blocks of up to 256 weights, and rows with headers."""

import math

from pymla import ggml
from pymla.cuda.formats.codes import (
    dot,
    dot_of_halves,
    dot_with_minima,
    dot_with_minimum,
    weights_of,
    weights_with_minima,
)
from pymla.cuda.formats.format import Format
from pymla.cuda.runtime.jit import device


def alignment_of(qtype):
    """What divides the addresses of a type's blocks, 16 at most."""
    return math.gcd(16, ggml.ROW_HEADER[qtype], ggml.BLOCK_BYTES[qtype])


def format_of_blocks(qtype, piece, whole, halves=False, minimum=False, minima=False, row_scale=None):
    """A `Format`.

    Parameters
    ----------
    qtype : int
    piece : device function (block, i, w)
        `Format.piece` of the 32 weights with number i of a block at an address, without the scale of the row.
    whole : device function (block, i)
        `Format.block` of these, in shared memory.
    halves, minimum, minima, row_scale
        As in `Format`.
    """
    header, nbytes, blocks = ggml.ROW_HEADER[qtype], ggml.BLOCK_BYTES[qtype], ggml.BLOCK_SIZE[qtype] // 32
    shift, last = blocks.bit_length() - 1, blocks - 1

    @device
    def block(at, i):
        return whole(at + nbytes * (i >> shift), i & last)

    @device
    def piece_of_row(row, block, w):
        return piece(row + header + nbytes * (block >> shift), block & last, w)

    @device
    def scaled_piece(row, block, w):
        c0, c1, d, other = piece_of_row(row, block, w)
        scale = row_scale(row)
        return c0, c1, scale * d, scale * other

    return Format(
        scaled_piece if row_scale else piece_of_row,
        weights_with_minima if minima else weights_of(halves, minimum),
        block,
        dot_with_minima if minima else dot_of_halves if halves else dot_with_minimum if minimum else dot,
        halves,
        minimum,
        minima,
        row_scale,
    )
