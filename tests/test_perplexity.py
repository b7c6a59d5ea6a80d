"""Perplexity against its definition, from logits of whole windows in float64."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import pymla
from pymla.cpu import log_probabilities
from pymla.errors import PymlaError
from pymla.files import kl_base
from pymla.make import perplexity
from pymla.make.perplexity import Windows, cut

MODEL = Path(__file__).parent / "golden" / "v3.gguf"
CTX = 40
#: Of losses: float32 throughout, in steps of other sizes.
CLOSE = {"rtol": 0, "atol": 2e-5}
WITH_BOS, WITHOUT = SimpleNamespace(bos_id=7, add_bos=True), SimpleNamespace(bos_id=7, add_bos=False)


@pytest.fixture(scope="module")
def loaded():
    """A tiny model of V3's kind in float32, whose cache holds several windows."""
    with pymla.load(MODEL, device="cpu", cache_type="f32", ctx=64, cache_tokens=perplexity.cache_tokens(CTX)) as found:
        yield found


@pytest.fixture(scope="module")
def windows(loaded):
    rng = np.random.default_rng(0)
    return cut(rng.integers(0, 256, 5 * CTX + 3).tolist(), CTX, loaded.tokenizer)


@pytest.fixture(scope="module")
def expected(loaded, windows):
    """Losses of the tokens that count, window by window."""
    found = []
    for tokens in windows.tokens:
        logits = loaded.logits([loaded.tokenizer.bos_id, *tokens[1:].tolist()]).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found.append([-log_p[i, tokens[i + 1]] for i in range(windows.first, CTX - 1)])
    return np.array(found)


def is_free(model):
    return model.cache.free_pages == model.cache.pages


# Windows


def test_windows_without_overlap():
    found = cut(range(100, 135), 10, WITH_BOS)
    assert found.tokens.dtype == np.int32
    np.testing.assert_array_equal(found.tokens, np.arange(100, 130).reshape(3, 10))
    assert (found.ctx, found.first, found.counted, found.bos) == (10, 5, 4, 7)
    assert found.inputs(1).tolist() == [7, *range(111, 119)]
    assert found.targets(1).tolist() == [116, 117, 118, 119]
    assert found.tokens[1, 0] == 110  # as in the text
    assert cut(range(135), 10, WITHOUT).inputs(1).tolist() == list(range(10, 19))
    assert len(cut(range(135), 10, WITHOUT, chunks=2).tokens) == 2
    assert len(cut(range(135), 10, WITHOUT, chunks=99).tokens) == 13


@pytest.mark.parametrize(("ctx", "first", "counted"), [(3, 1, 1), (4, 2, 1), (5, 2, 2), (512, 256, 255)])
def test_the_second_half_counts(ctx, first, counted):
    found = cut(range(600), ctx, WITHOUT)
    assert (found.first, found.counted) == (first, counted)
    assert found.counted == kl_base.records_of_window(ctx)


@pytest.mark.parametrize("stride", [1, 4, 9])
def test_windows_with_a_stride_count_every_token_once(stride):
    ids = list(range(53))
    found = cut(ids, 10, WITHOUT, stride=stride)
    targets = np.concatenate([found.targets(i) for i in range(len(found.tokens))])
    assert found.counted == stride
    np.testing.assert_array_equal(targets, np.arange(10 - stride, 10 - stride + len(targets)))
    assert 53 - len(targets) - (10 - stride) < stride


def test_arguments_that_cut_no_window():
    with pytest.raises(PymlaError, match="the text has 9 tokens, and a window has 10"):
        cut(range(9), 10, WITHOUT)
    for arguments in ({"ctx": 2}, {"ctx": 10, "stride": 10}, {"ctx": 10, "stride": 0}, {"ctx": 10, "chunks": 0}):
        with pytest.raises(PymlaError, match=f"`{list(arguments)[-1]}` is"):
            cut(range(20), tokenizer=WITHOUT, **arguments)
    assert cut(range(2), 2, WITHOUT, stride=1).counted == 1


# Losses


@pytest.mark.parametrize(
    ("step_tokens", "logits_rows"),
    [(2048, 10**6), (2 * CTX, 10**6), (1, 10**6), (2048, 40), (2048, 7)],
    ids=["all at once", "two at once", "one by one", "two at once by rows", "in parts"],
)
def test_losses_are_those_of_the_definition(loaded, windows, expected, monkeypatch, step_tokens, logits_rows):
    vocab_size = loaded.config.vocab_size
    monkeypatch.setattr(perplexity, "STEP_TOKENS", step_tokens)
    monkeypatch.setattr(perplexity, "LOGITS_BYTES", 4 * vocab_size * logits_rows)
    rows, take_step = [], perplexity.step_logits
    monkeypatch.setattr(
        perplexity, "step_logits", lambda *arguments: (rows.append(len(arguments[2])), take_step(*arguments))[1]
    )
    told = []
    found = list(perplexity.window_losses(loaded.model, windows, None, lambda *each: told.append(each)))
    np.testing.assert_allclose(np.array(found), expected, **CLOSE)
    assert max(rows) <= max(logits_rows, 1)
    assert sum(rows) == expected.size  # the output matrix is not multiplied for other tokens
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (windows.tokens.size,) * 2
    assert is_free(loaded.model)


