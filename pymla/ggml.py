"""Types of tensors: block sizes of every type that is known, and a table of the types that pymla runs.

Block sizes of ggml's types come from the gguf package (``gguf.constants.GGML_QUANT_SIZES``), so that they have one
definition; those that older versions of it lack stand here, those of ik_llama.cpp in `pymla.ik_types`. A type is run
once it has a row of `TYPES`, functions in the ``formats`` folder of each backend, and a row of test cases.
"""

import math
from typing import NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from pymla.errors import PymlaError
from pymla.ik_types import IK_LAYOUTS, Layout

_NEWER_THAN_GGUF_0_17 = (
    Layout(39, "MXFP4", 32, 17),
    Layout(40, "NVFP4", 64, 36),
    Layout(41, "Q1_0", 128, 18),
    Layout(42, "Q2_0", 64, 18),
)
_LAYOUTS = (
    *_NEWER_THAN_GGUF_0_17,
    *(Layout(int(t), t.name, *GGML_QUANT_SIZES[t]) for t in GGMLQuantizationType),
    *IK_LAYOUTS,
)

NAME = {each.qtype: each.name for each in _LAYOUTS}
ID = {name: qtype for qtype, name in NAME.items()}
BLOCK_SIZE = {each.qtype: each.block_size for each in _LAYOUTS}
BLOCK_BYTES = {each.qtype: each.block_bytes for each in _LAYOUTS}
#: Bytes in front of a row's blocks.
ROW_HEADER = {each.qtype: each.row_header for each in _LAYOUTS}
#: Rows whose blocks lie together: more than 1 in types whose name ends in _R4, _R8 or _R16.
ROWS_TOGETHER = {each.qtype: each.rows_together for each in _LAYOUTS}


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
    """Bytes of a row of `columns` weights, its header included.

    Raises
    ------
    PymlaError
        `columns` is not a multiple of the type's block.
    """
    if columns % BLOCK_SIZE[qtype]:
        raise PymlaError(f"{columns} columns are no multiple of {NAME[qtype]}'s block of {BLOCK_SIZE[qtype]}")
    return ROW_HEADER[qtype] + columns // BLOCK_SIZE[qtype] * BLOCK_BYTES[qtype]


def tensor_bytes(qtype: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor whose rows have ``shape[-1]`` weights.

    Raises
    ------
    PymlaError
        Columns are no multiple of the type's block, or rows no multiple of those that lie together.
    """
    together, rows = ROWS_TOGETHER[qtype], shape[-2] if len(shape) > 1 else 1
    if rows % together:
        raise PymlaError(f"{rows} rows are no multiple of the {together} that lie together in {NAME[qtype]}")
    return row_bytes(qtype, shape[-1]) * math.prod(shape[:-1])
