"""Types of tensors: numbers, sizes and scales of all types that are known, and the types that pymla runs.

Block sizes of ggml's types come from the gguf package (``gguf.constants.GGML_QUANT_SIZES``), so that they have one
definition; those that older versions of it lack stand here, those of ik_llama.cpp in `pymla.ik_types`. A type is run
once `SUPPORTED` names it and the ``formats`` folder of each backend has its functions.
"""

import math
from typing import NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from pymla.errors import PymlaError
from pymla.ik_types import IK_LAYOUTS, IQ1_M_ROWS, Layout

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
    IQ1_M_ROWS,
)

NAME = {each.qtype: each.name for each in _LAYOUTS}
ID = {name: qtype for qtype, name in NAME.items()}
BLOCK_SIZE = {each.qtype: each.block_size for each in _LAYOUTS}
BLOCK_BYTES = {each.qtype: each.block_bytes for each in _LAYOUTS}
#: Bytes in front of a row's blocks.
ROW_HEADER = {each.qtype: each.row_header for each in _LAYOUTS}
#: Rows whose blocks lie together: more than 1 in types whose name ends in _R4, _R8 or _R16.
ROWS_TOGETHER = {each.qtype: each.rows_together for each in _LAYOUTS}

# The numbers are plain integers, because Numba compiles them into kernels.
F32 = 0
F16 = 1
Q4_0 = 2
Q4_1 = 3
Q5_0 = 6
Q5_1 = 7
Q8_0 = 8
Q2_K = 10
Q3_K = 11
Q4_K = 12
Q5_K = 13
Q6_K = 14
IQ2_XXS = 16
IQ2_XS = 17
IQ3_XXS = 18
IQ1_S = 19
IQ4_NL = 20
IQ3_S = 21
IQ2_S = 22
IQ4_XS = 23
IQ1_M = 29
BF16 = 30
TQ1_0 = 34
TQ2_0 = 35
MXFP4 = 39
NVFP4 = 40
Q1_0 = 41
Q2_0 = 42
# Of ik_llama.cpp.
Q6_0 = 133
IQ1_BN = 134
IQ2_BN = 135
IQ2_K = 137
IQ3_K = 138
IQ4_K = 139
IQ5_K = 140
IQ6_K = 141
IQ4_KS = 144
IQ2_KS = 145
IQ4_KSS = 146
Q8_KV = 151
IQ5_KS = 152
IQ2_KT = 153
IQ3_KT = 154
IQ4_KT = 155
IQ3_KS = 156
IQ2_KL = 157
IQ1_KT = 158
# Of no file: rows of IQ1_M_R4 by themselves.
IQ1_M_R1 = -229
# Of ik_llama.cpp, with the blocks of several rows together.
Q4_0_R8 = 202
Q5_0_R4 = 206
Q8_0_R8 = 208
Q2_K_R4 = 210
Q3_K_R4 = 211
Q4_K_R4 = 212
Q5_K_R4 = 213
Q6_K_R4 = 214
IQ2_XXS_R4 = 216
IQ2_XS_R4 = 217
IQ3_XXS_R4 = 218
IQ1_S_R4 = 219
IQ4_NL_R4 = 220
IQ3_S_R4 = 221
IQ2_S_R4 = 222
IQ4_XS_R8 = 223
IQ1_M_R4 = 229
BF16_R16 = 230
Q6_0_R4 = 233
IQ2_BN_R4 = 335
IQ2_K_R4 = 337
IQ3_K_R4 = 338
IQ4_K_R4 = 339
IQ5_K_R4 = 340
IQ4_KS_R4 = 344
IQ5_KS_R4 = 352
MXFP4_R8 = 353
Q8_K_R16 = 397
Q8_KV_R8 = 398
Q8_K_R8 = 399


#: Types whose weights are floats. Products with them are taken in float32; those with other types on integers, with
#: activations quantised to int8.
FLOATS = (F32, F16, BF16)

