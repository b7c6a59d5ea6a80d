"""GGUF files as gguf-py writes them, and every way they can be broken."""

import errno
import gc
import math
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import gguf_files
import mutations
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files import mapped_file
from pymla.files.gguf_reader import ModelFile, TensorInfo

VOCABULARY = Path(__file__).parents[1].parent / "shared" / "data" / "ggml-vocab-deepseek-llm.gguf"
SCALARS = {
    "u8": (GGUFValueType.UINT8, 255),
    "i8": (GGUFValueType.INT8, -128),
    "u16": (GGUFValueType.UINT16, 65535),
    "i16": (GGUFValueType.INT16, -32768),
    "u32": (GGUFValueType.UINT32, 2**32 - 1),
    "i32": (GGUFValueType.INT32, -(2**31)),
    "f32": (GGUFValueType.FLOAT32, 0.25),
    "bool": (GGUFValueType.BOOL, True),
    "str": (GGUFValueType.STRING, "Ġdéjà ｜ vu"),
    "u64": (GGUFValueType.UINT64, 2**64 - 1),
    "i64": (GGUFValueType.INT64, -(2**63)),
    "f64": (GGUFValueType.FLOAT64, 1e300),
}
OF_IK = [
    ("Q6_0", (3, 96), None),
    ("IQ4_KS", (3, 512), None),
    ("IQ2_KL", (2, 3, 256), None),
    ("IQ4_K_R4", (8, 256), None),
    ("IQ5_KS_R4", (2, 4, 256), None),
    ("IQ4_K_R4", (6, 256), "6 rows are no multiple of the 4"),
    ("Q8_K_R16", (16, 128), "128 columns"),
]
TOKENS = ["", "a", "Ġb", "｜", "x" * 300]


def tensors(seed=0):
    """The last one ends at the file's alignment, so that every byte of the file is needed."""
    rng = np.random.default_rng(seed)
    return {
        "vector": (rng.standard_normal(7, dtype=np.float32), ggml.F32),
        "matrix": (rng.integers(0, 256, (3, 2 * 18), dtype=np.uint8), ggml.Q4_0),
        "experts": (rng.integers(0, 256, (2, 5, 34), dtype=np.uint8), ggml.Q8_0),
        "half": (rng.standard_normal((4, 8)).astype(np.float16), ggml.F16),
        "cube": (rng.standard_normal((2, 3, 1, 8), dtype=np.float32), ggml.F32),
    }


def write(path, entries=None, contents=None):
    """A file with some metadata, and with `tensors` unless others are given."""
    return gguf_files.write(path, entries, tensors() if contents is None else contents, "test")


@pytest.fixture
def small(tmp_path):
    entries = {
        **SCALARS,
        "tokenizer.ggml.tokens": (GGUFValueType.ARRAY, TOKENS),
        "ints": (GGUFValueType.ARRAY, [1, -2, 3]),
        "floats": (GGUFValueType.ARRAY, [0.5, -1.0]),
        "flags": (GGUFValueType.ARRAY, [True, False]),
    }
    return write(tmp_path / "small.gguf", entries)


