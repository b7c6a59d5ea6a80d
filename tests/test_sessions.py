"""Sessions on disk: what comes back, what they are tied to, and what is refused."""

import functools
import json
import struct
import zlib

import numpy as np
import pytest
from cache_checks import rows_of
from make_model import PRESETS, make_model

import pymla
from pymla import cpu
from pymla.engine import sessions
from pymla.engine.cache import Sequence
from pymla.engine.language_model import LanguageModel
from pymla.engine.model import Model
from pymla.engine.sessions import model_digest
from pymla.errors import PymlaError
from pymla.files import session_file
from pymla.models.weights import Weights

IDS = np.random.default_rng(0).integers(0, 300, 200, np.int32)
LENGTH = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sessions")


@functools.cache
def file_of(folder, preset, seed=1):
    return make_model(folder / f"{preset}-{seed}.gguf", PRESETS[preset], qtype="f32", seed=seed)


def loaded(folder, preset="tiny", seed=1, **options):
    return pymla.load(file_of(folder, preset, seed), **{"device": "reference", "ctx": 256, **options})


def prefilled(language_model):
    sequence = language_model.model.new_sequence()
    language_model.model.forward([(sequence, IDS[:LENGTH])])
    return sequence


@pytest.fixture(scope="module")
def saved(folder):
    """A session of the tiny model, with a float32 cache on the reference."""
    path = folder / "saved.session"
    with loaded(folder, cache_type="f32") as language_model:
        sessions.save(path, language_model, prefilled(language_model))
    return path


@pytest.fixture(scope="module")
def tiny(folder):
    with loaded(folder, cache_type="f32") as language_model:
        yield language_model


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("tiny", {"cache_type": "f32"}),
        ("tiny", {"cache_type": "q5_0", "mla": "1"}),
        ("tiny", {"cache_type": "q8_0", "mla": "0"}),
        ("tiny-glm", {"cache_type": "q8_0"}),
    ],
    ids=["latent", "q5_0", "full", "indexed"],
)
def test_a_text_goes_on_as_if_nothing_had_been(folder, tmp_path, preset, options):
    path = tmp_path / "a.session"
    with loaded(folder, preset, **options) as language_model:
        sequence = prefilled(language_model)
        sessions.save(path, language_model, sequence)
        assert (sequence.length, sequence.saved) == (LENGTH, None)
        expected = language_model.model.forward([(sequence, IDS[LENGTH:])], logits="all")
    with loaded(folder, preset, **options) as language_model:
        sequence = sessions.load(path, language_model)
        assert sequence.tokens == IDS[:LENGTH].tolist()
        assert language_model.model.cache.pages_needed(sequence, 1) == 3
        actual = language_model.model.forward([(sequence, IDS[LENGTH:])], logits="all")
    np.testing.assert_array_equal(actual, expected)


def test_sequences_that_are_out_of_the_cache_or_shifted(tiny, tmp_path):
    path, model = tmp_path / "a.session", tiny.model
    sequence = prefilled(tiny)
    model.shift(sequence, 0, 64)
    model.swap_out(sequence)
    model.truncate(sequence, 60)
    sessions.save(path, tiny, sequence)
    other = sessions.load(path, tiny)
    assert (other.tokens, other.shifted_from) == (IDS[64:124].tolist(), 0)
    logits = [model.forward([(each, IDS[:1])]) for each in (sequence, other)]
    np.testing.assert_array_equal(*logits)


def on_cpu(language_model, cache_type, mla="auto"):
    """The same model with a cache of the CPU's, whose kernels are not compiled."""
    file, config = language_model.file, language_model.config
    model = Model(config, Weights.from_gguf(file, config), cpu, cache_type=cache_type, mla=mla, ctx=256)
    return LanguageModel(file, config, language_model.tokenizer, model)


