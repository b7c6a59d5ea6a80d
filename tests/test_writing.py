"""Models on their way into files: what is written of their weights, and what is refused."""

import subprocess
import sys
import textwrap

import gguf
import numpy as np
import pytest

from pymla import ggml
from pymla.cpu.quantise import quantise
from pymla.errors import PymlaError
from pymla.files.gguf_output import Resume
from pymla.files.gguf_reader import ModelFile
from pymla.make.writing import Source, write_model
from pymla.reference.quant import dequantise
from pymla.reference.quant import quantise as plain_quantise


def source(name, values, step=5):
    """A tensor whose rows come `step` at a time, over the ends of matrices."""
    rows = values.reshape(-1, values.shape[-1])
    return Source(name, values.shape, lambda: (rows[i : i + step] for i in range(0, len(rows), step)))


def random_values(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def write(path, values, types, **options):
    """Write tensors; returns the file. `types` is the type of all, or of each."""
    kinds = types if isinstance(types, dict) else dict.fromkeys(values, types)
    paths = write_model(path, "test", {}, [source(*item) for item in values.items()], kinds, **options)
    return ModelFile.open(paths[0])


class ByMatrix:
    """The importance matrix of one tensor."""

    def __init__(self, columns):
        self._columns = columns

    def columns(self, name, shape):
        return self._columns if name == "experts" else None


@pytest.mark.parametrize("qtype", [ggml.F32, ggml.F16, ggml.BF16, ggml.Q8_0, ggml.Q4_0])
def test_pieces_are_quantised_as_the_whole(tmp_path, qtype):
    values = {"matrix": random_values(7, 64), "experts": random_values(3, 4, 32), "vector": random_values(32)}
    importance = np.random.default_rng(1).uniform(0.1, 9, (3, 32)).astype(np.float32)
    file = write(tmp_path / "m.gguf", values, qtype, importance=ByMatrix(importance))
    for name, value in values.items():
        rows = value.reshape(-1, value.shape[-1])
        if name == "experts":
            expected = np.concatenate([quantise(value[e], qtype, importance[e]) for e in range(3)])
        else:
            expected = quantise(rows, qtype)
        assert (file.tensors[name].qtype, file.tensors[name].shape) == (qtype, value.shape)
        np.testing.assert_array_equal(file.tensors[name].data, expected.reshape(-1), err_msg=name)
    if qtype in ggml.FLOATS:
        expected = plain_quantise(values["matrix"], qtype).reshape(-1)
        np.testing.assert_array_equal(file.tensors["matrix"].data, expected)


def test_importance_counts(tmp_path):
    values, importance = {"experts": random_values(1, 4, 32)}, np.ones((1, 32), np.float32)
    importance[0, :4] = 1e4
    errors = []
    for each in (None, ByMatrix(importance)):
        data = write(tmp_path / "m.gguf", values, ggml.Q4_0, importance=each).tensors["experts"].data
        found = dequantise(data.reshape(4, -1), ggml.Q4_0)
        errors.append(np.square(found - values["experts"][0])[:, :4].sum())
    assert errors[1] < errors[0]


def test_copies_are_written_as_they_are(tmp_path):
    values = {"a": random_values(6, 32), "b": random_values(6, 32)}
    for qtype in (ggml.F32, ggml.BF16, ggml.Q8_0):
        blocks = plain_quantise(random_values(6, 32), qtype)
        copies = {"b": lambda blocks=blocks: iter(np.split(blocks, 3))}
        file = write(tmp_path / "m.gguf", values, {"a": ggml.F16, "b": qtype}, copies=copies)
        assert file.tensors["b"].data.tobytes() == blocks.tobytes()
        assert file.tensors["a"].data.tobytes() == values["a"].astype(np.float16).tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("shape", "index", "place"),
    [
        ((9, 32), 7 * 32 + 3, "row 7, column 3"),
        ((3, 4, 32), 9 * 32, "matrix 2, row 1, column 0"),
        ((64,), 5, "column 5"),
    ],
)
@pytest.mark.parametrize("copied", [None, ggml.F32, ggml.F16, ggml.BF16])
def test_weights_that_are_not_finite(tmp_path, bad, shape, index, place, copied):
    values = random_values(*shape)
    values.reshape(-1)[index] = bad
    copies, qtype = {}, ggml.F32
    if copied is not None:
        with np.errstate(invalid="ignore"):
            blocks = plain_quantise(values.reshape(-1, shape[-1]), copied)
        copies, qtype = {"blk.0.x": lambda: iter(blocks)}, copied
    message = f"m.gguf: cannot be written: tensor blk.0.x holds infinity or NaN in {place}; "
    with pytest.raises(PymlaError, match=message):
        write(tmp_path / "m.gguf", {"blk.0.x": values}, qtype, copies=copies)
    assert list(tmp_path.iterdir()) == []