def refused(path, *words):
    """Opening the file fails with one line that names the file and says `words`."""
    with pytest.raises(PymlaError) as caught:
        ModelFile.open(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in (str(path), *words):
        assert word in message, message


def test_metadata_of_every_type(small):
    file = ModelFile.open(small)
    assert file.version == 3
    assert file.parts == [file.path] == [small]
    assert file.nbytes == small.stat().st_size
    assert file.metadata["general.architecture"] == "test"
    for key, (_, value) in SCALARS.items():
        assert file.metadata[key] == value
        assert type(file.metadata[key]) is type(value)
    assert file.metadata["tokenizer.ggml.tokens"] == TOKENS
    assert file.metadata["ints"].dtype == np.int32
    assert file.metadata["ints"].tolist() == [1, -2, 3]
    assert file.metadata["floats"].dtype == np.float32
    assert file.metadata["flags"].tolist() == [True, False]


def test_tensors_are_views_of_the_file(small):
    file = ModelFile.open(str(small))
    assert list(file.tensors) == list(tensors())
    for name, (data, qtype) in tensors().items():
        tensor = file.tensors[name]
        assert tensor.name == name
        assert tensor.qtype == qtype
        assert tensor.path == small
        assert tensor.data.dtype == np.uint8
        assert tensor.data.tobytes() == data.tobytes()
        assert not tensor.data.flags.writeable
        assert not tensor.data.flags.owndata
    assert file.tensors["vector"].shape == (7,)
    assert file.tensors["matrix"].shape == (3, 64)
    assert file.tensors["experts"].shape == (2, 5, 32)
    assert file.tensors["cube"].shape == (2, 3, 1, 8)


def test_same_as_gguf_py(small):
    file = ModelFile.open(small)
    reader = gguf.GGUFReader(small)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for name, field in fields.items():
        value = file.metadata[name]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = file.tensors[tensor.name]
        assert ours.qtype == tensor.tensor_type
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(ours.data, tensor.data.view(np.uint8).reshape(-1))


def test_version_2_and_other_alignment(tmp_path):
    path = tmp_path / "v2.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_custom_alignment(128)
    for name, (data, qtype) in tensors().items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType(qtype))
    gguf_files.finish(writer, path)
    patch(path, 4, "<I", 2)
    file = ModelFile.open(path)
    assert file.version == 2
    assert file.metadata["general.alignment"] == 128
    for name, (data, _) in tensors().items():
        assert file.tensors[name].data.tobytes() == data.tobytes()


def test_no_tensors(tmp_path):
    file = ModelFile.open(write(tmp_path / "vocabulary.gguf", contents={}))
    assert file.tensors == {}


@pytest.mark.skipif(not VOCABULARY.exists(), reason="needs the shared vocabulary")
def test_real_vocabulary():
    file = ModelFile.open(VOCABULARY)
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 102400
    assert len(file.metadata["tokenizer.ggml.merges"]) == 99757
    assert file.metadata["tokenizer.ggml.pre"] == "deepseek-llm"
    assert file.metadata["tokenizer.ggml.token_type"].shape == (102400,)


# Files that are none, or broken ---------------------------------------------------------------------------------------


def patch(path, at, code, *values):
    """Overwrite bytes of a file."""
    contents = bytearray(path.read_bytes())
    struct.pack_into(code, contents, at, *values)
    path.write_bytes(contents)


def offset_after(path, key):
    """Where a key's type stands, or a tensor's number of dimensions."""
    raw = key.encode()
    return path.read_bytes().index(struct.pack("<Q", len(raw)) + raw) + 8 + len(raw)


def test_not_a_file(tmp_path):
    refused(tmp_path / "absent.gguf", "No such file")
    refused(tmp_path, "cannot be opened")
    empty = tmp_path / "empty.gguf"
    empty.touch()
    refused(empty, "empty")


def test_unreadable(small, monkeypatch):
    # Permissions do not stop a super-user, so the error is injected.
    def open_(self, *args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", open_)
    refused(small, "Permission denied")


@pytest.mark.parametrize("contents", [b"G", b"GGML" + bytes(100), b"#!/bin/sh\n" * 10, b"PK\x03\x04", b"GGUf\n\n\n\n"])
def test_not_gguf(tmp_path, contents):
    path = tmp_path / "other.gguf"
    path.write_bytes(contents)
    refused(path, "truncated" if len(contents) == 1 else "not a GGUF file")


@pytest.mark.parametrize(
    ("version", "words"),
    [(1, "version 1"), (4, "version 4"), (0, "version 0"), (3 << 24, "big-endian")],
)
def test_other_versions(small, version, words):
    patch(small, 4, "<I", version)
    refused(small, words)


def test_truncated_anywhere(small, tmp_path):
    contents = small.read_bytes()
    rng = np.random.default_rng(7)
    path = tmp_path / "cut.gguf"
    for length in {*rng.integers(1, len(contents), 50).tolist(), 3, 4, 8, 12, 16, 24, len(contents) - 1}:
        path.write_bytes(contents[:length])
        refused(path, "truncated")


def test_damaged_anywhere(small, tmp_path):
    """Whatever a wrong byte in the header does, it is no other exception, no endless loop and no huge allocation."""
    contents = small.read_bytes()
    rng = np.random.default_rng(8)
    path = tmp_path / "damaged.gguf"
    messages = []
    for at in rng.integers(0, len(contents), 1000):
        damaged = bytearray(contents)
        damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            ModelFile.open(path)
        except PymlaError as error:
            messages.append(str(error))
    assert len(messages) > 100
    for message in messages:
        assert str(path) in message
        assert "\n" not in message


@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "entries"])
@pytest.mark.parametrize("count", [1000, 2**40, 2**64 - 1])
def test_absurd_counts(small, at, count):
    patch(small, at, "<Q", count)
    refused(small, "truncated")


