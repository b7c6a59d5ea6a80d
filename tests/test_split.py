"""Models in several files from one, and one from several."""

import json
import signal
import textwrap

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFValueType
from gguf_files import write
from golden_split import GOLDEN, digests
from test_interrupts import started

from pymla import ggml
from pymla.cli.merge import merge as merge_command
from pymla.cli.sizes import Size
from pymla.cli.split import split as split_command
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.make.split import merge, split

#: A value of every type, which both directions keep.
METADATA = {
    "a.u8": (GGUFValueType.UINT8, 7),
    "a.i8": (GGUFValueType.INT8, -7),
    "a.u16": (GGUFValueType.UINT16, 700),
    "a.i64": (GGUFValueType.INT64, -(2**40)),
    "a.f64": (GGUFValueType.FLOAT64, 0.1),
    "a.flag": True,
    "a.text": "déjà vu",
    "a.words": ["x", "", "z"],
    "a.numbers": [1, 2, 3],
}


def tensors(count=7):
    rng = np.random.default_rng(0)
    found = {f"t{i}": (rng.standard_normal((3, 8 + 8 * i), np.float32), ggml.F32) for i in range(count)}
    # Nine bytes of padding follow it.
    return found | {"odd": (rng.standard_normal((1, 5), np.float32), ggml.F32)}


@pytest.fixture
def model(tmp_path):
    return write(tmp_path / "model.gguf", METADATA, tensors())


def fields(path):
    """Keys of a file in their order, with types and values."""
    reader = gguf.GGUFReader(path)
    return [(key, each.types, each.contents()) for key, each in reader.fields.items() if not key.startswith("GGUF.")]


def held(paths):
    """Tensors of files, in their order."""
    readers = [gguf.GGUFReader(path) for path in paths]
    return [
        (each.name, each.tensor_type, each.shape.tolist(), each.data.tobytes())
        for reader in readers
        for each in reader.tensors
    ]


@pytest.mark.parametrize(
    ("limit", "parts"), [({"max_tensors": 3}, 3), ({"max_size": 500}, 7), ({"max_size": 10**6}, 1)]
)
def test_there_and_back(tmp_path, model, limit, parts):
    paths = split(model, tmp_path / "parts.gguf", **limit)
    assert [path.name for path in paths] == [f"parts-{i + 1:05}-of-{parts:05}.gguf" for i in range(parts)]
    assert held(paths) == held([model])
    sizes = [sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors) for path in paths]
    counts = [len(gguf.GGUFReader(path).tensors) for path in paths]
    if "max_size" in limit:
        assert all(size <= limit["max_size"] or count == 1 for size, count in zip(sizes, counts, strict=True))
    own = [
        ("split.no", [GGUFValueType.UINT16], 0),
        ("split.tensors.count", [GGUFValueType.INT32], 8),
        ("split.count", [GGUFValueType.UINT16], parts),
    ]
    assert fields(paths[0]) == [*fields(model), *own]
    for number, path in enumerate(paths[1:], 1):
        assert fields(path) == [("split.no", [GGUFValueType.UINT16], number), *own[1:]]
    assert ModelFile.open(paths[-1]).metadata["a.text"] == "déjà vu"
    whole = merge(paths[-1], tmp_path / "whole.gguf")
    assert held([whole]) == held([model])
    # As gguf-split leaves it: the number of the first part, and a count of 0.
    assert fields(whole) == [*fields(model), *own[:2], ("split.count", [GGUFValueType.UINT16], 0)]
    assert ModelFile.open(whole).parts == [whole]
    again = split(whole, tmp_path / "again", **limit)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


@pytest.mark.parametrize(("limits", "name"), [({"max_tensors": 7}, "max_tensors"), ({"max_size": 10**6}, "max_size")])
def test_files_are_those_of_gguf_split(tmp_path, limits, name):
    """Byte for byte, in both directions."""
    expected = json.loads((GOLDEN / "split.json").read_text(encoding="utf-8"))["made"][name]
    parts = split(GOLDEN / "v3.gguf", tmp_path / name, **limits)
    assert digests(parts) == expected["parts"]
    assert digests([merge(parts[1], tmp_path / "whole.gguf")]) == [expected["merged"]]


