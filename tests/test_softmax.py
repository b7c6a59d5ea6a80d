"""The online softmax of attention against its definition in float64."""

import numba
import numpy as np
import pytest

from pymla.cpu.attention import softmax
from pymla.cpu.machine.simd import address
from pymla.cpu.runtime.isa import LANES
from pymla.reference.attention.softmax import softmax as reference_softmax

#: A score minus the maximum is rounded to float32: up to 4e-6 where they are 100 apart.
ROUNDED = 5e-6
CLOSE = {"rtol": ROUNDED, "atol": 1e-30}
#: Where the register function `exp2` is 0, up to what it makes of minus infinity.
NOTHING = 1e-37


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


@numba.njit
def shrink(factor, out, columns):
    softmax.shrink(factor, address(out), columns)


@numba.njit
def heads_softmax(scores, state, values):
    softmax.heads_softmax(address(scores), len(scores), address(state), address(values), values.shape[1])


@numba.njit
def query_softmax(scores, seen, state, result):
    softmax.query_softmax(address(scores), len(scores), seen, address(state), address(result), len(result))


@numba.njit
def token_softmax(scores, seen, scales, state, result):
    at, of_tokens = address(scores), address(scales)
    softmax.token_softmax(at, len(scores), seen, of_tokens, address(state), address(result), len(result))


class Online:
    """Running maximum, sum and values in float64."""

    def __init__(self, values):
        self.maximum, self.total, self.values = -np.inf, 0.0, values.astype(np.float64)

    def take(self, scores):
        """The weights of some scores."""
        maximum = max(self.maximum, scores.max(initial=-np.inf))
        if maximum == -np.inf:
            return np.zeros(len(scores))
        shrunk = 2.0 ** (self.maximum - maximum)
        weights = 2.0 ** (scores.astype(np.float64) - maximum)
        self.maximum, self.total, self.values = maximum, self.total * shrunk + weights.sum(), self.values * shrunk
        return weights


@pytest.mark.parametrize("columns", [1, 7, 8, 61])
def test_shrink(rng, columns):
    out = normal(rng, columns + 1)
    expected = np.append(out[:-1] * np.float32(0.3), out[-1])
    shrink(np.float32(0.3), out, columns)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("columns", [1, 13, 64])
def test_heads_softmax(rng, columns):
    """Three pages, of different lengths, with scores that rise and fall, and minus infinity among them."""
    state, values = np.array([[-np.inf], [0]], np.float32).repeat(16, axis=1), normal(rng, 16, columns)
    heads = [Online(row) for row in values]
    for page, (rows, height) in enumerate([(5, 0), (64, 30), (1, -40)]):
        scores = normal(rng, rows, 16) * 8 + height
        if page:
            scores[0, 3] = -np.inf
        expected = np.array([head.take(scores[:, h]) for h, head in enumerate(heads)]).T
        heads_softmax(scores, state, values)
        np.testing.assert_allclose(scores, expected, rtol=ROUNDED, atol=NOTHING)
        np.testing.assert_array_equal(state[0], [head.maximum for head in heads])
        np.testing.assert_allclose(state[1], [head.total for head in heads], **CLOSE)
        np.testing.assert_allclose(values, [head.values for head in heads], **CLOSE)


@pytest.mark.parametrize("columns", [3, 16])
@pytest.mark.parametrize("count", [8, 64])
def test_query_softmax(rng, count, columns):
    """Scores that the query does not see are NaN."""
    state, result = np.array([-np.inf, 0], np.float32), normal(rng, columns)
    query = Online(result)
    for seen in (0, 1, count - 3, -5, count, 2):
        scores = normal(rng, count) * 10 + seen
        if seen > 2:
            scores[1] = -np.inf
        scores[max(seen, 0) :] = np.nan
        expected = np.append(query.take(scores[: max(seen, 0)]), np.zeros(count - max(seen, 0)))
        query_softmax(scores, seen, state, result)
        np.testing.assert_allclose(scores, expected, rtol=ROUNDED, atol=NOTHING)
        assert (scores[max(seen, 0) :] == 0).all()
        np.testing.assert_allclose(state, [query.maximum, query.total], **CLOSE)
        np.testing.assert_allclose(result, query.values, **CLOSE)


@pytest.mark.parametrize("columns", [3, 32])
@pytest.mark.parametrize("count", [LANES, 4 * LANES])
def test_token_softmax(rng, count, columns):
    """Weights are times the tokens' scales, the sum is not. Scores that the query does not see are NaN."""
    state, result, scales = np.array([-np.inf, 0], np.float32), normal(rng, columns), normal(rng, count) ** 2
    query = Online(result)
    for seen in (0, 1, count - 3, -5, count, count + 9, 2):
        first = min(max(seen, 0), count)
        scores = normal(rng, count) * 10 + seen
        if first > 2:
            scores[1] = -np.inf
        scores[first:] = np.nan
        expected = np.append(query.take(scores[:first]) * scales[:first], np.zeros(count - first))
        token_softmax(scores, seen, scales, state, result)
        np.testing.assert_allclose(scores, expected, rtol=ROUNDED, atol=NOTHING)
        assert (scores[first:] == 0).all()
        np.testing.assert_allclose(state, [query.maximum, query.total], **CLOSE)
        np.testing.assert_allclose(result, query.values, **CLOSE)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_reference(rng, dtype):
    """Scores of any height, each by itself; rows of one score; NaN and infinity do not go unseen."""
    scores = rng.standard_normal((3, 7)).astype(dtype) + np.array([[0], [1e4], [-1e4]], dtype)
    weights = reference_softmax(scores)
    assert weights.dtype == dtype
    for row, actual in zip(scores.astype(np.float64), weights, strict=True):
        expected = [1 / sum(np.exp(other - x) for other in row) for x in row]
        np.testing.assert_allclose(actual, expected, rtol=16 * np.finfo(dtype).eps)
    assert reference_softmax(np.array([[-3.0]])) == 1
    np.testing.assert_array_equal(reference_softmax(np.array([0, -np.inf])), [1, 0])
    with np.errstate(invalid="ignore"):
        for row in ([np.nan, 0], [np.inf, 0], [-np.inf, -np.inf]):
            assert np.isnan(reference_softmax(np.array(row))).all()