@pytest.mark.parametrize(("cache_type", "mla"), [("q8_0", "auto"), ("q4_0", "1"), ("q8_0", "0")])
def test_rows_of_the_cpu(tiny, tmp_path, cache_type, mla):
    path, language_model = tmp_path / "a.session", on_cpu(tiny, cache_type, mla)
    cache, sequence, rng = language_model.model.cache, Sequence(), np.random.default_rng(0)
    cache.extend([(sequence, IDS[:LENGTH])])
    cache.advance([(sequence, IDS[:LENGTH])])
    for layer in cache.layers:
        for rows in layer:
            rows.data[...] = rng.integers(0, 256, rows.data.shape, np.uint8)
    sessions.save(path, language_model, sequence)
    other = on_cpu(tiny, cache_type, mla)
    back = sessions.load(path, other)
    other.model.cache.extend([(back, [1])])
    expected = rows_of(cache, cpu, sequence, LENGTH)
    for now, before in zip(rows_of(other.model.cache, cpu, back, LENGTH), expected, strict=True):
        np.testing.assert_array_equal(now, before)


def test_a_session_of_float_rows_goes_to_another_device(tiny, saved):
    assert sessions.load(saved, on_cpu(tiny, "f32")).length == LENGTH


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2}, r"of the model tiny \(tiny-1.gguf\) \[\w{8}\], and this is tiny \(tiny-2.gguf\) \[\w{8}\]; load"),
        ({"preset": "tiny-plm"}, r"of the model tiny \(.*\) .*, and this is tiny-plm \(tiny-plm-1.gguf\)"),
        ({"overrides": {"deepseek2.expert_used_count": 1}}, r"of the model tiny .*, and this is tiny "),
        ({"cache_type": "f16"}, "a session of cache type f32, and this is cache type f16; load the model with"),
        ({"mla": "0"}, "a session of MLA mode 1, 2 or 3, and this is MLA mode 0"),
        ({"ctx": 149}, "a session of 150 tokens; the context holds 149, raise `ctx`"),
    ],
)
def test_sessions_of_something_else(folder, saved, options, message):
    language_model = loaded(folder, **{"cache_type": "f32", **options})
    with language_model, pytest.raises(PymlaError, match=message) as error:
        sessions.load(saved, language_model)
    assert str(error.value).startswith(f"{saved}: ")


def test_rows_of_another_device(folder, tmp_path):
    path = tmp_path / "a.session"
    with loaded(folder, cache_type="q8_0") as language_model:
        sessions.save(path, language_model, prefilled(language_model))
        other = on_cpu(language_model, "q8_0")
    with pytest.raises(PymlaError, match="a session of device reference, and this is device cpu; their rows of"):
        sessions.load(path, other)


# Files ----------------------------------------------------------------------------------------------------------------


def test_what_a_damaged_file_gives(saved, tiny, tmp_path):
    contents, path = saved.read_bytes(), tmp_path / "damaged.session"
    header = 20 + struct.unpack_from("<I", contents, 12)[0]
    rng = np.random.default_rng(0)
    places = [*range(20), *rng.integers(20, header, 20), *rng.integers(header, len(contents), 20), len(contents) - 1]
    for place in places:
        changed = bytearray(contents)
        changed[place] ^= 1 << rng.integers(8)
        refused(tiny, path, changed)
    for length in [0, 7, 8, 19, 20, 40, header - 1, header, header + 4 * LENGTH, len(contents) - 1]:
        refused(tiny, path, contents[:length])
    refused(tiny, path, contents + b"\0")


def refused(language_model, path, contents):
    path.write_bytes(contents)
    with pytest.raises(PymlaError) as error:
        sessions.load(path, language_model)
    assert str(error.value).startswith(f"{path}: ")
    assert any(part in str(error.value) for part in ("damaged: ", "is no session", "a session of version "))