def test_a_copied_scale_that_is_not_finite(tmp_path):
    blocks = plain_quantise(random_values(6, 64), ggml.Q8_0)
    blocks[4, 34:36] = np.float16([np.nan]).view(np.uint8)
    copies = {"x": lambda: iter(np.split(blocks, 3))}
    with pytest.raises(PymlaError, match="tensor x has a scale that is infinite or NaN in block 9"):
        write(tmp_path / "m.gguf", {"x": random_values(6, 64)}, ggml.Q8_0, copies=copies)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("qtype", "largest", "too_large"),
    [
        (ggml.Q8_0, 127 * 65000, 127 * 65504 * 3),
        (ggml.Q4_0, 8 * 65000, 8 * 65504 * 3),
        (ggml.F16, 65504, 65520),
        (ggml.BF16, 3.38e38, 3.4e38),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_values_at_the_end_of_a_types_range(tmp_path, qtype, largest, too_large, sign):
    values = random_values(7, 64)
    values[5, 7] = sign * largest
    data = write(tmp_path / "m.gguf", {"x": values}, qtype).tensors["x"].data.reshape(7, -1)
    assert dequantise(data, qtype)[5, 7] == pytest.approx(sign * largest, rel=0.02)
    values[5, 7] = sign * too_large
    older = (tmp_path / "m.gguf").read_bytes()
    name = ggml.NAME[qtype]
    with pytest.raises(
        PymlaError, match=rf"tensor x holds .* in row 5, column 7, too large for {name}; give it another"
    ):
        write(tmp_path / "m.gguf", {"x": values}, qtype)
    assert (tmp_path / "m.gguf").read_bytes() == older


def test_parts_as_gguf_split_names_them(tmp_path):
    values = {f"t{i}": random_values(8, 32) for i in range(5)}  # 1,024 bytes each
    types = dict.fromkeys(values, ggml.F32)
    sources = [source(*item) for item in values.items()]
    paths = write_model(tmp_path / "m.gguf", "test", {"key": "value"}, sources, types, split=2100)
    assert [path.name for path in paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for number, path in enumerate(paths):
        reader = gguf.GGUFReader(path)
        fields = {key: reader.fields[key] for key in reader.fields if not key.startswith("GGUF.")}
        first = ["general.architecture", "key"] if number == 0 else []
        assert list(fields) == [*first, "split.no", "split.tensors.count", "split.count"]
        kinds = gguf.GGUFValueType
        for key, value, kind in (
            ("split.no", number, kinds.UINT16),
            ("split.count", 3, kinds.UINT16),
            ("split.tensors.count", 5, kinds.INT32),
        ):
            assert (fields[key].contents(), fields[key].types) == (value, [kind])
        assert [tensor.name for tensor in reader.tensors] == list(values)[2 * number : 2 * number + 2]
    file = ModelFile.open(paths[1])
    for name, value in values.items():
        assert file.tensors[name].data.tobytes() == value.tobytes()


def test_a_model_that_fits_one_part_is_one_file(tmp_path):
    values = {"t": random_values(8, 32)}
    file = write(tmp_path / "m.gguf", values, ggml.F32, split=10)
    assert file.parts == [tmp_path / "m.gguf"]
    assert "split.count" not in file.metadata


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("pymla.files.gguf_output.RECORD_BYTES", 1)
    values = {f"t{i}": random_values(8, 64) for i in range(5)}
    write(tmp_path / "whole.gguf", values, ggml.Q8_0)
    inputs, notes = [tmp_path / "whole.gguf"], []

    def stop(done, total, name):
        if name == "t3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m.gguf", values, ggml.Q8_0, resume=Resume(inputs), progress=stop)
    write(tmp_path / "m.gguf", values, ggml.Q8_0, resume=Resume(inputs, notes.append))
    assert "goes on" in notes[0]
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


MEMORY = """
    import json, resource, sys
    from functools import partial
    from pathlib import Path
    from pymla import ggml
    from pymla.make.hub_weights import HubWeights
    from pymla.make.writing import Source, write_model

    folder, name = Path(sys.argv[1]), "x"

    def convert(folder, rows, columns, qtype, copied):
        weights = HubWeights(folder)
        weights.expect(name, (rows, columns))
        spans = [(i, min(i + 512, rows)) for i in range(0, rows, 512)]
        source = Source(name, (rows, columns), lambda: (weights.rows(name, *span) for span in spans))
        copies = {name: lambda: (weights.blocks(name, *span) for span in spans)} if copied else {}
        write_model(folder / "m.gguf", "test", {}, [source], {name: qtype}, copies=copies)

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    convert(folder / "small", 8, 4096, ggml.Q8_0, False)
    convert(folder / "small", 8, 4096, ggml.BF16, True)
    before = peak()
    convert(folder / "large", 16384, 4096, ggml.BF16, True)
    copied = peak()
    convert(folder / "large", 16384, 4096, ggml.Q8_0, False)
    print(before, copied, peak())
"""


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    """A matrix of 128 MiB in BF16, of which the disk has no block, so 256 MiB as float32."""
    for name, rows in (("small", 8), ("large", 16384)):
        folder = tmp_path / name
        folder.mkdir()
        header = b'{"x":{"dtype":"BF16","shape":[%d,4096],"data_offsets":[0,%d]}}' % (rows, rows * 8192)
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + rows * 8192)
    script = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)]
    before, copied, quantised = map(int, subprocess.run(script, capture_output=True, check=True).stdout.split())
    # Pieces of 4 MiB, 8 MiB as float32: two that are read ahead, one being read, one being worked on and its result.
    assert copied - before < 40 << 20
    assert quantised - before < 90 << 20