def test_another_alignment(tmp_path):
    metadata = METADATA | {"general.alignment": (GGUFValueType.UINT32, 128)}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "deepseek2")
    writer.add_custom_alignment(128)
    for name, (data, qtype) in tensors().items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(qtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = split(tmp_path / "m.gguf", tmp_path / "p", max_tensors=4)
    assert held(paths) == held([tmp_path / "m.gguf"])
    assert ModelFile.open(paths[0]).alignment == metadata["general.alignment"][1]
    assert held([merge(paths[0], tmp_path / "w.gguf")]) == held(paths)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "give `max_size` or `max_tensors`"),
        ({"max_size": 1, "max_tensors": 1}, "give `max_size` or `max_tensors`"),
        ({"max_size": 0}, "`max_size` is 0"),
        ({"max_tensors": -1}, "`max_tensors` is -1"),
    ],
)
def test_limits_that_are_none(tmp_path, model, limits, message):
    with pytest.raises(PymlaError, match=message):
        split(model, tmp_path / "p", **limits)
    assert list(tmp_path.iterdir()) == [model]


def test_what_is_not_merged(tmp_path, model):
    with pytest.raises(PymlaError, match="it is not a part of a split model"):
        merge(model, tmp_path / "w.gguf")
    paths = split(model, tmp_path / "p", max_tensors=3)
    with pytest.raises(PymlaError, match="is read; choose another file for the output"):
        merge(paths[0], paths[1])
    paths[1].unlink()
    with pytest.raises(PymlaError, match=r"p-00002-of-00003\.gguf: this part of .* is missing"):
        merge(paths[0], tmp_path / "w.gguf")
    with pytest.raises(PymlaError, match="cannot be opened"):
        merge(tmp_path / "none.gguf", tmp_path / "w.gguf")
    assert not list(tmp_path.glob("w.gguf*"))


def test_a_part_that_changes_meanwhile(tmp_path, model):
    data = model.read_bytes()

    def cut(done, total, name):
        model.write_bytes(data[:-500])

    with pytest.raises(PymlaError, match="has become shorter"):
        split(model, tmp_path / "p", max_tensors=3, progress=cut)
    assert list(tmp_path.iterdir()) == [model]


def test_commands(tmp_path, model):
    result = CliRunner().invoke(split_command, [str(model), str(tmp_path / "p"), "--max-size", "0.6K"])
    assert result.exit_code == 0, result.output
    parts = sorted(tmp_path.glob("p-*.gguf"))
    assert [line.split(": ")[0] for line in result.stderr.splitlines()] == list(map(str, parts))
    result = CliRunner().invoke(merge_command, [str(parts[0]), str(tmp_path / "w.gguf")])
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'w.gguf'}: 0.0 MiB" in result.stderr
    assert held([tmp_path / "w.gguf"]) == held([model])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("40G", 40 * 10**9), ("500M", 5 * 10**8), ("2 KiB", 2048), ("1.5GiB", 3 << 29), ("70", 70), ("3tb", 3 * 10**12)],
)
def test_sizes(text, nbytes):
    assert Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize("text", ["", "G", "-1G", "40X", "4e9", "0", "0.1", "١G", "9" * 400 + "G", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(Exception, match="is no size"):
        Size().convert(text, None, None)


SLOW = """
    import time
    from pymla import cli
    from pymla.files import gguf_output
    gguf_output.RECORD_BYTES = 1
    write_all = gguf_output.write_all
    def slow(write, data):
        time.sleep(0.05)
        print("ready", flush=True)
        write_all(write, data)
    gguf_output.write_all = slow
    cli.main()
"""


def test_ctrl_c(tmp_path, model):
    arguments = "split", str(model), str(tmp_path / "p"), "--max-tensors", "3"
    process = started("-c", textwrap.dedent(SLOW), *arguments)
    for _ in range(12):
        assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    first = tmp_path / "p-00001-of-00003.gguf"
    assert errors.strip() == f"pymla: {first}: interrupted; the same command goes on where it stopped"
    assert not list(tmp_path.glob("p-*.gguf"))
    result = CliRunner().invoke(split_command, arguments[1:])
    assert result.exit_code == 0, result.output
    assert "goes on" in result.stderr
    assert held(sorted(tmp_path.glob("p-*"))) == held([model])