@pytest.mark.parametrize("length", [4000, 2**33, 2**63, 2**64 - 1])
@pytest.mark.parametrize("key", ["tokenizer.ggml.tokens", "ints", "flags"])
def test_absurd_array_length(small, key, length):
    patch(small, offset_after(small, key) + 8, "<Q", length)
    refused(small, key, "truncated")


@pytest.mark.parametrize("length", [4000, 2**63, 2**64 - 1])
def test_absurd_string_length(small, length):
    patch(small, offset_after(small, "str") + 4, "<Q", length)
    refused(small, "metadata str", "truncated")


@pytest.mark.parametrize("length", [4000, 2**63, 2**64 - 1])
def test_absurd_length_of_a_string_in_an_array(small, length):
    patch(small, offset_after(small, "tokenizer.ggml.tokens") + 16, "<Q", length)
    refused(small, "tokenizer.ggml.tokens", "truncated")


def test_unknown_value_types(small):
    patch(small, offset_after(small, "ints"), "<I", 13)
    refused(small, "metadata ints", "13")


def test_array_of_arrays(small):
    patch(small, offset_after(small, "ints") + 4, "<I", GGUFValueType.ARRAY)
    refused(small, "metadata ints", "array of arrays")


def test_invalid_utf8(small):
    patch(small, offset_after(small, "str") + 12, "B", 0xFF)
    refused(small, "metadata str", "UTF-8")


def test_unprintable_key(small):
    patch(small, offset_after(small, "ints") - 1, "B", ord("\n"))
    refused(small, "printable")


def test_key_twice(small):
    patch(small, offset_after(small, "i16") - 3, "3s", b"u16")
    refused(small, "u16", "twice")


def test_tensor_twice(small):
    patch(small, offset_after(small, "half") - 4, "4s", b"cube")
    refused(small, "cube", "twice")


@pytest.mark.parametrize("n_dims", [0, 5, 2**32 - 1])
def test_number_of_dimensions(small, n_dims):
    patch(small, offset_after(small, "matrix"), "<I", n_dims)
    refused(small, "tensor matrix", f"{n_dims} dimensions")


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ((0, 3), "size 0"),
        ((64, 0), "size 0"),
        ((65, 3), "65 columns"),
        ((64, 2**40), "truncated"),
        ((2**63, 2**63), "truncated"),
        ((2**32, 2**32), "truncated"),  # the product is 0 in 64 bits
    ],
)
def test_dimensions(small, dims, words):
    patch(small, offset_after(small, "matrix") + 4, "<QQ", *dims)
    refused(small, "tensor matrix", words)


@pytest.mark.parametrize("qtype", [4, 99, 142, 2**32 - 1])
def test_unknown_type(small, qtype):
    patch(small, offset_after(small, "matrix") + 20, "<I", qtype)
    refused(small, "tensor matrix", f"unknown type {qtype}")


