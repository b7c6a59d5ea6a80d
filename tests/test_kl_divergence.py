"""Divergence from a base: comparisons and statistics against their definitions."""

import math
from pathlib import Path

import numpy as np
import pytest

import pymla
from pymla.errors import PymlaError
from pymla.files import kl_base
from pymla.make import kl_divergence, perplexity
from pymla.make.kl_divergence import Comparison
from pymla.reference import log_probabilities

MODEL = Path(__file__).parent / "golden" / "v3.gguf"
CTX = 40
VOCAB = 288


@pytest.fixture(scope="module")
def loaded():
    with pymla.load(MODEL, device="cpu", cache_type="f32", ctx=CTX, cache_tokens=256) as found:
        yield found


@pytest.fixture(scope="module")
def windows(loaded):
    return perplexity.cut(np.random.default_rng(0).integers(0, 256, 4 * CTX).tolist(), CTX, loaded.tokenizer)


@pytest.fixture(scope="module")
def logits(loaded, windows):
    """The model's own logits that count, float64 (windows, counted, V)."""
    rows = [loaded.logits([loaded.tokenizer.bos_id, *tokens[1:].tolist()]) for tokens in windows.tokens]
    return np.array(rows, np.float64)[:, windows.first : CTX - 1]


@pytest.fixture
def base_path(tmp_path, windows, logits):
    """A base whose logits are the model's and some noise."""
    noisy = logits + 0.3 * np.random.default_rng(3).standard_normal(logits.shape)
    noisy = noisy.reshape(-1, VOCAB).astype(np.float32)
    sums = log_probabilities.log_sum_exp(noisy, np.empty(len(noisy)))
    records = np.empty((len(noisy), kl_base.record_words(VOCAB)), np.uint16)
    with kl_base.writing(tmp_path / "base", windows.tokens, VOCAB) as base:
        base.write(log_probabilities.encode(noisy, sums, records))
    return tmp_path / "base"


@pytest.mark.parametrize("rows", [10**6, 7])
def test_comparisons_are_those_of_the_definition(loaded, logits, base_path, monkeypatch, rows):
    monkeypatch.setattr(perplexity, "LOGITS_BYTES", 4 * VOCAB * rows)
    with kl_base.BaseFile(base_path) as base:
        windows = kl_divergence.windows_of(base, perplexity.bos_of(loaded.tokenizer))
        found = list(kl_divergence.compare_windows(loaded.model, windows, base))
        first = list(kl_divergence.compare_windows(loaded.model, windows._replace(tokens=windows.tokens[:2]), base))
        records = np.array([base.records(i, 0, windows.counted) for i in range(4)])
    assert len(found) == 4
    assert len(first) == 2
    for i, each in enumerate(found):
        log_q = logits[i] - np.log(np.exp(logits[i]).sum(-1, keepdims=True))
        log_p = log_probabilities.decode(records[i], VOCAB)
        index = np.arange(windows.counted), windows.targets(i)
        np.testing.assert_allclose(each.losses, -log_q[index], atol=2e-5)
        np.testing.assert_allclose(each.base_losses, -log_p[index], atol=1e-6)
        divergences = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        np.testing.assert_allclose(each.divergences, divergences, rtol=1e-4, atol=2e-5)
        assert each.same_top.tolist() == (log_q.argmax(-1) == log_p.argmax(-1)).astype(int).tolist()


def test_a_model_is_its_own_base(loaded, windows, tmp_path):
    with kl_base.writing(tmp_path / "own", windows.tokens, VOCAB) as base:
        list(perplexity.window_losses(loaded.model, windows, base))
    with kl_base.BaseFile(tmp_path / "own") as base:
        read = kl_divergence.windows_of(base, perplexity.bos_of(loaded.tokenizer), 3)
        assert read.first == windows.first
        found = kl_divergence.statistics(list(kl_divergence.compare_windows(loaded.model, read, base)))
    assert found.tokens == 3 * windows.counted
    assert abs(found.divergence.mean.value) < 1e-5
    assert found.same_top.value == 1
    assert found.ratio.value == pytest.approx(1, abs=1e-4)
    assert found.correlation == pytest.approx(1, abs=1e-6)


