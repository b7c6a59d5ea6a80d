"""Files of importance matrices, what quantisers get from them, merging, and statistics."""

import math
import struct

import gguf
import gguf_files
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files.imatrix_entries import MOST, Entry
from pymla.make.imatrix_statistics import layer_statistics, tensor_statistics
from pymla.make.importance import Importance

NAME = "blk.{}.{}.weight"


def entry(*rows, counts):
    return Entry(np.array(rows, np.float64), np.array(counts, np.int64))


def small():
    """Two layers: matrices, heads, experts of which one was never chosen."""
    rng = np.random.default_rng(5)
    entries = {}
    for layer in (0, 1):
        for stem, experts, columns in (("attn_output", 1, 6), ("attn_k_b", 1, 3 * 4), ("ffn_down_exps", 4, 5)):
            counts = [40, 7, 0, 1][:experts]
            sums = rng.random((experts, columns)) * 100 * (np.array(counts)[:, None] > 0)
            entries[NAME.format(layer, stem)] = Entry(sums, np.array(counts, np.int64))
    return Importance(entries, ["wiki.txt", "code.txt"], 8)


def as_llama_writes(path, importance):
    """A file by the gguf package, with the keys, names and shapes of llama.cpp's."""
    writer = gguf.GGUFWriter(path, "x")
    writer.kv_data[0].pop("general.architecture")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", list(importance.datasets))
    writer.add_uint32("imatrix.chunk_count", importance.chunks)
    writer.add_uint32("imatrix.chunk_size", importance.chunk_size)
    for name, each in sorted(importance.entries.items()):
        writer.add_tensor(f"{name}.in_sum2", each.sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", each.counts.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dat_bytes(entries, chunks=None, dataset=b""):
    """The older format; entries are (name, calls, values)."""
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        values = np.array(values, "<f4")
        parts += [struct.pack("<i", len(name)), name, struct.pack("<ii", calls, values.size), values.tobytes()]
    if chunks is not None:
        parts.append(struct.pack("<ii", chunks, len(dataset)) + dataset)
    return b"".join(parts)


def assert_same(one, other):
    assert one.entries.keys() == other.entries.keys()
    for name, each in one.entries.items():
        np.testing.assert_array_equal(each.counts, other.entries[name].counts)
        np.testing.assert_array_equal(each.sums.astype(np.float32), other.entries[name].sums.astype(np.float32))
    assert (one.datasets, one.chunk_size, one.chunks) == (other.datasets, other.chunk_size, other.chunks)


# Formats --------------------------------------------------------------------------------------------------------------


def test_a_file_of_llama_cpp_is_read(tmp_path):
    assert_same(Importance.read(as_llama_writes(tmp_path / "i.gguf", small())), small())


def test_a_written_file_is_one_of_llama_cpp(tmp_path):
    """The same tensors, byte for byte, under the same names and shapes, and the keys that its programs want."""
    small().write(tmp_path / "ours.gguf")
    assert_same(Importance.read(tmp_path / "ours.gguf"), small())
    ours, theirs = (
        gguf.GGUFReader(path) for path in (tmp_path / "ours.gguf", as_llama_writes(tmp_path / "l.gguf", small()))
    )
    for key in ("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        assert ours.fields[key].contents() == theirs.fields[key].contents()
        assert ours.fields[key].types == theirs.fields[key].types
    assert [each.name for each in ours.tensors] == [each.name for each in theirs.tensors]
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (one.tensor_type, one.shape.tolist()) == (other.tensor_type, other.shape.tolist())
        assert one.data.tobytes() == other.data.tobytes()


def test_the_older_format(tmp_path):
    path = tmp_path / "i.dat"
    values = [3.0, 6.0, 9.0]
    path.write_bytes(dat_bytes([(b"blk.0.attn_output.weight", 3, values)], 7, b"wiki.txt"))
    importance = Importance.read(path)
    assert (importance.datasets, importance.chunk_size) == (("wiki.txt",), 0)
    np.testing.assert_array_equal(importance.columns("blk.0.attn_output.weight", (9, 3)), [[1, 2, 3]])
    # The oldest files end here, and may have no calls.
    path.write_bytes(dat_bytes([(b"a", 0, values)]))
    np.testing.assert_array_equal(Importance.read(path).columns("a", (2, 3)), [values])


def test_writing_the_older_format(tmp_path):
    """As llama.cpp: means times calls, 1 for experts without inputs, no entry without any."""
    importance = small()
    importance.entries["blk.1.unused.weight"] = entry([0, 0], counts=[0])
    importance.write(tmp_path / "i.dat", "dat")
    expected = []
    for name, each in sorted(small().entries.items()):
        calls = -(-int(each.counts.max()) // 8)
        counts = each.counts[:, None]
        means = np.where(counts > 0, each.sums / np.maximum(counts, 1), 1)
        expected.append((name.encode(), calls, (means * calls).reshape(-1)))
    assert (tmp_path / "i.dat").read_bytes() == dat_bytes(expected, 5, b"code.txt")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_entries_come_back(data, tmp_path):
    names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20)
    entries = {}
    for name in data.draw(st.sets(names, min_size=1, max_size=4)):
        counts = data.draw(st.lists(st.integers(0, 2**24), min_size=1, max_size=4))
        numbers = st.floats(0, 2.0**100, width=32, allow_subnormal=False)
        size = data.draw(st.integers(1, 5))
        sums = data.draw(st.lists(numbers, min_size=size * len(counts), max_size=size * len(counts)))
        entries[name] = Entry(np.array(sums, np.float64).reshape(len(counts), size), np.array(counts, np.int64))
    importance = Importance(
        entries, data.draw(st.lists(names, min_size=1, max_size=3)), data.draw(st.integers(1, 4096))
    )
    importance.write(tmp_path / "i.gguf")
    assert_same(Importance.read(tmp_path / "i.gguf"), importance)


def problem(path):
    """Read a file, and do all that is done with one. Returns what is wrong with it, or None."""
    try:
        importance = Importance.read(path)
        tensor_statistics(importance)
        importance.never_chosen()
        for name, each in importance.entries.items():
            importance.columns(name, (each.counts.size, 3, each.sums.shape[1]))
        total = Importance.merged([small(), importance, importance])
        for form in ("gguf", "dat"):
            total.write(path.with_suffix(".again"), form)
    except PymlaError as error:
        return str(error)
    return None


def assert_read_or_refused(path):
    """Whatever is in the file, it is read, or one line that names it says what is wrong."""
    message = problem(path)
    assert message is None or (str(path.parent) in message and len(message.splitlines()) == 1)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files(data, tmp_path):
    form = data.draw(st.sampled_from(["gguf", "dat"]))
    path = tmp_path / f"i.{form}"
    small().write(path, form)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        piece = data.draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f", b"\x80"]))
        raw[at : at + len(piece)] = piece
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    assert_read_or_refused(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=80))
def test_any_bytes(raw, tmp_path):
    path = tmp_path / "i"
    path.write_bytes(raw)
    assert_read_or_refused(path)


def test_what_is_refused(tmp_path):
    def refused(match, write=None, **changes):
        path = tmp_path / "i.gguf"
        if write is None:
            importance = small()
            importance.entries |= changes
            as_llama_writes(path, importance)
        else:
            path.write_bytes(write)
        with pytest.raises(PymlaError, match=match) as caught:
            Importance.read(path)
        assert str(caught.value).startswith(f"{path}: ")

    refused("sum 1 of 'x' is nan", x=entry([1, math.nan], counts=[3]))
    refused("sum 2 of 'x' is -4", x=entry([1, 2], [-4, 1], counts=[3, 4]))
    refused("sum 0 of 'x' is inf", x=entry([math.inf], counts=[3]))
    refused("a count of 'x' is -1", x=entry([1], counts=[-1]))
    refused("a count of 'x' is 4.29", x=entry([1], counts=[2 * MOST]))
    refused("neither a GGUF file nor an importance matrix", struct.pack("<i", 0))
    refused("bytes for the number of entries do not fit the 2 that are left", b"ab")
    refused("400 bytes for the name of entry 1", struct.pack("<ii", 1, 400) + b"abc")
    refused("-1 bytes for the name of entry 1", struct.pack("<ii", 1, -1) + b"abc")
    refused("not valid UTF-8", struct.pack("<ii", 1, 2) + b"\xff\xfe" + bytes(20))
    refused("'a' occurs twice", dat_bytes([(b"a", 1, [1]), (b"a", 1, [1])]))
    refused("'a' has 0 values", dat_bytes([(b"a", 1, [])]))
    with pytest.raises(PymlaError, match="cannot be opened"):
        Importance.read(tmp_path / "nothing")


def test_a_chunk_size_that_is_missing(tmp_path):
    """Counts are tokens, and the older format's are chunks: a file must say how many tokens a chunk has."""
    for metadata, match in (({}, "imatrix.chunk_size is missing"), ({"imatrix.chunk_size": 0}, "chunk_size is 0")):
        tensors = {name: (np.ones((1, 1), np.float32), ggml.F32) for name in ("a.in_sum2", "a.counts")}
        gguf_files.write(tmp_path / "i.gguf", metadata, tensors, "imatrix")
        with pytest.raises(PymlaError, match=match):
            Importance.read(tmp_path / "i.gguf")


def test_pairs_of_tensors(tmp_path):
    path = tmp_path / "i.gguf"
    for suffix, missing in ((".in_sum2", ".counts"), (".counts", ".in_sum2")):
        names = "a.in_sum2", "a.counts", f"b{suffix}"
        tensors = {name: (np.ones((1, 1), np.float32), ggml.F32) for name in names}
        gguf_files.write(path, {}, tensors, "imatrix")
        with pytest.raises(PymlaError, match=f"tensor 'b{missing}' is missing"):
            Importance.read(path)


def test_a_sum_too_large_for_the_file(tmp_path):
    importance = Importance({"x": entry([1e39], counts=[1])}, chunk_size=1)
    with pytest.raises(PymlaError, match="'x' is 1e\\+39, too large"):
        importance.write(tmp_path / "i.gguf")
    assert not list(tmp_path.iterdir())


# What quantisers get --------------------------------------------------------------------------------------------------


def test_columns_of_matrices_experts_and_heads():
    importance = small()
    for stem, shape in (("attn_output", (9, 6)), ("attn_k_b", (3, 9, 4)), ("ffn_down_exps", (4, 9, 5))):
        name = NAME.format(1, stem)
        columns, each = importance.columns(name, shape), importance.entries[name]
        assert columns.dtype == np.float32
        # An expert without inputs has those that all others had.
        expected = np.tile(each.sums.sum(0) / each.counts.sum(), (len(each.counts), 1))
        for expert, count in enumerate(each.counts):
            if count:
                expected[expert] = each.sums[expert] / count
        np.testing.assert_allclose(columns, expected.reshape(math.prod(shape[:-2]), shape[-1]), rtol=1e-6)
    assert importance.columns("blk.2.attn_output.weight", (9, 6)) is None
    assert importance.columns("blk.0.attn_q.weight", (9, 6)) is None


def test_heads_of_a_tensor_with_two_dimensions():
    """As ik_llama.cpp writes k_b: the rows of all heads."""
    importance = small()
    name = NAME.format(0, "attn_k_b")
    expected = importance.entries[name].sums.reshape(3, 4).mean(0) / 40
    np.testing.assert_allclose(importance.columns(name, (3 * 9, 4)), expected[None], rtol=1e-6)


def test_tensors_that_read_the_same():
    kv, v, up = NAME.format(0, "attn_kv_b"), NAME.format(0, "attn_v_b"), NAME.format(0, "ffn_up_exps")
    of_kv = Importance({kv: entry([2, 4, 6], counts=[2])}, chunk_size=1)
    np.testing.assert_array_equal(of_kv.columns(v, (2, 5, 3)), [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(of_kv.columns(v, (10, 3)), [[1, 2, 3]])
    of_v = Importance({v: entry([2, 4, 6, 4, 8, 6], counts=[2])}, chunk_size=1)
    np.testing.assert_array_equal(of_v.columns(kv, (20, 3)), [[1.5, 3, 3]])
    for each in (of_kv, of_v):
        assert each.columns(NAME.format(0, "attn_k_b"), (2, 3, 4)) is None
        assert each.columns(NAME.format(1, "attn_v_b"), (2, 5, 3)) is None
    of_up = Importance({up: entry([2, 4], [3, 6], counts=[2, 3])}, chunk_size=1)
    for stem in ("ffn_gate_exps", "ffn_gate_up_exps"):
        np.testing.assert_array_equal(of_up.columns(NAME.format(0, stem), (2, 7, 2)), [[1, 2], [1, 2]])
    assert of_up.columns(NAME.format(0, "ffn_gate"), (7, 2)) is None
    fused = Importance({NAME.format(0, "ffn_gate_up_exps"): of_up.entries[up]}, chunk_size=1)
    np.testing.assert_array_equal(fused.columns(up, (2, 7, 2)), [[1, 2], [1, 2]])


def of_heads(heads):
    """Entries of a layer, with two columns of a key's head and three latent ones."""
    rng = np.random.default_rng(0)
    sizes = {"attn_k_b": 2 * heads, "attn_v_b": 3 * heads, "attn_kv_b": 3, "attn_output": 4}
    entries = {
        NAME.format(0, stem): Entry(rng.random((1, size)), np.array([40], np.int64)) for stem, size in sizes.items()
    }
    return Importance(entries, ["wiki.txt"], 8)


def test_one_entry_for_all_heads(tmp_path):
    """Of the sizes that ik_llama.cpp's llama-quantize asks for where tensors of heads have two dimensions."""
    whole = of_heads(4)
    merged = whole.with_merged_heads()
    merged.write(tmp_path / "i.dat", "dat")
    read = Importance.read(tmp_path / "i.dat")
    assert {name: each.sums.size for name, each in read.entries.items()} == {
        NAME.format(0, stem): size
        for stem, size in {"attn_k_b": 2, "attn_v_b": 3, "attn_kv_b": 3, "attn_output": 4}.items()
    }
    assert merged.chunks == whole.chunks == 5
    for stem, columns in (("attn_k_b", 2), ("attn_v_b", 3)):
        name = NAME.format(0, stem)
        expected = whole.columns(name, (4 * 5, columns))
        np.testing.assert_allclose(read.columns(name, (4 * 5, columns)), expected, rtol=1e-6)
        np.testing.assert_allclose(read.columns(name, (4, 5, columns)), np.repeat(expected, 4, 0), rtol=1e-6)
    again = merged.with_merged_heads()
    assert_same(again, merged)
    assert_same(Importance({}, ["a"], 8).with_merged_heads(), Importance({}, ["a"], 8))


def test_heads_that_are_not_known():
    """Rows say how many, and so do latent columns of `attn_kv_b`."""
    rows = Importance({NAME.format(0, "attn_k_b"): entry([1, 2], [3, 8], counts=[2, 2])}, chunk_size=1)
    np.testing.assert_array_equal(rows.with_merged_heads().columns(NAME.format(0, "attn_k_b"), (9, 2)), [[1, 2.5]])
    for lacking in ("attn_kv_b", "attn_v_b"):
        importance = of_heads(4)
        del importance.entries[NAME.format(0, lacking)]
        with pytest.raises(PymlaError, match="is not known, as attn_v_b"):
            importance.with_merged_heads()


def test_inputs_of_no_head():
    """A file may have counted nothing."""
    name = NAME.format(0, "attn_v_b")
    importance = Importance({name: entry([0, 0, 0, 0], counts=[0])}, chunk_size=1)
    np.testing.assert_array_equal(importance.columns(name, (6, 2)), [[1, 1]])
    np.testing.assert_array_equal(importance.columns(name, (2, 3, 2)), [[1, 1]] * 2)


@pytest.mark.parametrize(
    ("stem", "shape"),
    [
        ("attn_output", (9, 7)),
        ("attn_output", (9, 3)),
        ("attn_output", (2, 9, 6)),
        ("attn_k_b", (4, 9, 4)),
        ("attn_k_b", (9, 5)),
        ("ffn_down_exps", (5, 9, 4)),
        ("ffn_down_exps", (9, 20)),
        ("ffn_down_exps", (2, 9, 10)),
    ],
)
def test_sizes_of_another_model(stem, shape):
    with pytest.raises(PymlaError, match=rf"^the importance matrix: has .* columns for 'blk\.0\.{stem}.*another model"):
        small().columns(NAME.format(0, stem), shape)


def test_experts_that_were_never_chosen():
    assert small().never_chosen() == {"blk.0": [2], "blk.1": [2]}
    importance = small()
    importance.entries[NAME.format(1, "ffn_up_exps")] = entry([0], [0], [0], [1], counts=[0, 1, 0, 1])
    assert importance.never_chosen() == {"blk.0": [2], "blk.1": [0, 2]}


# Merging --------------------------------------------------------------------------------------------------------------


def test_sums_and_counts_are_added():
    one, other = small(), small()
    other.entries[NAME.format(7, "attn_output")] = entry([5], counts=[3])
    total = Importance.merged([one, other])
    assert (total.chunk_size, total.datasets, total.chunks) == (8, ("wiki.txt", "code.txt"), 10)
    for name, each in one.entries.items():
        np.testing.assert_array_equal(total.entries[name].sums, 2 * each.sums)
        np.testing.assert_array_equal(total.entries[name].counts, 2 * each.counts)
    assert total.entries[NAME.format(7, "attn_output")] is other.entries[NAME.format(7, "attn_output")]


def test_means_of_the_older_format_count_as_chunks(tmp_path):
    (tmp_path / "i.dat").write_bytes(dat_bytes([(b"blk.0.attn_output.weight", 4, [8.0] * 6)], 4, b"old.txt"))
    old = Importance.read(tmp_path / "i.dat")
    total = Importance.merged([old, small()])
    name = NAME.format(0, "attn_output")
    np.testing.assert_array_equal(total.entries[name].counts, [4 * 8 + 40])
    np.testing.assert_array_equal(total.entries[name].sums, 8.0 * 8 + small().entries[name].sums)
    assert total.datasets == ("old.txt", "wiki.txt", "code.txt")
    assert Importance.merged([old]).entries[name].counts.tolist() == [4 * 512]
    assert Importance.merged([old], 64).entries[name].counts.tolist() == [4 * 64]


def test_one_count_stands_for_every_expert():
    name = NAME.format(0, "ffn_down_exps")
    one = Importance({name: entry(np.arange(20.0), counts=[10])}, chunk_size=8)
    for parts in ([one, small()], [small(), one]):
        total = Importance.merged(parts).entries[name]
        assert total.counts.tolist() == [50, 17, 10, 11]
        np.testing.assert_array_equal(total.sums, small().entries[name].sums + np.arange(20).reshape(4, 5))


def test_files_of_different_models_are_not_merged():
    name = NAME.format(0, "ffn_down_exps")
    for other in (entry(np.ones(21), counts=[1]), Entry(np.ones((2, 10)), np.ones(2, np.int64))):
        with pytest.raises(PymlaError, match="different models"):
            Importance.merged([small(), Importance({name: other}, chunk_size=8)])


# Statistics -----------------------------------------------------------------------------------------------------------


def test_statistics_of_tensors():
    """One by one, as llama.cpp's loops have them."""
    importance = small()
    importance.entries["output.weight"] = entry([0, 1e-6, 3, 200], counts=[2])
    found = tensor_statistics(importance)
    assert [each.tensor for each in found] == sorted(each.tensor for each in found)
    assert {each.name for each in found} == set(importance.entries)
    for each in found:
        sums, counts = importance.entries[each.name]
        values = [value / count for row, count in zip(sums, counts, strict=True) if count for value in row]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum(value * value for value in values) / len(values) - mean * mean)
        shares = [value / sum(values) for value in values if value]
        expected = {
            "layer": None if each.name == "output.weight" else int(each.name.split(".")[1]),
            "total": sum(values),
            "minimum": min(values),
            "maximum": max(values),
            "mean": mean,
            "deviation": deviation,
            "active": sum(value > 1e-5 for value in values) / len(values),
            "columns": len(values),
            "entropy": -sum(share * math.log2(share) for share in shares),
            "outliers": sum((value - mean) / deviation > 1 for value in values) / len(values),
        }
        for field, value in expected.items():
            assert getattr(each, field) == pytest.approx(value), field
        assert each.relative_entropy == pytest.approx(expected["entropy"] / math.log2(len(values)))
        before = importance.entries.get(each.name.replace("blk.1", "blk.0")) if each.layer else None
        if before is None:
            assert each.cosine == 0
        else:
            one, other = sums.reshape(-1), before.sums.reshape(-1)
            assert each.cosine == pytest.approx(one @ other / math.sqrt((one @ one) * (other @ other)))


def test_statistics_of_layers():
    tensors = tensor_statistics(small())
    for found in layer_statistics(tensors):
        own = [each for each in tensors if each.layer == found.layer]
        columns = sum(each.columns for each in own)
        for field in ("total", "outliers", "cosine"):
            expected = sum(getattr(each, field) * each.columns for each in own) / columns
            assert getattr(found, field) == pytest.approx(expected)
    assert [each.layer for each in layer_statistics(tensors)] == [0, 1]


def test_statistics_of_zeros():
    importance = Importance({"blk.0.x.weight": entry([0, 0], counts=[3]), "y": entry([1], counts=[0])}, chunk_size=1)
    (found,) = tensor_statistics(importance)
    assert (found.total, found.active, found.entropy, found.outliers, found.deviation) == (0, 0, 0, 0, 0)
    assert layer_statistics([]) == []
