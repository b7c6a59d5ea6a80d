"""Every type of the reference: those of llama.cpp against gguf-py, those of ik_llama.cpp against its golden blocks."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from pymla import ggml
from pymla.errors import PymlaError
from pymla.ik_types import IK_LAYOUTS, IQ1_M_ROWS
from pymla.reference import quant
from pymla.reference.formats import (
    FORMATS,
    INTERLEAVED,
    bits,
    blocks_of_rows,
    dequantise_rows,
    ik_quants,
    ik_trellis,
    split_rows,
)

GOLDEN = Path(__file__).parent / "golden" / "types.npz"
DOCUMENT = Path(__file__).parents[1] / "docs" / "types.md"

#: Types that gguf-py dequantises: the bytes of a block at which its halves begin.
HALVES = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    **{"IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,)},
    **{"IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,)},
    **{"IQ1_M": (), "MXFP4": (), "NVFP4": ()},
}
#: Those that it quantises, too.
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")

#: Types whose zeros may have another sign than ik_llama.cpp's: it adds a minimum to products, or gives a zero a sign.
ZEROS = ("Q5_0_R4", "Q6_0_R4", "Q8_K_R16", "IQ3_KT")
#: Its reader of this type takes levels from a polynomial, not from the table that it quantises and multiplies with.
APPROXIMATED = ("IQ6_K",)
#: Types whose signs are encoded anew, each bit by two.
ENCODED_SIGNS = ("IQ2_XXS_R4", "IQ2_XS_R4", "IQ3_XXS_R4")


def same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype == np.float32
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), is_nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~is_nan], expected.view(np.uint32)[~is_nan])


def oracle(data: np.ndarray, name: str) -> np.ndarray:
    return np.ascontiguousarray(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]), np.float32)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def names_of_golden() -> list[str]:
    with np.load(GOLDEN) as file:
        return [name for name in file.files if not name.endswith(".weights")]


def test_every_type_is_compared():
    compared = HALVES.keys() | {name.split(".")[0] for name in names_of_golden()} | {"F32", "F16", "BF16"}
    compared |= {"IQ1_M_R1"}  # with the rows that it is made of, in test_interleaved
    assert compared == {ggml.NAME[qtype] for qtype in FORMATS.keys() | INTERLEAVED.keys()}


@pytest.mark.parametrize("qtype", FORMATS.keys() | INTERLEAVED.keys(), ids=ggml.NAME.get)
def test_numbers_have_names(qtype):
    assert getattr(ggml, ggml.NAME[qtype]) == qtype


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", HALVES)
def test_random_bytes_are_as_in_gguf(name):
    """Scales are halves of every kind: zeros, subnormal numbers, infinities and NaN."""
    qtype = ggml.ID[name]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (128, 128, ggml.BLOCK_BYTES[qtype]), np.uint8)
    for at in HALVES[name]:
        halves = np.concatenate([[0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7BFF], rng.permutation(1 << 16)])
        data[..., at : at + 2] = halves[: data[..., 0].size].astype("<u2").reshape(128, 128, 1).view(np.uint8)
    rows = data.reshape(128, -1)
    same_bits(dequantise_rows(rows, qtype, 128 * ggml.BLOCK_SIZE[qtype]), oracle(rows, name))


@pytest.mark.parametrize("name", QUANTISED)
def test_weights_that_gguf_quantised(name):
    x = np.random.default_rng(1).standard_normal((5, 768), np.float32)
    data = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
    actual = dequantise_rows(data, ggml.ID[name], 768)
    same_bits(actual, oracle(data, name))
    assert np.abs(actual - x).max() < 2


@pytest.mark.parametrize("name", names_of_golden())
def test_golden_blocks(golden, name):
    typename, data, expected = name.split(".")[0], golden[name], golden[f"{name}.weights"]
    qtype, columns = ggml.ID[typename], expected.shape[1]
    assert data.shape[1] == ggml.row_bytes(qtype, columns)
    actual = dequantise_rows(data, qtype, columns)
    if typename in APPROXIMATED:
        scales = data.reshape(-1, 212)[:, :2].copy().view(np.float16).astype(np.float32)
        levels = np.abs(scales * data.reshape(-1, 212)[:, 4:20].view(np.int8)).repeat(16)
        assert (np.abs(actual - expected).reshape(-1) <= 0.488 * levels).all()
    elif typename in ZEROS:
        np.testing.assert_array_equal(actual, expected)
    else:
        same_bits(actual, expected)


def test_levels_of_iq6_k_are_the_polynomial_rounded():
    q = np.arange(64)
    polynomial = -127 + q * (6.2568 + q * (-0.11218 + q * 0.0011972))
    np.testing.assert_array_equal(ik_quants.LEVELS[6], [np.rint(polynomial), np.rint(polynomial + 1)])


@pytest.mark.parametrize("qtype", FORMATS.keys() | INTERLEAVED.keys(), ids=ggml.NAME.get)
def test_no_rows(qtype):
    nothing = np.empty((0, ggml.row_bytes(qtype, 512)), np.uint8)
    assert dequantise_rows(nothing, qtype, 512).shape == (0, 512)
    assert quant.dequantise(nothing.reshape(2, 0, nothing.shape[1]), qtype).shape == (2, 0, 512)


@pytest.mark.parametrize("qtype", INTERLEAVED, ids=ggml.NAME.get)
def test_split_rows_keeps_every_bit(qtype):
    """A bit of an interleaved block is one of a plain block; a sign that is encoded anew may be two."""
    nbytes = ggml.ROWS_TOGETHER[qtype] * ggml.BLOCK_BYTES[qtype]
    rng = np.random.default_rng(2)
    flipped = rng.permutation(8 * nbytes)[:1000]
    base, flips = rng.integers(0, 256, (1, nbytes), np.uint8), np.zeros((len(flipped), nbytes), np.uint8)
    flips[np.arange(len(flipped)), flipped // 8] = 1 << flipped % 8
    split = INTERLEAVED[qtype].split
    changed = (split(base ^ flips) ^ split(base)).reshape(len(flips), -1)
    counts = np.unpackbits(changed, axis=-1).sum(axis=-1)
    assert set(counts) == ({1, 2} if ggml.NAME[qtype] in ENCODED_SIGNS else {1})
    assert len(np.unique(changed, axis=0)) == len(flipped)


@pytest.mark.parametrize("qtype", INTERLEAVED, ids=ggml.NAME.get)
def test_split_rows_takes_groups_and_blocks_one_by_one(qtype):
    rows, columns = ggml.ROWS_TOGETHER[qtype], 3 * ggml.BLOCK_SIZE[qtype]
    header, nbytes = ggml.ROW_HEADER[qtype], ggml.BLOCK_BYTES[qtype]
    data = np.random.default_rng(3).integers(0, 256, (2 * rows, ggml.row_bytes(qtype, columns)), np.uint8)
    actual = split_rows(data, qtype)
    assert actual.shape == data.shape
    for g in range(2):
        group = data[rows * g : rows * (g + 1)].reshape(-1)
        heads, blocks = group[: rows * header].reshape(rows, header), group[rows * header :].reshape(3, -1)
        np.testing.assert_array_equal(actual[rows * g : rows * (g + 1), :header], heads)
        for i, block in enumerate(blocks):
            at = header + nbytes * i
            expected = INTERLEAVED[qtype].split(block[None])[0]
            np.testing.assert_array_equal(actual[rows * g : rows * (g + 1), at : at + nbytes], expected)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_fields_and_their_inverse(width):
    words = np.random.default_rng(4).integers(0, 1 << 16, (3, 5), np.uint16)
    each = 16 // width
    planes, fields = bits.planes(words, width), bits.fields(words, width)
    assert (planes.shape, fields.shape) == ((3, each, 5), (3, 5 * each))
    for i, j, k in np.ndindex(3, 5, each):
        expected = int(words[i, j]) >> width * k & (1 << width) - 1
        assert planes[i, k, j] == fields[i, each * j + k] == expected
    np.testing.assert_array_equal(bits.pack_planes(planes, width), words)
    np.testing.assert_array_equal(bits.pack_fields(fields.astype(np.uint8), width, np.uint16), words)


@pytest.mark.parametrize(
    ("name", "shape", "nbytes"),
    [
        ("Q4_K", (3, 512), 3 * 2 * 144),
        ("IQ4_KS", (3, 512), 3 * (4 + 2 * 136)),
        ("IQ2_KL", (2, 5, 256), 10 * (2 + 86)),
        ("Q8_KV", (1, 64), 8 + 64),
        ("IQ5_KS_R4", (2, 8, 256), 16 * (4 + 168)),
        ("Q8_K_R16", (16, 256), 16 * 258),
        ("F32", (7,), 28),
    ],
)
def test_tensor_bytes(name, shape, nbytes):
    assert ggml.tensor_bytes(ggml.ID[name], shape) == nbytes


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("IQ4_K_R4", (6, 256), "6 rows are no multiple of the 4 that lie together in IQ4_K_R4"),
        ("IQ4_K_R4", (256,), "1 rows"),
        ("Q8_0_R8", (2, 4, 32), "4 rows"),
        ("IQ4_KS", (4, 128), "128 columns"),
    ],
)
def test_tensor_bytes_refuses(name, shape, words):
    with pytest.raises(PymlaError, match=words):
        ggml.tensor_bytes(ggml.ID[name], shape)


def test_names_and_numbers_are_unique():
    assert len(ggml.ID) == len(ggml.NAME)
    assert set(ggml.SUPPORTED) <= FORMATS.keys()
    for name in ("MXFP4", "NVFP4", "Q1_0"):
        listed = gguf.GGMLQuantizationType[name]
        assert (ggml.ID[name], gguf.GGML_QUANT_SIZES[listed]) == (
            listed.value,
            (ggml.BLOCK_SIZE[listed.value], ggml.BLOCK_BYTES[listed.value]),
        )


# What docs/types.md says ----------------------------------------------------------------------------------------------


def documented(*header: str) -> list[list[str]]:
    """Rows of the tables of docs/types.md whose first columns have these headers."""
    rows, wanted = [], False
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            wanted = False
        elif cells[: len(header)] == list(header):
            wanted = True
        elif wanted and not cells[0].startswith("---"):
            rows.append(cells)
    return rows


def test_documented_sizes():
    plain = documented("number", "name", "weights", "bytes", "bits")
    of_ik = documented("number", "name", "weights", "bytes", "bits", "header")
    interleaved = documented("number", "name", "rows", "weights", "bytes", "header")
    assert sorted(int(row[0]) for row in plain) == sorted(FORMATS)
    assert [int(row[0]) for row in interleaved] == sorted(INTERLEAVED)
    for number, name, weights, nbytes, *_ in plain + [[*row[:2], *row[3:]] for row in interleaved]:
        assert ggml.ID[name] == int(number)
        assert ggml.BLOCK_SIZE[int(number)] == int(weights)
        assert ggml.BLOCK_BYTES[int(number)] == int(nbytes)
    for _, name, weights, nbytes, width, *_ in plain:
        assert float(width) == round(8 * int(nbytes) / int(weights), 4), name
    headers = {row[1]: int(row[5]) for row in of_ik + interleaved}
    assert headers == {each.name: each.row_header for each in (*IK_LAYOUTS, IQ1_M_ROWS)}
    assert all(ggml.ROWS_TOGETHER[int(row[0])] == int(row[2]) for row in interleaved)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("row", documented("name", "weights per scale", "codes from", "to"), ids=lambda row: row[0])
def test_documented_codes(row):
    """How many codes share a scale and a minimum, and the range of codes in random blocks."""
    name, per_scale, lowest, highest, per_minimum, *_ = row
    qtype = ggml.ID[name]
    size = ggml.BLOCK_SIZE[qtype]
    data = np.random.default_rng(5).integers(0, 256, (512, ggml.row_bytes(qtype, 4 * size)), np.uint8)
    kind, blocks = blocks_of_rows(data, qtype)
    scales, codes, minima = kind.codes(blocks)
    assert (codes.dtype, scales.dtype) == (np.int8, np.float32)
    assert (codes.shape, scales.shape) == ((len(blocks), size), (len(blocks), size // int(per_scale)))
    assert per_minimum == ("no" if minima is None else str(size // minima.shape[1]))
    if name.endswith("_KT"):  # their extremes are rare
        assert int(lowest) <= codes.min() < codes.max() <= int(highest)
    else:
        assert (codes.min(), codes.max()) == (int(lowest), int(highest))


@pytest.mark.parametrize(
    ("name", "starts", "count"),
    [("IQ1_KT", range(4096, 12288), 8), ("IQ2_KT", range(4096, 69632), 8), ("IQ4_KT", range(4096, 69632), 4)],
)
def test_documented_levels_of_the_trellis_types(name, starts, count):
    ranges = {row[0]: (int(row[2]), int(row[3])) for row in documented("name", "weights per scale")}
    levels = ik_trellis.levels(np.array(starts, np.uint32), count)
    assert (levels.min(), levels.max()) == ranges[name]
    assert ranges["IQ3_KT"] == (-ranges["IQ2_KT"][1], ranges["IQ2_KT"][1])


def test_every_type_of_integers_has_its_codes_documented():
    integers = {ggml.NAME[qtype] for qtype, each in FORMATS.items() if each.codes}
    assert {row[0] for row in documented("name", "weights per scale")} == integers