@pytest.mark.parametrize(("name", "shape", "words"), OF_IK)
def test_types_of_ik_llama(tmp_path, name, shape, words):
    """gguf-py refuses their numbers. Rows have headers in some types, and in some several lie together."""
    qtype = ggml.ID[name]
    row = ggml.ROW_HEADER[qtype] + shape[-1] // ggml.BLOCK_SIZE[qtype] * ggml.BLOCK_BYTES[qtype]
    data = np.random.default_rng(0).integers(0, 256, row * math.prod(shape[:-1]), np.uint8)
    path = mutations.write(tmp_path / "ik.gguf", {}, [TensorInfo("matrix", qtype, shape, data, tmp_path)])
    if words:
        refused(path, "tensor matrix", words)
    else:
        found = ModelFile.open(path).tensors["matrix"]
        assert (found.qtype, found.shape) == (qtype, shape)
        np.testing.assert_array_equal(found.data, data)


@pytest.mark.parametrize(("offset", "words"), [(2**20, "truncated"), (2**64 - 32, "truncated"), (33, "multiple of 32")])
def test_tensor_offset(small, offset, words):
    patch(small, offset_after(small, "matrix") + 24, "<Q", offset)
    refused(small, "tensor matrix", words)


@pytest.mark.parametrize("alignment", [0, 24, 33])
def test_alignment(tmp_path, alignment):
    path = write(tmp_path / "aligned.gguf", {"general.alignment": (GGUFValueType.UINT32, alignment)}, {})
    refused(path, "general.alignment", str(alignment))


def test_least_alignment(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "aligned.gguf", "test")
    writer.add_custom_alignment(1)
    for name in "ab":
        writer.add_tensor(name, np.arange(3, dtype=np.float32))
    file = ModelFile.open(gguf_files.finish(writer, tmp_path / "aligned.gguf"))
    # Without padding the data need not lie where float32 may.
    assert [np.frombuffer(each.data.tobytes(), np.float32).tolist() for each in file.tensors.values()] == [
        [0, 1, 2]
    ] * 2


@pytest.mark.parametrize(
    ("kept", "place"),
    [(70, "the entry of tensor 1"), (110, f"tensor {'a' * 100}"), (200, "the entry of tensor 2"), (242, "tensor bbb")],
)
def test_an_entry_that_is_cut(tmp_path, kept, place):
    """A tensor's entry: length of the name (8), name (100), dimensions (4), sizes (8 each), type (4), offset (8)."""
    contents = {100 * name: (np.zeros(1, np.float32), ggml.F32) for name in "ab"}
    path = write(tmp_path / "cut.gguf", {}, contents)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"aaa") - 8 + kept])
    refused(path, f"truncated in {place}")


@pytest.mark.parametrize(("version", "advice"), [(1, "convert the model again"), (4, "update pymla")])
def test_what_to_do_about_another_version(small, version, advice):
    contents = small.read_bytes()
    small.write_bytes(contents[:4] + version.to_bytes(4, "little") + contents[8:])
    refused(small, f"GGUF version {version}, but versions 2 and 3 can be read; {advice}")
    with pytest.raises(PymlaError, match=f"; {advice}$"):
        ModelFile.open(small)


def test_a_head_that_is_cut(small):
    """Magic (4), version (4), tensors (8), entries of metadata (8)."""
    contents = small.read_bytes()
    for kept in (6, 12):
        small.write_bytes(contents[:kept])
        refused(small, "truncated in the header: ")
    for at, what in ((8, "tensors"), (16, "metadata entries")):
        small.write_bytes(contents[:at] + (1 << 60).to_bytes(8, "little") + contents[at + 8 :])
        refused(small, f": {1 << 60} {what} do not fit a file of {len(contents)} bytes")


def test_metadata_that_is_cut(tmp_path):
    path = write(tmp_path / "cut.gguf", {"second.key": (GGUFValueType.UINT32, 7)}, {})
    whole = path.read_bytes()
    assert ModelFile.open(path).metadata["second.key"] == 7
    end = whole.index(b"second.key") + len("second.key") + 4 + 4
    path.write_bytes(whole[:end])  # all that is needed
    assert ModelFile.open(path).metadata["second.key"] == 7
    path.write_bytes(whole[: end - 10])
    refused(path, "truncated in metadata entry 2: ")


