"""Types of tensors: block sizes of every ggml type, and a table of the types that pymla runs.

Block sizes come from the gguf package (``gguf.constants.GGML_QUANT_SIZES``), so that they have one definition. A type
is added by a row of `TYPES`, its functions in the ``formats`` folder of each backend, and a row of test cases.
"""

from typing import NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from pymla.errors import PymlaError

NAME = {int(t): t.name for t in GGMLQuantizationType}
ID = {name: qtype for qtype, name in NAME.items()}
BLOCK_SIZE = {int(t): size for t, (size, _) in GGML_QUANT_SIZES.items()}
BLOCK_BYTES = {int(t): nbytes for t, (_, nbytes) in GGML_QUANT_SIZES.items()}


class Type(NamedTuple):
    """What programs besides the backends' kernels have to know of a type."""

    qtype: int
    #: Whether products are taken on integers, with activations quantised to int8. Others are taken in float32.
    is_quantised: bool
    #: Bytes of a block at which IEEE halves begin: its scale, and its minimum where it has one.
    halves: tuple[int, ...] = ()
    #: Bytes of a block, from the first to the one behind the last, that are int8 scales, which the half multiplies.
    int8_scales: tuple[int, int] | None = None


# The numbers are plain integers, because Numba compiles them into kernels.
_ROWS = (
    Type(F32 := 0, False),
    Type(F16 := 1, False),
    Type(BF16 := 30, False),
    Type(Q4_0 := 2, True, halves=(0,)),
    Type(Q4_1 := 3, True, halves=(0, 2)),
    Type(Q5_0 := 6, True, halves=(0,)),
    Type(Q5_1 := 7, True, halves=(0, 2)),
    Type(Q8_0 := 8, True, halves=(0,)),
    Type(Q6_K := 14, True, halves=(208,), int8_scales=(192, 208)),
)

#: The types that every backend runs, by number.
TYPES: dict[int, Type] = {row.qtype: row for row in _ROWS}
SUPPORTED = tuple(TYPES)
#: Those whose products are taken on integers.
QUANTISED = tuple(qtype for qtype, row in TYPES.items() if row.is_quantised)


def row_bytes(qtype: int, columns: int) -> int:
    """Bytes of a row of `columns` weights.

    Raises
    ------
    PymlaError
        `columns` is not a multiple of the type's block.
    """
    if columns % BLOCK_SIZE[qtype]:
        raise PymlaError(f"{columns} columns are no multiple of {NAME[qtype]}'s block of {BLOCK_SIZE[qtype]}")
    return columns // BLOCK_SIZE[qtype] * BLOCK_BYTES[qtype]