@pytest.mark.parametrize(
    "change",
    [
        {"facts": 3},
        {"facts": {}},
        {"tokens": -1},
        {"tokens": "x"},
        {"tokens": None},
        {"shapes": None},
        {"shapes": [[1 << 70, 1]]},
        {"shapes": [[-4, -4]]},
        {"checksum": "xyz"},
        None,
        [],
    ],
)
def test_a_header_that_somebody_made_up(saved, tiny, tmp_path, change):
    """Its checksum is right."""
    contents = saved.read_bytes()
    length = struct.unpack_from("<I", contents, 12)[0]
    fields = json.loads(contents[20 : 20 + length])
    header = json.dumps(fields | change if isinstance(change, dict) else change).encode()
    start = struct.pack("<8sIII", session_file.MAGIC, session_file.VERSION, len(header), zlib.crc32(header))
    path = tmp_path / "a.session"
    path.write_bytes(start + header + contents[20 + length :])
    with pytest.raises(PymlaError, match=r"damaged: |a session of the model None") as error:
        sessions.load(path, tiny)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", [{"tokens": [-1]}, {"tokens": [10**6]}, {"rows": 2}, {"shifted_from": 1}, {"tokens": []}]
)
def test_tokens_and_rows_that_do_not_fit(saved, tiny, tmp_path, change):
    session = session_file.read(saved)
    facts = session.facts | {"shifted_from": change.get("shifted_from")}
    arrays = [array[:1] for array in session.arrays[: change.get("rows")]]
    path = tmp_path / "a.session"
    session_file.write(path, facts, np.array(change.get("tokens", [5]), np.int32), arrays)
    with pytest.raises(PymlaError, match="damaged: its tokens and rows do not fit each other; save the session again"):
        sessions.load(path, tiny)


def test_files_that_are_no_sessions(tiny, tmp_path, folder):
    for path, message in [
        (tmp_path / "none", "cannot be read"),
        (tmp_path, "cannot be read"),
        (file_of(folder, "tiny"), "is no session that pymla has saved"),
    ]:
        with pytest.raises(PymlaError, match=message):
            sessions.load(path, tiny)
    for path in (3, None, "", "a\0b", b"abc"):
        with pytest.raises(PymlaError, match="`path` is"):
            sessions.load(path, tiny)
        with pytest.raises(PymlaError, match="`path` is"):
            sessions.save(path, tiny, Sequence())


def test_what_cannot_be_saved(tiny, tmp_path):
    with pytest.raises(PymlaError, match="the sequence has no tokens; there is nothing to save"):
        sessions.save(tmp_path / "a.session", tiny, Sequence())
    with pytest.raises(PymlaError, match="it is a folder"):
        sessions.save(tmp_path, tiny, prefilled(tiny))
    assert list(tmp_path.iterdir()) == []


def test_a_newer_version_says_so(saved, tiny, tmp_path):
    contents = bytearray(saved.read_bytes())
    contents[8] = 2
    (tmp_path / "a.session").write_bytes(contents)
    with pytest.raises(PymlaError, match="a session of version 2, and this pymla reads version 1; save it again"):
        sessions.load(tmp_path / "a.session", tiny)


# Digests --------------------------------------------------------------------------------------------------------------


def test_what_a_digest_tells_apart(folder, tmp_path, tiny):
    """One tensor of other numbers; and not how a file is split, or what it is called."""
    own = model_digest(tiny.file, tiny.model)
    contents = bytearray(file_of(folder, "tiny").read_bytes())
    tensor = tiny.file.tensors["blk.1.ffn_norm.weight"]
    at = contents.index(bytes(tensor.data))
    contents[at + len(tensor.data) // 2] ^= 1
    (tmp_path / "changed.gguf").write_bytes(contents)
    with pymla.load(tmp_path / "changed.gguf", device="reference", ctx=256) as other:
        assert model_digest(other.file, other.model) != own
    with loaded(folder, ctx=100) as other:
        assert model_digest(other.file, other.model) == own


def test_frequencies_count(folder):
    """MiniCPM3 has other factors of them for long contexts."""
    path, digests = file_of(folder, "tiny-minicpm3"), []
    for ctx in (64, 128, 1024):
        with pymla.load(path, device="reference", ctx=ctx) as language_model:
            model = language_model.model
            long = ctx > model.config.original_context_length
            digests.append((long, model_digest(language_model.file, model)))
    assert [long for long, _ in digests] == [False, False, True]
    assert digests[0] == digests[1]
    assert digests[1][1] != digests[2][1]
