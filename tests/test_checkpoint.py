import json
import math

import numpy as np
import pytest
from hub import V2, hub_folder, random_weights, safetensors, write_json

from pymla.errors import PymlaError
from pymla.files.checkpoint import INDEX, read_json
from pymla.files.checkpoint_encodings import Quantisation
from pymla.make.hub_weights import HubWeights


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16"])
def test_rows(tmp_path, dtype, files):
    weights = random_weights(V2)
    checkpoint = HubWeights(hub_folder(tmp_path / "Tiny", V2, weights, dtype, files))
    assert checkpoint.names == set(weights)
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(checkpoint.rows(name, 3, 9), weights[name][3:9])
    np.testing.assert_array_equal(checkpoint.rows(name, 3, 3), weights[name][3:3])
    for name, value in weights.items():
        found = checkpoint.read(name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, value)


def e4m3(code):
    """The value of a float8 code, after the format's definition (arXiv:2209.05433, table 1)."""
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return -magnitude if code & 128 else magnitude


def test_every_float8_value(tmp_path):
    codes = np.array([code for code in range(256) if code & 127 != 127], np.uint8).reshape(2, 127)
    scale = np.array([[1.5], [0.25]], np.float32)
    safetensors(tmp_path / "model.safetensors", {"x": ("F8_E4M3", codes), "x_scale_inv": scale})
    checkpoint = HubWeights(tmp_path, Quantisation((1, 128)))
    checkpoint.expect("x", (2, 127))
    assert checkpoint.names == {"x"}
    expected = np.array([[e4m3(int(code)) for code in row] for row in codes], np.float32) * scale
    np.testing.assert_array_equal(checkpoint.read("x"), expected)
    np.testing.assert_array_equal(checkpoint.rows("x", 1, 2), expected[1:])


def test_float8_not_a_number(tmp_path):
    stored = {"x": ("F8_E4M3", np.array([[127]], np.uint8)), "x_scale_inv": np.ones((1, 1), np.float32)}
    safetensors(tmp_path / "model.safetensors", stored)
    with pytest.raises(PymlaError, match="tensor x holds infinity or NaN"):
        HubWeights(tmp_path).read("x")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"y": np.ones(3, np.float32)}, "tensor x is missing"),
        ({"x": np.ones((3, 2), np.float32)}, r"tensor x has shape \(3, 2\); config.json asks for \(2, 3\)"),
        ({"x": ("I32", np.ones((2, 3), np.int32))}, "tensor x is of type I32"),
        ({"x": ("F32", np.ones((2, 3), np.float16))}, "tensor x does not fit"),
        ({"x": ("F8_E4M3", np.ones((2, 3), np.uint8))}, "tensor x_scale_inv is missing"),
        (
            {"x": ("F8_E4M3", np.ones((2, 3), np.uint8)), "x_scale_inv": np.ones((2, 1), np.float32)},
            r"x_scale_inv has shape \(2, 1\)",
        ),
    ],
)
def test_what_is_expected_and_not_there(tmp_path, stored, message):
    safetensors(tmp_path / "model.safetensors", stored)
    with pytest.raises(PymlaError, match=message):
        HubWeights(tmp_path).expect("x", (2, 3))


TENSORS = {name: np.full((2, 3), i, np.float32) for i, name in enumerate("abc")}


def shards(folder, stem="model", count=3, digits=5, first=1):
    """A tensor in each file, without an index."""
    for i, (name, value) in enumerate(TENSORS.items()):
        safetensors(folder / f"{stem}-{i + first:05}-of-{count:0{digits}}.safetensors", {name: value})


def header(path, entries, data=b""):
    """A safetensors file with a header as it stands: bytes, or what JSON shall hold."""
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize("names", [{}, {"stem": "DeepSeek-V3"}, {"digits": 6}])
def test_shards_without_an_index(tmp_path, names):
    shards(tmp_path, **names)
    (tmp_path / "._model-00001-of-00003.safetensors").write_bytes(b"of another system")
    checkpoint = HubWeights(tmp_path)
    assert checkpoint.names == set(TENSORS)
    assert len(checkpoint.files) == 3
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(checkpoint.read(name), value)


@pytest.mark.parametrize("name", ["weights.safetensors", "model-00001-of-00001.safetensors"])
def test_one_file_of_another_name(tmp_path, name):
    safetensors(tmp_path / name, TENSORS)
    checkpoint = HubWeights(tmp_path)
    assert (checkpoint.names, checkpoint.files) == (set(TENSORS), [tmp_path / name])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([{"count": 4}], "3 files are there of the 4 of which .* is one .first that is missing: 4"),
        ([{"count": 2}], "3 files are there of the 2 .*missing: none"),
        ([{"count": 10**8}], "3 files are there of the 100000000"),
        ([{"first": 0}], "3 files are there of the 3 .*missing: 3"),
        ([{}, {"stem": "other"}], "6 safetensors files of 2 sets"),
        ([{}, {"digits": 6}], "6 safetensors files of 2 sets"),
    ],
)
def test_shards_that_do_not_make_a_set(tmp_path, sets, message):
    for each in sets:
        shards(tmp_path, **each)
    with pytest.raises(PymlaError, match=message):
        HubWeights(tmp_path)


