"""Operations that are made for types whose codes are no bit planes: their NumPy functions against the reference. Their
machine code is compared with the reference by tests/test_cpu_formats.py."""

import numpy as np
import pytest
from cases import random_bytes

from pymla import ggml
from pymla.cpu.machine import simd_ik, simd_trellis, simd_trits, simd_vectors
from pymla.cpu.machine.orders import COLUMNS, EIGHTS, columns_of
from pymla.cpu.runtime.isa import LANES
from pymla.reference import formats
from pymla.trellis import TRELLISES
from pymla.trits import TRITS
from pymla.vectors import VECTORS

ORDERS = [COLUMNS, EIGHTS] if LANES == 16 else [COLUMNS]


def makers(qtype):
    """Of a type: what makes ``load_codes`` by offset and order, and its ``load_codes_32``."""
    if qtype in VECTORS:
        each = VECTORS[qtype]
        return lambda *given: simd_vectors.load_codes_for(qtype, each, *given), simd_vectors.load_codes_32_for(
            qtype, each
        )
    if qtype in TRELLISES:
        each = TRELLISES[qtype]
        return lambda *given: simd_trellis.load_codes_for(qtype, each, *given), simd_trellis.load_codes_32_for(
            qtype, each
        )
    if qtype in TRITS:
        each = TRITS[qtype]
        return lambda _, order: simd_trits.load_codes_for(qtype, each, order), simd_trits.load_codes_32_for(qtype, each)
    name = ggml.NAME[qtype].lower()
    return getattr(simd_ik, f"load_codes_{name}"), getattr(simd_ik, f"load_codes_32_{name}")


def codes_of(qtype, row):
    """A row's codes, int8 (K,), by the reference."""
    form, blocks = formats.blocks_of_rows(row[None], qtype)
    return form.codes(blocks).codes.reshape(-1)


QTYPES = [*VECTORS, *TRELLISES, *TRITS, ggml.IQ4_KSS, ggml.IQ2_KL]


@pytest.mark.parametrize("qtype", QTYPES, ids=ggml.NAME.get)
def test_codes(qtype):
    row = random_bytes(qtype, 1, 512)[0]
    expected, at = codes_of(qtype, row), row.ctypes.data + ggml.ROW_HEADER[qtype]
    load_codes_for, load_codes_32 = makers(qtype)
    codes = [load_codes_32(at, block) for block in range(16)]
    np.testing.assert_array_equal(np.concatenate(codes), expected)
    second = at + 256 // ggml.BLOCK_SIZE[qtype] * ggml.BLOCK_BYTES[qtype]
    for order in ORDERS:
        load_codes = load_codes_for(1, order)
        for r in range(64 // LANES):
            found = load_codes(second, r).view(np.int8)
            np.testing.assert_array_equal(found, expected[256:][columns_of(order, r)] + np.int8(1))


@pytest.mark.parametrize("qtype", [q for q in VECTORS if ggml.NAME[q].startswith(("IQ1", "IQ2"))], ids=ggml.NAME.get)
def test_codes_of_four_rows(qtype):
    rows = random_bytes(qtype, 4, 256)
    addresses = [row.ctypes.data for row in rows]
    high, low, other_high, other_low = simd_vectors.look_up_four_for(qtype, VECTORS[qtype])(*addresses)
    first, second = simd_vectors.load_found_for(qtype, VECTORS[qtype], 43)
    for i, load_eights in enumerate((first, second, first, second)):
        found = (high, low) if i < 2 else (other_high, other_low)
        for r in range(4):
            codes = load_eights(*found, addresses[i], r)[: 4 * LANES].astype(np.int16)
            expected = codes_of(qtype, rows[i])[columns_of(EIGHTS, r)].astype(np.int16) + 43
            np.testing.assert_array_equal(codes, expected[: 4 * LANES])
