"""What the types' functions for panels share: writing four registers of codes.

A panel has `LANES` rows of weights side by side, as ``[K / 4][LANES][4]`` codes.
"""

from pymla.cpu.machine.simd import store_f32xL, store_i8xL
from pymla.cpu.machine.simd_panels import panel_codes8
from pymla.cpu.runtime.compiling import helper
from pymla.cpu.runtime.isa import LANES, VNNI

#: Bytes of a row of a panel that is decoded before it is transposed: codes of 256 columns, and their scales and minima.
DECODED_ROW = 256 + 64 + 64

#: Of types whose codes take more than 5 bits and have a scale for 32 weights: how many weights have a scale in a panel,
#: and what is added to signed codes so that `tile_32` takes them. Without VNNI, panels have the scale twice.
SCALE_EACH, ZERO_POINT = (32, 128) if VNNI else (16, 0)


@helper
def store_columns(out, columns):
    """Write sixteen columns of a panel: the four registers of `simd_panels.load_columns`, to the address `out`."""
    a, b, c, d = columns
    store_i8xL(out, a)
    store_i8xL(out + 4 * LANES, b)
    store_i8xL(out + 8 * LANES, c)
    store_i8xL(out + 12 * LANES, d)


@helper
def store_columns8(out, codes):
    """The same for signed codes of 8 bits with a scale for 16 weights, as `simd_panels.dot8` takes them."""
    a, b, c, d = codes
    store_columns(out, (panel_codes8(a), panel_codes8(b), panel_codes8(c), panel_codes8(d)))


@helper
def store_twice(out, scales):
    """Write the scales of a block of 32 weights as those of its two sixteens."""
    store_f32xL(out, scales)
    store_f32xL(out + 4 * LANES, scales)


@helper
def store_columns_twice(out, columns):
    """Write four registers, each of them twice: scales of blocks of 32 weights as those of their two sixteens."""
    a, b, c, d = columns
    store_columns(out, (a, a, b, b))
    store_columns(out + 16 * LANES, (c, c, d, d))