def test_two_files_without_an_index(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        safetensors(tmp_path / name, TENSORS)
    with pytest.raises(PymlaError, match="2 safetensors files of 2 sets"):
        HubWeights(tmp_path)
    safetensors(tmp_path / "model.safetensors", TENSORS)
    assert HubWeights(tmp_path).files == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "1.safetensors", "b": "1.safetensors"}, "1.safetensors: lacks tensor b, which .* says it has"),
        ({"a": "2.safetensors", "b": "1.safetensors"}, "has tensor .*, which .* says is in"),
        ({"a": "1.safetensors", "b": "3.safetensors"}, "3.safetensors: tensor a is also in 1.safetensors"),
        ({"a": "../1.safetensors"}, "weight_map names '../1.safetensors'; the name of a file beside it"),
        ({"a": "/etc/passwd"}, "weight_map names '/etc/passwd'"),
        ({"a": "sub/1.safetensors"}, "the name of a file beside it"),
        ({"a": "sub\\1.safetensors"}, "the name of a file beside it"),
        ({"a": ".."}, "the name of a file beside it"),
        ({"a": ""}, "the name of a file beside it"),
        ({"a": "x\0y"}, "the name of a file beside it"),
        ({"a": "\ud800"}, "the name of a file beside it"),
        ({"a": "\x1b[2J"}, "the name of a file beside it"),
        ({"a": "x" * 5000}, "the name of a file beside it"),
        ({"a": "x.safetensors", "b": "1.safetensors"}, "x.safetensors: 1 of the 2 files that .* names are missing"),
        ({}, "no weight_map"),
        ({"a": None}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_is_wrong(tmp_path, places, message):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "1.safetensors", folder / "1.safetensors", folder / "sub" / "1.safetensors"):
        safetensors(path, {"a": TENSORS["a"]})
    safetensors(folder / "2.safetensors", {"b": TENSORS["b"]})
    safetensors(folder / "3.safetensors", {"a": TENSORS["a"], "b": TENSORS["b"]})
    write_json(folder / INDEX, {"weight_map": places})
    with pytest.raises(PymlaError, match=message) as error:
        HubWeights(folder)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "a name occurs twice"),
        (b'{"\xff": 1}', "not valid JSON"),
        (b"1" * 5000, "not valid JSON"),
        ([], "JSON list"),
        ({"a": None}, "tensor a has a damaged header entry"),
        ({"a": ENTRY | {"shape": [-1]}}, "tensor a has a damaged"),
        ({"a": ENTRY | {"shape": [True]}}, "tensor a has a damaged"),
        ({"a": ENTRY | {"shape": "12"}}, "tensor a has a damaged"),
        ({"a": ENTRY | {"shape": [1.0]}}, "tensor a has a damaged"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, "tensor a has a damaged"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, "tensor a has a damaged"),
        ({"a": ENTRY | {"data_offsets": [-8, 0]}}, "tensor a has a damaged"),
        ({"a": ENTRY | {"data_offsets": [0]}}, "tensor a has a damaged"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, "tensors a and b overlap"),
        ({"a\n\x1b[2J": ENTRY}, "a tensor's name"),
        ({"a" * 5000: ENTRY}, "a tensor's name"),
    ],
)
def test_damaged_headers(tmp_path, entries, message):
    header(tmp_path / "model.safetensors", entries, bytes(16))
    with pytest.raises(PymlaError, match=message) as error:
        HubWeights(tmp_path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


def test_odd_headers_that_are_sound(tmp_path):
    entries = {"__metadata__": {"format": "pt"}, "none": ENTRY | {"shape": [0, 5], "data_offsets": [8, 8]}, "a": ENTRY}
    entries["kind"] = ENTRY | {"dtype": "NEW", "data_offsets": [8, 16]}
    header(tmp_path / "model.safetensors", entries, bytes(16))
    checkpoint = HubWeights(tmp_path)
    assert checkpoint.names == {"none", "a", "kind"}
    checkpoint.expect("a", (2,))
    with pytest.raises(PymlaError, match="tensor kind is of type NEW"):
        checkpoint.expect("kind", (2,))


def test_a_file_that_becomes_shorter(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors(path, TENSORS)
    checkpoint = HubWeights(tmp_path)
    checkpoint.expect("c", (2, 3))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(PymlaError, match="has become shorter"):
        checkpoint.read("c")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [("F64", np.full((1, 1), 1e300)), ("F8_E4M3", np.full((1, 1), 126, np.uint8))])
def test_numbers_that_float32_does_not_hold(tmp_path, value):
    stored = {"x": value, "x_scale_inv": np.full((1, 1), 1e38, np.float32)}
    safetensors(tmp_path / "model.safetensors", stored)
    with pytest.raises(PymlaError, match="tensor x holds infinity or NaN, or a number that float32 does not hold"):
        HubWeights(tmp_path).read("x")


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000])
def test_json_nested_too_deeply(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(PymlaError, match=r"config\.json: its JSON is nested too deeply"):
        read_json(tmp_path / "config.json")


def test_json_that_is_too_large(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate((1 << 30) + 1)  # takes no space
    with pytest.raises(PymlaError, match="larger than any JSON file"):
        read_json(tmp_path / "config.json")