#: The types that every backend runs.
SUPPORTED = (
    *(F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0),
    *(Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4, NVFP4, TQ1_0, TQ2_0, Q1_0, Q2_0),
    *(IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S),
    *(Q6_0, Q8_KV, IQ2_K, IQ3_K, IQ4_K, IQ5_K, IQ6_K, IQ2_KS, IQ3_KS, IQ4_KS, IQ5_KS, IQ4_KSS, IQ2_KL),
    *(IQ1_KT, IQ2_KT, IQ3_KT, IQ4_KT, IQ1_BN, IQ2_BN, IQ1_M_R1),
)

#: Those whose products are taken on integers.
QUANTISED = tuple(qtype for qtype in SUPPORTED if qtype not in FLOATS)


class Scales(NamedTuple):
    """The numbers that the weights of a block are multiples of, or those of a row where its header has them.

    If all of them are zero, so are the weights; if one of them is NaN or infinite, so are some of the weights.
    """

    #: Of a number: "f32", "f16", "bf16", "e8m0" or "e4m3"; "nibbles": the highest four bits of four words of 16 bits
    #: are an IEEE half, its lowest bits first.
    kind: str = "f16"
    #: The byte at which they begin, of a block, or of a row with a header.
    first: int = 0
    #: Numbers, one behind the other: of a type with minima scale and minimum. Where rows lie together, all of their
    #: scales come before all of their minima.
    numbers: int = 1


_SCALES = {
    F32: Scales("f32"),
    BF16: Scales("bf16"),
    Q2_K: Scales(first=80, numbers=2),
    Q3_K: Scales(first=108),
    Q6_K: Scales(first=208),
    IQ1_M: Scales("nibbles", first=48),
    IQ1_M_R1: Scales(first=56),
    TQ1_0: Scales(first=52),
    TQ2_0: Scales(first=64),
    MXFP4: Scales("e8m0"),
    NVFP4: Scales("e4m3", numbers=4),
    **dict.fromkeys((Q4_1, Q5_1, Q4_K, Q5_K), Scales(numbers=2)),
}


#: The plain types that interleaved rows become when they are loaded (`pymla.models.interleaved`).
PLAIN = {each.qtype: ID[each.name.rpartition("_")[0]] for each in _LAYOUTS if each.rows_together > 1}
PLAIN |= {Q8_K_R8: Q8_0, Q8_K_R16: Q8_0, IQ1_M_R4: IQ1_M_R1}


def plain_type(qtype: int) -> int:
    """The type as which weights of a file are loaded: another one where rows lie together."""
    return PLAIN.get(qtype, qtype)


def _scales(each: Layout) -> Scales:
    if each.row_header:
        return Scales("f16" if each.row_header == 2 else "f32", numbers=each.rows_together)
    if each.rows_together == 1:
        return _SCALES.get(each.qtype, Scales())
    plain = PLAIN[each.qtype]
    kind, _, numbers = _SCALES.get(plain, Scales())
    return Scales(kind, 0, each.rows_together * (each.block_size if plain in FLOATS else numbers))


#: The scales of every type, of IEEE halves at the beginning of a block where nothing else is said.
SCALES = {each.qtype: _scales(each) for each in _LAYOUTS}


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


def columns(qtype: int, nbytes: int) -> int:
    """Weights of a row of `nbytes` bytes: the inverse of `row_bytes`."""
    return (nbytes - ROW_HEADER[qtype]) // BLOCK_BYTES[qtype] * BLOCK_SIZE[qtype]


def unit_bytes(qtype: int, columns: int) -> int:
    """Bytes of the smallest part of a tensor that has scales of its own: a block, or a row with a header; of all the
    rows that lie together."""
    own = row_bytes(qtype, columns) if ROW_HEADER[qtype] else BLOCK_BYTES[qtype]
    return ROWS_TOGETHER[qtype] * own
