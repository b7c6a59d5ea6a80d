"""Context shift: keys that move to other positions, and what a model computes from them."""

import dataclasses
import functools

import gguf
import numpy as np
import pytest
from cache_checks import numbers_of, shift_and_compare
from compare import assert_close
from make_model import PRESETS, make_model

from pymla import cpu, reference
from pymla.engine.cache import PagedCache, Sequence
from pymla.engine.model import Model
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.models.config import ModelConfig
from pymla.models.weights import Weights

F32, F16, BF16, I16, Q8 = 2e-6, 2e-3, 1.2e-2, 5e-4, 2e-2  # rounding of keys by type, twice


@functools.cache
def config_of(preset, folder):
    path = make_model(folder / f"{preset}.gguf", PRESETS[preset], qtype="f32")
    return ModelConfig.from_gguf(ModelFile.open(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(
    ("preset", "backend", "cache_type", "mla", "tolerance"),
    [
        ("tiny", reference, "f32", "auto", F32),
        ("tiny", reference, "f16", "auto", F16),
        ("tiny", reference, "bf16", "1", BF16),
        ("tiny", reference, "q4_0", "3", F16),
        ("tiny", reference, "f32", "0", F32),
        ("tiny", reference, "q8_0", "0", Q8),
        ("tiny", cpu, "q8_0", "auto", I16),
        ("tiny", cpu, "f16", "auto", F16),
        ("tiny", cpu, "q8_0", "0", Q8),
        ("tiny-minicpm3", reference, "f32", "auto", F32),  # pairs of halves
        ("tiny-minicpm3", cpu, "q8_0", "auto", I16),
        ("tiny-v3.2", reference, "f32", "auto", F32),  # an indexer, pairs of halves
        ("tiny-v3.2", cpu, "q8_0", "auto", Q8),
        ("tiny-glm", reference, "q8_0", "auto", Q8),  # an indexer, pairs of neighbours
        ("tiny-glm", cpu, "f32", "auto", F32),
    ],
)
def test_keys_are_turned(folder, preset, backend, cache_type, mla, tolerance):
    shift_and_compare(config_of(preset, folder), backend, cache_type, mla, tolerance)


# What a model computes ------------------------------------------------------------------------------------------------

PLM = dataclasses.replace(PRESETS["tiny-plm"], num_hidden_layers=3, num_attention_heads=2)
START, STOP, LENGTH, NEW = 64, 128, 150, 3


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotated(x, positions, theta):
    """Pairs of neighbours of x (T, H, R), turned as complex numbers by positions."""
    frequencies = theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    return (x.copy().view(complex) * np.exp(1j * positions[:, None, None] * frequencies)).view(float)


def definition(path, ids):
    """Logits of PLM after each of the last `NEW` tokens, in float64, from a file of float32.

    The first `LENGTH` tokens see each other at their positions. The new ones do not see positions START to STOP - 1;
    for them, the tokens behind are STOP - START positions nearer, and so are they themselves.
    """
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name.removesuffix(".weight"): tensor.data.astype(float) for tensor in reader.tensors}

    def value(key):
        return reader.fields[f"plm.{key}"].contents()

    heads, rank, key_size = (value(f"attention.{key}") for key in ("head_count", "kv_lora_rank", "key_length"))
    rope, theta, eps = value("rope.dimension_count"), value("rope.freq_base"), value("attention.layer_norm_rms_epsilon")
    tokens, nope, at = len(ids), key_size - rope, np.arange(len(ids))
    is_new = at >= LENGTH
    seen = (at[:, None] >= at) & ~(is_new[:, None] & (at >= START) & (at < STOP))
    moved = np.where(at < STOP, at, at - (STOP - START))
    x = tensors["token_embd"][ids]
    for layer in range(value("block_count")):
        w = {name.split(".")[2]: data for name, data in tensors.items() if name.startswith(f"blk.{layer}.")}
        h = norm(x, w["attn_norm"], eps)
        q = (h @ w["attn_q"].T).reshape(tokens, heads, key_size)
        latent = h @ w["attn_kv_a_mqa"].T
        expanded = norm(latent[:, :rank], w["attn_kv_a_norm"], eps) @ w["attn_kv_b"].T
        keys, values = np.split(expanded.reshape(tokens, heads, -1), [nope], axis=-1)
        turned = []
        for positions in (at, moved):
            k_pe = rotated(latent[:, None, rank:], positions, theta)[:, 0]
            turned.append(np.einsum("thd,sd->hts", rotated(q[..., nope:], positions, theta), k_pe))
        scores = np.einsum("thd,shd->hts", q[..., :nope], keys) + np.where(is_new[:, None], turned[1], turned[0])
        weights = np.where(seen, np.exp(scores / np.sqrt(key_size)), 0)
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shd->thd", weights, values).reshape(tokens, -1) @ w["attn_output"].T
        x = x + np.maximum(norm(x, w["ffn_norm"], eps) @ w["ffn_up"].T, 0) ** 2 @ w["ffn_down"].T
    return (norm(x, tensors["output_norm"], eps) @ tensors["token_embd"].T)[LENGTH:]


@pytest.fixture(scope="module")
def plm(folder):
    """A file, and token ids."""
    path = make_model(folder / "plm.gguf", PLM, qtype="f32", seed=3)
    return path, np.random.default_rng(0).integers(0, PLM.vocab_size, LENGTH + NEW, np.int32)


def model_of(path, mla="auto"):
    file = ModelFile.open(path)
    config = ModelConfig.from_gguf(file)
    return Model(config, Weights.from_gguf(file, config), reference, cache_type="f32", mla=mla, ctx=256)


@pytest.mark.parametrize("mla", ["auto", "0"])
def test_logits_after_a_shift_are_those_of_the_definition(plm, mla):
    path, ids = plm
    model = model_of(path, mla)
    sequence = model.new_sequence()
    model.forward([(sequence, ids[:LENGTH])])
    model.shift(sequence, START, STOP)
    assert sequence.tokens == [*ids[:START], *ids[STOP:LENGTH]]
    actual = model.forward([(sequence, ids[LENGTH:])], logits="all")
    assert_close(actual, definition(path, ids), rtol_max=1e-5, reason="float32 throughout")


def test_the_first_layer_is_that_of_the_shorter_text(plm):
    """Its rows depend on their own tokens alone. Those of later layers still know the forgotten tokens."""
    path, ids = plm
    model = model_of(path)
    shifted, fresh = model.new_sequence(), model.new_sequence()
    model.forward([(shifted, ids[:LENGTH])])
    model.shift(shifted, START, STOP)
    model.forward([(fresh, np.array(shifted.tokens, np.int32))])
    rows = [numbers_of(model.cache, reference, model.config, each) for each in (shifted, fresh)]
    for mine, other in zip(rows[0][0], rows[1][0], strict=True):
        assert_close(mine, other, rtol_max=1e-5, reason="float32 throughout")
    for mine, other in zip(rows[0][1], rows[1][1], strict=True):
        assert_close(mine[:START], other[:START], rtol_max=1e-5, reason="float32 throughout")
        assert np.abs(mine - other)[START:].max() > 0.01


# Pages ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(folder):
    """A cache with a sequence of 270 tokens."""
    config = config_of("tiny", folder)
    cache = PagedCache(config, "f32", "auto", 6, 512, [reference] * config.num_hidden_layers)
    for layer in cache.layers:
        for rows in layer:
            rows.data[...] = 0
    sequence = Sequence()
    cache.extend([(sequence, range(270))])
    cache.advance([(sequence, range(270))])
    return cache, sequence, {reference: config.inv_freq()}


@pytest.mark.parametrize(("start", "stop"), [(-64, 64), (0, 0), (64, 64), (1, 65), (64, 100), (64, 320), (128, 64)])
def test_positions_that_cannot_be_forgotten(cache, start, stop):
    cache, sequence, inv_freq = cache
    with pytest.raises(PymlaError, match=f"shift: positions {start} to {stop} of 270 tokens cannot be forgotten"):
        cache.shift(sequence, start, stop, inv_freq)
    assert (sequence.length, sequence.pages) == (270, [0, 1, 2, 3, 4])


def test_pages_of_a_shifted_sequence(cache):
    cache, sequence, inv_freq = cache
    cache.shift(sequence, 64, 192, inv_freq)
    assert (sequence.pages, sequence.length, sequence.shifted_from) == ([0, 3, 4], 142, 64)
    cache.shift(sequence, 64, 128, inv_freq)
    assert (sequence.pages, sequence.length, sequence.shifted_from) == ([0, 4], 78, 64)
    fork = cache.fork(sequence)
    assert (fork.shifted_from, fork.tokens) == (64, sequence.tokens)
    cache.truncate(sequence, 64)
    assert sequence.shifted_from is None  # what is left is the beginning of its text
    cache.shift(sequence, 0, 64, inv_freq)
    assert (sequence.length, sequence.pages, sequence.shifted_from) == (0, [], None)


def test_rows_behind_a_shift_are_not_found_by_their_tokens(cache):
    cache, sequence, inv_freq = cache
    cache.shift(sequence, 64, 128, inv_freq)
    cache.keep(sequence)
    tokens = list(sequence.tokens)
    assert cache.attach(Sequence(), tokens) == 64
    other = Sequence()
    cache.extend([(other, tokens[:128])])
    cache.advance([(other, tokens[:128])])
    cache.keep(other)
    cache.swap_out(sequence)
    cache.extend([(sequence, [1])])
    assert sequence.pages[0] == 0
    assert not set(sequence.pages[1:]) & set(other.pages)


def test_kept_pages_stay_as_they_are(cache):
    cache, sequence, inv_freq = cache
    cache.keep(sequence)
    cache.shift(sequence, 0, 64, inv_freq)  # one page is free, and the pages of 64 to 255 are kept
    assert cache.attach(Sequence(), range(270)) >= 64
    assert sequence.shifted_from == 0


def test_a_sequence_that_is_out_of_the_cache(cache):
    cache, sequence, inv_freq = cache
    cache.swap_out(sequence)
    cache.shift(sequence, 64, 128, inv_freq)
    assert (sequence.saved, sequence.length, len(sequence.pages)) == (None, 206, 4)


def test_an_interrupted_shift_leaves_an_empty_sequence(cache, monkeypatch):
    cache, sequence, inv_freq = cache

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pymla.engine.cache.move_keys", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.shift(sequence, 64, 128, inv_freq)
    assert (sequence.length, sequence.pages, cache.free_pages) == (0, [], 6)
