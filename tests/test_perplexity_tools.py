"""The tools on top of `pymla.make.perplexity`: comparison with other engines, and types of caches."""

import math
from types import SimpleNamespace

import cache_errors
import numpy as np
import perplexity as script
import pytest
from llama_losses import token_losses

from pymla.errors import PymlaError

TOKENIZER = SimpleNamespace(bos_id=1, add_bos=True)


def test_windows_start_with_bos_and_cover_the_text_once():
    found = script.spread_windows([1, *range(10, 31)], TOKENIZER, 6, None)
    windows = script.with_bos(found)
    assert windows.shape == (4, 6)
    assert (windows[:, 0] == 1).all()
    np.testing.assert_array_equal(windows[:, 1:].reshape(-1), np.arange(10, 30))
    assert (found.counted, found.targets(0).tolist()) == (5, [10, 11, 12, 13, 14])


def test_a_limit_spreads_the_windows():
    windows = script.spread_windows([1, *range(100)], TOKENIZER, 11, 3)
    np.testing.assert_array_equal(windows.tokens[:, 1], [0, 40, 90])


def test_a_text_shorter_than_a_window():
    with pytest.raises(PymlaError, match="3 tokens"):
        script.spread_windows([1, 2, 3], TOKENIZER, 5, None)


def test_losses_of_known_probabilities():
    window = np.array([0, 2, 1, 1])
    probabilities = np.array([[0.2, 0.3, 0.5], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5], [math.nan] * 3])
    losses = token_losses(np.log(probabilities) + 7, window)
    np.testing.assert_allclose(np.exp(-losses), [0.5, 0.6, 0.25])


def test_report():
    row = script.report("x", np.array([[1.0, 2.0], [2.0, 3.0]]), 1.0, 1.9)
    assert row["perplexity"] == pytest.approx(math.exp(2))
    assert row["relative_to_first"] == pytest.approx(math.exp(0.1) - 1)
    assert row["standard_error"] == pytest.approx(math.exp(2) * 0.5)


def test_errors_of_logits():
    others = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]))
    found = cache_errors.errors(others + np.array([[3.0], [-1.0]]), others)
    assert found.divergence == pytest.approx(0, abs=1e-12)  # a constant changes no probability
    assert found.same_top == 1
    assert found.rms == pytest.approx(math.sqrt(5) / others.std())
    found = cache_errors.errors(np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.4, 0.4]])), others)
    assert found.divergence == pytest.approx(0.25 * math.log(2) / 2)
    assert found.same_top == 0.5