def test_statistics_are_those_of_llama_cpp():
    """By its formulas: sums, sums of squares and products, and sorted values."""
    rng = np.random.default_rng(0)
    base = rng.gamma(2.0, 1.5, (2, 150))
    losses = np.abs(base + 0.2 * rng.standard_normal(base.shape))
    divergences, same = rng.gamma(0.5, 0.01, base.shape), (rng.random(base.shape) < 0.9).astype(np.int32)
    found = kl_divergence.statistics([Comparison(*each) for each in zip(losses, base, divergences, same, strict=True)])
    q, b, d, s = (each.ravel() for each in (losses, base, divergences, same))
    n = len(q)

    def mean(x):
        return x.sum() / n, math.sqrt(((x**2).sum() / n - (x.sum() / n) ** 2) / (n - 1))

    (own, own_error), (other, other_error) = mean(q), mean(b)
    covariance = ((q * b).sum() / n - own * other) / (n - 1)
    assert found.tokens == n
    assert found.perplexity == pytest.approx((math.exp(own), math.exp(own) * own_error))
    assert found.base_perplexity == pytest.approx((math.exp(other), math.exp(other) * other_error))
    assert found.correlation == pytest.approx(covariance / (own_error * other_error))
    error = math.sqrt(own_error**2 + other_error**2 - 2 * covariance)
    assert found.log_ratio == pytest.approx((own - other, error))
    assert found.ratio == pytest.approx((math.exp(own - other), math.exp(own - other) * error))
    errors = math.exp(own) * own_error, math.exp(other) * other_error
    error = math.sqrt(errors[0] ** 2 + errors[1] ** 2 - 2 * covariance * math.exp(own + other))
    assert found.difference == pytest.approx((math.exp(own) - math.exp(other), error))
    assert found.divergence.mean == pytest.approx(mean(d))
    change = np.exp(-q) - np.exp(-b)
    assert found.probability.mean == pytest.approx(mean(change))
    square, error = mean(change**2)
    assert found.probability_rms == pytest.approx((math.sqrt(square), 0.5 / math.sqrt(square) * error))
    share = s.sum() / n
    assert found.same_top == pytest.approx((share, math.sqrt(share * (1 - share) / (n - 1))))
    for values, spread in ((np.sort(d), found.divergence), (np.sort(change), found.probability)):
        assert (spread.smallest, spread.largest) == (values[0], values[-1])
        for each, value in spread.percentiles.items():
            at = each / 100 * (n - 1)
            below = int(at)
            expected = (1 - at + below) * values[below] + (at - below) * values[min(below + 1, n - 1)]
            assert value == pytest.approx(expected)
        assert spread.percentiles[50] == pytest.approx(np.median(values))


def test_statistics_of_a_single_token():
    one = np.array([1.0])
    found = kl_divergence.statistics([Comparison(one, one, 0 * one, np.array([1], np.int32))])
    assert found.probability_rms.value == 0
    assert math.isnan(found.correlation)
    assert math.isnan(found.divergence.mean.error)


def test_a_base_of_something_else(base_path, windows):
    ids = windows.tokens.ravel().tolist()
    with kl_base.BaseFile(base_path) as base:
        kl_divergence.check_same(base, VOCAB)
        kl_divergence.check_same(base, VOCAB, CTX, [*ids, 5])
        for arguments, words in (
            ((VOCAB + 1,), "has a vocabulary of 288 tokens, and the model has 289"),
            ((VOCAB, 41), "has windows of 40 tokens, and `ctx` is 41"),
            ((VOCAB, None, ids[:-1]), "160 tokens at least, and the text has 159"),
            ((VOCAB, None, [*ids[:9], ids[9] + 1, *ids[10:]]), "its token 9 is"),
        ):
            with pytest.raises(PymlaError, match=words):
                kl_divergence.check_same(base, *arguments)