def test_the_longest_name(tmp_path):
    for length in (0xFFFF, 0x10000):
        path = write(tmp_path / "names.gguf", {"k" * length: (GGUFValueType.UINT32, 7)}, {})
        if length == 0xFFFF:
            assert ModelFile.open(path).metadata["k" * length] == 7
        else:
            refused(path, "metadata entry 2: its name")


def test_alignment_of_wrong_type(tmp_path):
    path = write(tmp_path / "aligned.gguf", {"general.alignment": (GGUFValueType.STRING, "32")}, {})
    refused(path, "general.alignment", "'32'")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_overlapping_tensors(tmp_path, number):
    """A tensor begins inside the one before it, or lies where another does; neighbours may touch."""
    path = write(tmp_path / "m.gguf", contents={name: (np.ones(64, np.float32), ggml.F32) for name in "abcd"})
    assert len(ModelFile.open(path).tensors) == 4
    name = "abcd"[number]
    at = path.read_bytes().index(name.encode() + b"\x01\0\0\0") + 1 + 4 + 8 + 4
    patch(path, at, "<Q", 256 * number - 32)
    refused(path, f"tensor {name} lies in the bytes from", f"of which tensor {'abcd'[number - 1]} takes", "damaged")
    patch(path, at, "<Q", 0)
    refused(path, "tensor a", f"tensor {name}" if number > 1 else "tensor b", "damaged")


# Typed access ---------------------------------------------------------------------------------------------------------


def test_get(small):
    file = ModelFile.open(small)
    assert file.get("u32", int) == 2**32 - 1
    assert file.get("f32", float) == 0.25
    as_float = file.get("u8", float)
    assert as_float == 255
    assert isinstance(as_float, float)
    assert file.get("bool", bool) is True
    assert file.get("str", str) == SCALARS["str"][1]
    assert file.get("tokenizer.ggml.tokens", list) == TOKENS
    assert len(file.get("ints", list)) == 3
    assert file.get("absent", int, 3) == 3
    assert file.get("absent", int, None) is None


@pytest.mark.parametrize(
    ("key", "kind", "words"),
    [
        ("str", int, "an integer is expected"),
        ("f32", int, "0.25"),
        ("bool", int, "True"),
        ("bool", float, "True"),
        ("u8", bool, "255"),
        ("u8", str, "a string is expected"),
        ("ints", int, "an array of 3"),
        ("tokenizer.ggml.tokens", str, "an array of 5"),
        ("str", list, "an array is expected"),
        ("absent", int, "is missing"),
    ],
)
def test_get_refuses(small, key, kind, words):
    file = ModelFile.open(small)
    with pytest.raises(PymlaError) as caught:
        file.get(key, kind)
    for word in (str(small), f"metadata {key}", words):
        assert word in str(caught.value)


# Split files ----------------------------------------------------------------------------------------------------------


def part_path(folder, number, count, stem="model"):
    return folder / f"{stem}-{number:05}-of-{count:05}.gguf"


def write_part(folder, number, count, names, total=5, stem="model", **other):
    entries = {
        "split.no": (GGUFValueType.UINT16, other.get("no", number - 1)),
        "split.count": (GGUFValueType.UINT16, other.get("count", count)),
        "split.tensors.count": (GGUFValueType.INT32, total),
    }
    if number == 1:
        entries["only.here"] = (GGUFValueType.UINT32, 7)
    contents = {name: tensors()[name] for name in names}
    return write(part_path(folder, number, count, stem), entries, contents)


@pytest.fixture
def split(tmp_path):
    parts = [("vector", "matrix"), ("experts",), ("half", "cube")]
    return [write_part(tmp_path, number, 3, names) for number, names in enumerate(parts, 1)]


def test_parts_that_do_not_say_how_many_tensors_there_are(tmp_path):
    for number, name in ((1, "vector"), (2, "matrix")):
        entries = {"split.no": (GGUFValueType.UINT16, number - 1), "split.count": (GGUFValueType.UINT16, 2)}
        write(part_path(tmp_path, number, 2, "model"), entries, {name: tensors()[name]})
    assert list(ModelFile.open(part_path(tmp_path, 1, 2, "model")).tensors) == ["vector", "matrix"]


