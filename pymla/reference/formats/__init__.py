"""Types of tensors in NumPy: a module for a family of types, and the table of all.

Block layouts follow ``ggml-common.h`` and ``ggml-quants.c`` of llama.cpp; gguf-py's ``quants.py`` is the oracle of the
tests: `Format.dequantise` is bit-exact against it, `Format.quantise` byte-exact. Types of ik_llama.cpp are compared
with blocks that it dequantised itself.

In some of its types a row begins with a header, `ggml.ROW_HEADER` bytes. A `Format` then takes blocks each of which has
the header of its row in front.
"""

from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.reference.formats import (
    floats,
    ik_bitnet,
    ik_interleaved,
    ik_quants,
    ik_trellis,
    iq_quants,
    k_quants,
    legacy,
    small_floats,
    ternary,
)
from pymla.reference.formats.format import Codes, Format
from pymla.reference.formats.ik_interleaved import Interleaved

__all__ = [
    "FORMATS",
    "INTERLEAVED",
    "Codes",
    "Format",
    "Interleaved",
    "Unit",
    "blocks_of_rows",
    "dequantise_rows",
    "plain_blocks",
    "plain_rows",
    "split_rows",
    "unit_of",
    "write_headers",
]

FORMATS: dict[int, Format] = {
    ggml.F32: floats.F32,
    ggml.F16: floats.F16,
    ggml.BF16: floats.BF16,
    ggml.Q4_0: legacy.Q4_0,
    ggml.Q4_1: legacy.Q4_1,
    ggml.Q5_0: legacy.Q5_0,
    ggml.Q5_1: legacy.Q5_1,
    ggml.Q8_0: legacy.Q8_0,
    ggml.Q6_K: k_quants.Q6_K,
    ggml.Q2_K: k_quants.Q2_K,
    ggml.Q3_K: k_quants.Q3_K,
    ggml.Q4_K: k_quants.Q4_K,
    ggml.Q5_K: k_quants.Q5_K,
    ggml.IQ1_S: iq_quants.IQ1_S,
    ggml.IQ1_M: iq_quants.IQ1_M,
    ggml.IQ2_XXS: iq_quants.IQ2_XXS,
    ggml.IQ2_XS: iq_quants.IQ2_XS,
    ggml.IQ2_S: iq_quants.IQ2_S,
    ggml.IQ3_XXS: iq_quants.IQ3_XXS,
    ggml.IQ3_S: iq_quants.IQ3_S,
    ggml.IQ4_NL: iq_quants.IQ4_NL,
    ggml.IQ4_XS: iq_quants.IQ4_XS,
    ggml.TQ1_0: ternary.TQ1_0,
    ggml.TQ2_0: ternary.TQ2_0,
    ggml.Q1_0: ternary.Q1_0,
    ggml.Q2_0: ternary.Q2_0,
    ggml.MXFP4: small_floats.MXFP4,
    ggml.NVFP4: small_floats.NVFP4,
    ggml.Q6_0: ik_quants.Q6_0,
    ggml.IQ2_K: ik_quants.IQ2_K,
    ggml.IQ3_K: ik_quants.IQ3_K,
    ggml.IQ4_K: ik_quants.IQ4_K,
    ggml.IQ5_K: ik_quants.IQ5_K,
    ggml.IQ6_K: ik_quants.IQ6_K,
    ggml.IQ2_KS: ik_quants.IQ2_KS,
    ggml.IQ3_KS: ik_quants.IQ3_KS,
    ggml.IQ4_KS: ik_quants.IQ4_KS,
    ggml.IQ5_KS: ik_quants.IQ5_KS,
    ggml.IQ4_KSS: ik_quants.IQ4_KSS,
    ggml.IQ2_KL: ik_quants.IQ2_KL,
    ggml.Q8_KV: ik_quants.Q8_KV,
    ggml.IQ1_KT: ik_trellis.IQ1_KT,
    ggml.IQ2_KT: ik_trellis.IQ2_KT,
    ggml.IQ3_KT: ik_trellis.IQ3_KT,
    ggml.IQ4_KT: ik_trellis.IQ4_KT,
    ggml.IQ1_BN: ik_bitnet.IQ1_BN,
    ggml.IQ2_BN: ik_bitnet.IQ2_BN,
    ggml.IQ1_M_R1: iq_quants.IQ1_M_R1,
}

INTERLEAVED: dict[int, Interleaved] = {
    qtype: getattr(ik_interleaved, ggml.NAME[qtype]) for qtype, rows in ggml.ROWS_TOGETHER.items() if rows > 1
}


def dequantise_rows(data: np.ndarray, qtype: int, columns: int) -> np.ndarray:
    """Rows of any known type as float32.

    Parameters
    ----------
    data : uint8 array (rows, ``ggml.row_bytes(qtype, columns)``)
        Of an interleaved type a multiple of its rows.
    qtype : int
        A type of `FORMATS` or `INTERLEAVED`.
    columns : int
        A multiple of the type's block.

    Returns
    -------
    float32 array (rows, columns)
    """
    each, blocks = blocks_of_rows(data, qtype)
    return each.dequantise(blocks).reshape(len(data), columns)


