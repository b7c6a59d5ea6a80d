"""Whatever is in a Hugging Face folder, converting it gives a file that loads or one line that says what is wrong."""

import copy
import json
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
from hub import V3, hub_folder, random_weights, write_json
from hub_models import write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pymla
from pymla.errors import PymlaError
from pymla.make.convert import LAYOUTS, convert

JSON_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors.index.json",
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

#: Types that compile few kernels.
TYPES = ("auto", "F32", "BF16", "Q8_0")

#: What JSON can hold and no field of a sound folder does; and values that are one too many or one too few.
ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 255, 299, 300, 2**31, 2**32, 2**63, 2**64, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.0, 1e-50, 1e38, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", "x", "257", "\ud800", "\x1b[2J\n", "../x", "a\0b", "default", "yarn", "BPE", "silu", "F8_E4M3", "x" * 5000),
    *([], {}, [[]], [None], [257, 280], [1] * 3, {"a": []}, {"content": 1}, {"type": "yarn"}, {"name": "default"}),
]
VALUES = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with every file that is read."""
    folder = tmp_path_factory.mktemp("sound") / "Tiny"
    config = V3 | {
        "num_hidden_layers": 2,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [48, 40]},
    }
    hub_folder(folder, config, random_weights(V3), files=2)
    write_json(folder / "generation_config.json", {"eos_token_id": [257, 280], "temperature": 0.6})
    convert(folder, folder.parent / "m.gguf")
    return folder


def mutate(value, draw):
    """Change one thing somewhere in a JSON value, which is changed in place."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key = draw(st.sampled_from(keys))
    if isinstance(value[key], dict | list) and value[key] and draw(st.integers(0, 3)):
        mutate(value[key], draw)
        return
    kind = draw(st.sampled_from(("replace", "replace", "remove", "copy")))
    if kind == "replace":
        value[key] = copy.deepcopy(draw(VALUES))
    elif kind == "remove":
        del value[key]
    else:
        value[draw(st.sampled_from(keys))] = copy.deepcopy(value[key])


def mutate_bytes(raw, draw):
    """Change some bytes, cut them off, or put others between."""
    at = draw(st.integers(0, min(len(raw), 4000)))
    new = draw(
        st.sampled_from((b"", b"\0", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b"NaN", b"1" * 5000, b",", b'"'))
    )
    return raw[:at] + new + draw(st.sampled_from((raw[at:], raw[at + len(new) :], b"")))


def mutate_file(path, draw):
    """Change what is in a file: its JSON, or its bytes as they come."""
    raw = path.read_bytes()
    if path.suffix not in (".json", ".safetensors") or not draw(st.integers(0, 4)):
        path.write_bytes(mutate_bytes(raw, draw))
        return
    start = 8 if path.suffix == ".safetensors" else 0
    stop = 8 + int.from_bytes(raw[:8], "little") if start else len(raw)
    value = json.loads(raw[start:stop])
    for _ in range(draw(st.integers(1, 2))):
        mutate(value, draw)
    text = json.dumps(value).encode()
    path.write_bytes((len(text).to_bytes(8, "little") if start else b"") + text + raw[stop:])


def check_changed(sound, file, draw, pre):
    """A folder in which one file is changed gives a file that loads, or one line."""
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "Tiny", Path(place) / "out" / "m.gguf"
        shutil.copytree(sound, folder)
        out.parent.mkdir()
        mutate_file(folder / file, draw)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                convert(
                    folder,
                    out,
                    qtype=draw(st.sampled_from(TYPES)),
                    layout=draw(st.sampled_from(LAYOUTS)),
                    mtp=draw(st.sampled_from((None, False, True))),
                    pre=pre,
                )
        except PymlaError as error:
            message = str(error)
            assert message.isprintable()
            assert len(message) < 1000
            assert list(out.parent.iterdir()) == []
            return
        assert list(out.parent.iterdir()) == [out]
        with pymla.load(out, device="reference", ctx=1):
            pass


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
def test_any_folder(sound, data):
    files = (*JSON_FILES, *SHARDS, "config.json", "tokenizer.json")
    pre = data.draw(st.sampled_from(("deepseek-coder", None)))
    check_changed(sound, data.draw(st.sampled_from(files)), data.draw, pre)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Sound folders of other architectures, each with another kind of vocabulary."""
    place = tmp_path_factory.mktemp("others")
    found = [write_folder(place / name, name) for name in ("Kimi-K2.5", "Mistral-Large-3", "MiniCPM3", "GLM-5")]
    for folder in found:
        convert(folder, place / "m.gguf", pre="glm4" if folder.name == "GLM-5" else None)
    return found


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
def test_any_folder_of_another_architecture(others, data):
    sound = data.draw(st.sampled_from(others))
    files = sorted(path.name for path in sound.iterdir())
    check_changed(sound, data.draw(st.sampled_from(files)), data.draw, "glm4" if sound.name == "GLM-5" else None)