@pytest.mark.parametrize("number", range(3))
def test_any_part_opens_all(split, number):
    file = ModelFile.open(split[number])
    assert file.path == split[number]
    assert file.parts == split
    assert file.nbytes == sum(path.stat().st_size for path in split)
    assert file.metadata["only.here"] == 7
    assert [tensor.path for tensor in file.tensors.values()] == [split[0]] * 2 + [split[1]] + [split[2]] * 2
    for name, (data, _) in tensors().items():
        assert file.tensors[name].data.tobytes() == data.tobytes()


def test_gguf_writer_splits(tmp_path):
    """gguf-py leaves the tensors to the parts after the first."""
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "test", split_max_tensors=2, small_first_shard=True)
    for name, (data, qtype) in tensors().items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType(qtype))
    gguf_files.finish(writer, tmp_path / "w.gguf")
    file = ModelFile.open(part_path(tmp_path, 2, 4, "w"))
    assert len(file.parts) == 4
    assert list(file.tensors) == list(tensors())
    assert file.metadata["general.architecture"] == "test"


@pytest.mark.parametrize("number", range(3))
def test_part_missing(split, number):
    split[number].unlink()
    opened = split[(number + 1) % 3]
    with pytest.raises(PymlaError) as caught:
        ModelFile.open(opened)
    message = str(caught.value)
    assert str(split[number]) in message
    assert "part" in message
    assert "missing" in message
    assert "1 of 3" in message


def test_part_truncated(split):
    contents = split[2].read_bytes()
    split[2].write_bytes(contents[:-1])
    with pytest.raises(PymlaError, match=split[2].name):
        ModelFile.open(split[0])


def test_part_renamed(split, tmp_path):
    lone = tmp_path / "part.gguf"
    split[0].rename(lone)
    refused(lone, "split.count says 3", "name 1")


def test_whole_file_named_as_a_part(tmp_path):
    refused(write(part_path(tmp_path, 1, 2)), "split.count says 1", "name 2")


def test_parts_swapped(tmp_path):
    write_part(tmp_path, 1, 2, ["vector"], total=2)
    second = write_part(tmp_path, 2, 2, ["cube"], total=2, no=0)
    with pytest.raises(PymlaError, match=r"says part 1 of 2, the file's name part 2 of 2") as caught:
        ModelFile.open(part_path(tmp_path, 1, 2))
    assert str(second) in str(caught.value)


@pytest.mark.parametrize("number", [0, 4])
def test_part_beyond_the_count(split, number, tmp_path):
    path = part_path(tmp_path, number, 3)
    split[0].rename(path)
    refused(path, f"part {number} of 3")


def test_part_of_another_model(split, tmp_path):
    write_part(tmp_path, 3, 3, ["half"])
    refused(split[0], "hold 4 tensors", "split.tensors.count says 5")


def test_tensor_in_two_parts(split, tmp_path):
    write_part(tmp_path, 3, 3, ["half", "matrix"])
    with pytest.raises(PymlaError, match="tensor matrix") as caught:
        ModelFile.open(split[0])
    assert str(split[0]) in str(caught.value)
    assert str(split[2]) in str(caught.value)


def test_split_keys_of_a_single_file(tmp_path):
    file = ModelFile.open(write_part(tmp_path, 1, 1, tensors()))
    assert len(file.tensors) == 5


def test_split_count_of_wrong_type(tmp_path):
    path = write(tmp_path / "typed.gguf", {"split.count": (GGUFValueType.STRING, "2")})
    refused(path, "split.count", "'2'")


# Changed after it was opened ------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path):
    """A file that is longer than the pieces that it is recognised by, whose data begins with its first page."""
    rng = np.random.default_rng(0)
    contents = {name: (rng.standard_normal(100_000, dtype=np.float32), ggml.F32) for name in "ab"}
    return write(tmp_path / "large.gguf", contents=contents)


def changed(file, *words):
    with pytest.raises(PymlaError) as caught:
        file.check_unchanged()
    for word in (*words, "Load the model again"):
        assert word in str(caught.value)