def blocks_of_rows(data: np.ndarray, qtype: int) -> tuple[Format, np.ndarray]:
    """The blocks of rows, interleaved rows apart and row headers in front of every block, and what takes them.

    Parameters
    ----------
    data : uint8 array (rows, row_bytes)
    qtype : int
        A type of `FORMATS` or `INTERLEAVED`.

    Returns
    -------
    format : Format
        Of the plain type.
    blocks : uint8 array (n, header and block bytes)
    """
    header = ggml.ROW_HEADER[qtype]
    if qtype in INTERLEAVED:
        data, each = split_rows(data, qtype), INTERLEAVED[qtype].plain
    else:
        each = FORMATS[qtype]
    nbytes = ggml.BLOCK_BYTES[qtype]
    blocks = np.ascontiguousarray(data[:, header:]).reshape(len(data), (data.shape[1] - header) // nbytes, nbytes)
    if header:
        heads = np.broadcast_to(data[:, None, :header], (*blocks.shape[:2], header))
        blocks = np.concatenate([heads, blocks], axis=-1)
    return each, blocks.reshape(-1, blocks.shape[-1])


def split_rows(data: np.ndarray, qtype: int) -> np.ndarray:
    """Rows of an interleaved type as rows of their plain type: the same bits, in another order.

    Parameters
    ----------
    data : uint8 array (rows, row_bytes)
        A multiple of the type's rows.
    qtype : int
        A type of `INTERLEAVED`.

    Returns
    -------
    uint8 array (rows, row_bytes)
    """
    together, header, nbytes = ggml.ROWS_TOGETHER[qtype], ggml.ROW_HEADER[qtype], ggml.BLOCK_BYTES[qtype]
    groups, count = len(data) // together, (data.shape[1] - header) // nbytes
    whole = np.ascontiguousarray(data).reshape(groups, together * data.shape[1])
    heads, mixed = whole[:, : together * header], whole[:, together * header :]
    blocks = INTERLEAVED[qtype].split(np.ascontiguousarray(mixed).reshape(groups * count, together * nbytes))
    rows = blocks.reshape(groups, count, together, nbytes).swapaxes(1, 2).reshape(len(data), count * nbytes)
    return np.concatenate([heads.reshape(len(data), header), rows], axis=-1)


def plain_rows(data: np.ndarray, qtype: int) -> np.ndarray:
    """Rows of an interleaved type as rows of ``ggml.PLAIN[qtype]`` with the same weights, bit for bit.

    Parameters
    ----------
    data : uint8 array (rows, row_bytes)
        A multiple of the type's rows. Columns are a multiple of the plain type's block.
    qtype : int
        A type of `INTERLEAVED`.

    Returns
    -------
    uint8 array (rows, row_bytes of the plain type)
    """
    together, header, plain = ggml.ROWS_TOGETHER[qtype], ggml.ROW_HEADER[qtype], ggml.PLAIN[qtype]
    unit = unit_of(qtype)
    groups, units = len(data) // together, ggml.columns(qtype, data.shape[1]) // unit.weights
    whole = np.ascontiguousarray(data).reshape(groups, together * data.shape[1])
    heads, mixed = whole[:, : together * header], whole[:, together * header :]
    blocks = plain_blocks(np.ascontiguousarray(mixed).reshape(groups * units, unit.mixed_bytes), qtype)
    rows = np.empty((len(data), ggml.row_bytes(plain, units * unit.weights)), np.uint8)
    by_group = blocks.reshape(groups, units, together, unit.plain_bytes).swapaxes(1, 2)
    rows[:, ggml.ROW_HEADER[plain] :] = by_group.reshape(len(data), units * unit.plain_bytes)
    write_headers(rows, heads.reshape(len(data), header), qtype)
    return rows


class Unit(NamedTuple):
    """The smallest part of interleaved rows that is a part of plain ones."""

    weights: int  # of a row
    mixed_bytes: int  # of all rows that lie together
    plain_bytes: int  # of a row


def unit_of(qtype: int) -> Unit:
    """The unit of a type of `INTERLEAVED`."""
    plain = ggml.PLAIN[qtype]
    weights = max(ggml.BLOCK_SIZE[qtype], ggml.BLOCK_SIZE[plain])
    mixed = weights // ggml.BLOCK_SIZE[qtype] * ggml.ROWS_TOGETHER[qtype] * ggml.BLOCK_BYTES[qtype]
    return Unit(weights, mixed, weights // ggml.BLOCK_SIZE[plain] * ggml.BLOCK_BYTES[plain])


def plain_blocks(mixed: np.ndarray, qtype: int) -> np.ndarray:
    """Units of an interleaved type, uint8 (n, mixed_bytes), as blocks of its plain type: (n, rows, plain_bytes).

    Bytes that the header of a row knows are zero (`write_headers`).
    """
    each, together, nbytes = INTERLEAVED[qtype], ggml.ROWS_TOGETHER[qtype], ggml.BLOCK_BYTES[qtype]
    n, count = len(mixed), mixed.shape[1] // (together * nbytes)
    blocks = each.split(mixed.reshape(n * count, together * nbytes)).reshape(n, count, together, nbytes)
    rows = blocks.swapaxes(1, 2).reshape(n * together, count * nbytes)
    if each.join:
        rows = each.join(rows)
    return rows.reshape(n, together, rows.shape[1])


def write_headers(rows: np.ndarray, heads: np.ndarray, qtype: int) -> None:
    """Put the headers of interleaved rows where their plain type has them.

    Parameters
    ----------
    rows : uint8 array (n, row_bytes of the plain type)
        Written to.
    heads : uint8 array (n, header)
    qtype : int
        A type of `INTERLEAVED`.
    """
    plain, header = ggml.PLAIN[qtype], heads.shape[1]
    if ggml.ROW_HEADER[plain]:
        rows[:, :header] = heads
    elif header:  # a half, which every block of the plain type has
        at, nbytes = ggml.SCALES[plain].first, ggml.BLOCK_BYTES[plain]
        rows.reshape(len(rows), rows.shape[1] // nbytes, nbytes)[:, :, at : at + header] = heads[:, None]
    if plain == ggml.Q8_KV:
        sums = rows[:, 8:].view(np.int8).sum(axis=1, dtype=np.int32)
        rows[:, 4:8] = sums[:, None].view(np.uint8)