def test_losses_with_a_stride(loaded):
    ids = np.random.default_rng(1).integers(0, 256, 70).tolist()
    windows = cut(ids, CTX, loaded.tokenizer, stride=11)
    found = list(perplexity.window_losses(loaded.model, windows))
    assert len(found) == 3
    logits = loaded.logits([loaded.tokenizer.bos_id, *ids[12 : 11 + CTX]]).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [-log_p[i, ids[11 + i + 1]] for i in range(CTX - 12, CTX - 1)]
    np.testing.assert_allclose(found[1], expected, **CLOSE)


@pytest.mark.parametrize("rows", [10**6, 7])
def test_an_interrupt_gives_the_cache_back(loaded, windows, monkeypatch, rows):
    monkeypatch.setattr(perplexity, "LOGITS_BYTES", 4 * loaded.config.vocab_size * rows)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(perplexity.window_losses(loaded.model, windows, None, interrupt))
    assert is_free(loaded.model)
    if rows == 7:  # between two parts of a window
        pieces = perplexity.counted_logits(loaded.model, windows)
        next(pieces)
        assert not is_free(loaded.model)
        pieces.close()
        assert is_free(loaded.model)


def test_a_window_that_does_not_fit(loaded):
    windows = Windows(np.zeros((1, 70), np.int32), 35, None)
    with pytest.raises(PymlaError, match="69 tokens do not fit the context of 64"):
        list(perplexity.window_losses(loaded.model, windows))


def test_logits_that_are_not_finite(loaded, windows, monkeypatch):
    def nothing(model, batch, wanted, progress):
        return np.full((len(wanted), 5), np.nan, np.float32)

    monkeypatch.setattr(perplexity, "step_logits", nothing)
    with pytest.raises(PymlaError, match="a logit of window 0 is not finite"):
        list(perplexity.window_losses(loaded.model, windows))


def test_a_base_is_written(loaded, windows, expected, monkeypatch, tmp_path):
    """The same whether windows are read together or in parts."""
    contents = []
    for rows in (10**6, 7):
        monkeypatch.setattr(perplexity, "LOGITS_BYTES", 4 * loaded.config.vocab_size * rows)
        with kl_base.writing(tmp_path / "base", windows.tokens, loaded.config.vocab_size) as base:
            list(perplexity.window_losses(loaded.model, windows, base))
        with kl_base.BaseFile(tmp_path / "base") as base:
            np.testing.assert_array_equal(base.tokens, windows.tokens)
            contents.append(np.concatenate([base.records(i, 0, windows.counted) for i in range(len(windows.tokens))]))
    for records in contents:
        targets = np.concatenate([windows.targets(i) for i in range(len(windows.tokens))])
        heads = np.ascontiguousarray(records[:, :4]).view(np.float32)
        found = -(heads[:, 0] * records[np.arange(len(records)), 4 + targets] + heads[:, 1])
        np.testing.assert_allclose(found, expected.ravel(), rtol=0, atol=1.3e-4)  # half of the largest scale
    assert perplexity.cache_tokens(512) == 2048
    assert perplexity.cache_tokens(4096) == 4096
    assert perplexity.cache_tokens(100) == 20 * 128


def test_kernels_are_ready_before_they_are_needed(monkeypatch):
    wanted = []
    monkeypatch.setattr(log_probabilities, "compile_all", lambda kernels, *rest: wanted.extend(kernels))
    perplexity.compile_kernels(lambda *each: None, lambda message: None)
    assert [each.__name__ for each in wanted] == ["_log_sum_exp", "_encode", "_divergence"]


# Steps


def test_logits_of_chosen_tokens(loaded):
    """Of a step of several sequences, and of a recorded one."""
    model, rng = loaded.model, np.random.default_rng(2)
    for lengths in ((5, 1, 9), (1, 1, 1)):
        new = [rng.integers(0, 256, length, dtype=np.int32) for length in lengths]
        results = []
        for wanted in ("all", np.array([0, 2])):
            batch = [(model.new_sequence(), each) for each in new]
            results.append(model.forward(batch, wanted).copy())
            for sequence, _ in batch:
                model.free(sequence)
        assert results[1].shape == (2, loaded.config.vocab_size)
        np.testing.assert_allclose(results[1], results[0][[0, 2]], rtol=0, atol=1e-5)


def test_a_cache_for_several_sequences():
    for wanted, pages in ((None, 2), (1, 2), (640, 10)):
        with pymla.load(MODEL, device="reference", ctx=100, cache_tokens=wanted) as found:
            assert (found.model.ctx, found.model.cache.pages) == (100, pages)
    with pytest.raises(PymlaError, match="`cache_tokens` is 0"):
        pymla.load(MODEL, cache_tokens=0)


# Results


def test_means_and_perplexity():
    losses = [np.array([1.0, 2.0, 4.0]), np.array([0.5, 3.0, 3.5])]
    every = np.concatenate(losses)
    # As llama.cpp computes them.
    mean, square = every.sum() / 6, (every**2).sum() / 6
    error = math.sqrt((square - mean**2) / 5)
    assert perplexity.mean(every) == pytest.approx((mean, error))
    assert perplexity.perplexity(losses) == pytest.approx((math.exp(mean), math.exp(mean) * error))
    alone = perplexity.mean(np.array([2.0]))
    assert (alone.value, math.isnan(alone.error)) == (2, True)
    assert math.isfinite(perplexity.perplexity([np.array([1e6])]).value)