def later(path):
    """As if it was written a second later than it was."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))


@pytest.mark.parametrize("size", [0, 100_000, -1, 1])
def test_another_size(large, size):
    file = ModelFile.open(large)
    file.check_unchanged()
    size = size if size > 1 or size == 0 else file.nbytes + size
    os.truncate(large, size)
    changed(file, str(large), f"has {size} bytes and had {file.nbytes}")


def test_parts_are_looked_at(split):
    file = ModelFile.open(split[0])
    file.check_unchanged()
    os.truncate(split[1], 10)
    changed(file, str(split[1]), "has 10 bytes")


@pytest.mark.parametrize("kept", [0, 400_000, -10])
def test_rewritten_in_place(large, kept):
    """All of it, the second half, the last bytes."""
    file, contents = ModelFile.open(large), large.read_bytes()
    with large.open("r+b") as stream:
        stream.write(contents[:kept] + bytes(len(contents[kept:])))
    later(large)
    changed(file, str(large), f"contents of the file, {len(contents)} bytes then and now")
    # What it was when it was opened counts, however often it is asked for.
    changed(file, str(large), "contents")


@pytest.mark.parametrize("how", ["touched", "the same again", "deleted", "replaced"])
def test_changes_that_do_no_harm(large, tmp_path, how):
    file, contents = ModelFile.open(large), large.read_bytes()
    data = file.tensors["b"].data.copy()
    if how == "the same again":
        large.write_bytes(contents)
    if how in ("touched", "the same again"):
        later(large)
    else:
        large.unlink()
    if how == "replaced":
        other = tmp_path / "other"
        other.write_bytes(bytes(10))
        other.rename(large)
    for _ in range(2):
        file.check_unchanged()
    np.testing.assert_array_equal(file.tensors["b"].data, data)


def test_a_second_look_at_a_touched_file_is_as_cheap_as_the_first(large, monkeypatch):
    file = ModelFile.open(large)
    later(large)
    file.check_unchanged()
    monkeypatch.setattr(mapped_file.os, "pread", lambda *_: pytest.fail("it was read again"))
    file.check_unchanged()


def test_a_file_that_cannot_be_read_any_more(large, monkeypatch):
    def stale(descriptor):
        raise OSError(errno.ESTALE, "Stale file handle")

    file = ModelFile.open(large)
    with monkeypatch.context() as patch:
        patch.setattr(mapped_file.os, "fstat", stale)
        with pytest.raises(PymlaError) as caught:
            file.check_unchanged()
    assert f"{large}: the file cannot be read any more (Stale file handle)" in str(caught.value)


def test_files_are_closed(large):
    def opened():
        return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(large) for fd in os.listdir("/proc/self/fd"))

    file = ModelFile.open(large)
    assert opened() > 0
    del file
    gc.collect()
    assert opened() == 0


def test_fetch_ahead(large, split):
    """It is advice, and changes nothing: any bytes of any part."""
    for path in (large, split[1]):
        file = ModelFile.open(path)
        for tensor in file.tensors.values():
            file.fetch_ahead(tensor, [(0, 1), (tensor.data.size - 1, tensor.data.size), (0, tensor.data.size)])


def test_what_fetch_ahead_asks_for(large, monkeypatch):
    """Whole pages from the one in which a piece begins, to its end; a system that has no such advice is left alone."""
    file, asked = ModelFile.open(large), []
    source, tensor = file._sources[0], list(file.tensors.values())[-1]
    monkeypatch.setattr(source, "map", SimpleNamespace(madvise=lambda *advice: asked.append(advice)))
    offset, page = tensor.data.ctypes.data - source.begin, mapped_file.mmap.PAGESIZE
    pieces = [(0, tensor.data.size), (tensor.data.size // 2, tensor.data.size // 2 + 1)]
    file.fetch_ahead(tensor, pieces)
    for (first, stop), (advice, start, length) in zip(pieces, asked, strict=True):
        assert advice == mapped_file.mmap.MADV_WILLNEED
        assert start == (offset + first) // page * page
        assert start + length == offset + stop

    def refused(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(source, "map", SimpleNamespace(madvise=refused))
    file.fetch_ahead(tensor, pieces)


# Prefault -------------------------------------------------------------------------------------------------------------


def prefaulted(file):
    calls = []
    file.prefault(lambda done, total: calls.append((done, total)))
    return calls


@pytest.fixture
def slices(monkeypatch):
    """Small slices, so that small files take several."""
    monkeypatch.setattr(mapped_file, "PREFAULT_SLICE", mapped_file.mmap.PAGESIZE)


def test_prefault(split, slices, tmp_path):
    big = {"big": (np.zeros(5000, np.float32), ggml.F32)}
    file = ModelFile.open(write(tmp_path / "big.gguf", contents=big))
    calls = prefaulted(file)
    page = mapped_file.mmap.PAGESIZE
    assert len(calls) == -(-file.nbytes // page)
    assert calls[0] == (page, file.nbytes)
    assert calls[-1] == (file.nbytes, file.nbytes)
    assert len(prefaulted(ModelFile.open(split[0]))) == 3
    file.prefault()


def test_prefault_of_some_tensors(slices, tmp_path):
    page = mapped_file.mmap.PAGESIZE
    contents = {name: (np.zeros(4 * page // 4, np.float32), ggml.F32) for name in "abcd"}
    file = ModelFile.open(write(tmp_path / "four.gguf", contents=contents))
    spans = file._spans(file._sources[0], ["d", "b"])
    begin = file._sources[0].begin
    for name, (start, stop) in zip("bd", spans, strict=True):
        tensor = file.tensors[name].data
        assert start <= tensor.ctypes.data - begin < start + page
        assert stop - page < tensor.ctypes.data - begin + tensor.nbytes <= stop
    calls = []
    file.prefault(lambda done, total: calls.append((done, total)), ["d", "b"])
    total = sum(stop - start for start, stop in spans)
    assert calls[-1] == (total, total)
    # Neighbours make one span, and no names none.
    (first,), (last,) = (file._spans(file._sources[0], [name]) for name in "ac")
    assert file._spans(file._sources[0], ["c", "b", "a"]) == [(first[0], last[1])]
    file.prefault(lambda *_: pytest.fail("nothing was asked for"), [])


@pytest.mark.skipif(sys.platform != "linux", reason="the advice is Linux's")
def test_prefault_on_an_old_kernel(small, monkeypatch):
    def populate(*args):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mapped_file, "populate", populate)
    file = ModelFile.open(small)
    assert prefaulted(file) == [(file.nbytes, file.nbytes)]


def test_prefault_elsewhere(small, monkeypatch):
    monkeypatch.setattr(mapped_file.sys, "platform", "darwin")
    monkeypatch.setattr(mapped_file, "populate", lambda *_: pytest.fail("the advice is Linux's"))
    file = ModelFile.open(small)
    assert prefaulted(file) == [(file.nbytes, file.nbytes)]


@pytest.mark.skipif(sys.platform != "linux", reason="the advice is Linux's")
def test_prefault_of_a_failing_disk(small, monkeypatch):
    def populate(*args):
        raise OSError(errno.EFAULT, "Bad address")

    monkeypatch.setattr(mapped_file, "populate", populate)
    with pytest.raises(PymlaError, match="Bad address"):
        ModelFile.open(small).prefault()


@pytest.mark.skipif(sys.platform != "linux", reason="the advice is Linux's")
@pytest.mark.parametrize("when", ["before", "while"])
def test_prefault_of_a_file_that_is_cut(large, slices, monkeypatch, when):
    file, populate = ModelFile.open(large), mapped_file.populate

    def cut(*args):
        os.truncate(large, 10_000)
        populate(*args)

    if when == "before":
        os.truncate(large, 10_000)
    else:
        monkeypatch.setattr(mapped_file, "PREFAULT_SLICE", file.nbytes)
        monkeypatch.setattr(mapped_file, "populate", cut)
    with pytest.raises(PymlaError, match=rf"large.gguf: the file has 10000 bytes and had {file.nbytes}"):
        file.prefault()
