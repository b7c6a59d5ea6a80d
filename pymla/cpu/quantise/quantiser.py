"""What a type needs to be written: a function of one block, and the memory that it works in."""

from typing import NamedTuple

from pymla.cpu.runtime.compiling import Helper

#: The least importance that a weight has, relative to the largest one of its block: so that columns that no calibration
#: text ever reached are not thrown away.
LEAST = 2.0**-20


class Quantiser(NamedTuple):
    """How weights become a type of tensors.

    `block` is a Numba helper ``(x, w, block, scratch)``. It writes the block that minimises
    ``sum(w * (x - dequantised)**2)``, or one near it, and no scale that is NaN or infinite, for any finite weights:

    - `x`: float32 (block size,), finite
    - `w`: float32 (block size,), the importance of each weight: from `LEAST` to 1, and 1 at least once
    - `block`: uint8 (block bytes,), written to, all of it
    - `scratch`: float32 (scratch,), the thread's own, with anything in it

    Where `whole_rows` is set, as types need whose rows have a header, it takes a whole row of K weights in place of a
    block: ``row_bytes`` bytes, the header first, and `scratch` + K numbers to work in.
    """

    block: Helper
    scratch: int = 1
    whole_rows: bool = False
