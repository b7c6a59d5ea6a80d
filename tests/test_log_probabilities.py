"""Log-probabilities of logits: kernels against their definition in float64."""

import numpy as np
import pytest

from pymla.cpu import log_probabilities
from pymla.cpu.runtime.isa import LANES
from pymla.errors import PymlaError
from pymla.files.kl_base import record_words
from pymla.reference import log_probabilities as definition

#: Vocabularies around the ends of registers and of blocks.
SIZES = (1, 2, LANES - 1, LANES + 1, 257, log_probabilities.BLOCK, log_probabilities.BLOCK + 1, 5003)
ROWS = 5


def random_logits(columns, seed=0, spread=4.0):
    return (spread * np.random.default_rng(seed).standard_normal((ROWS, columns))).astype(np.float32)


def log_softmax(logits):
    """Float64 (T, V), by itself."""
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def log_sums_of(logits):
    return definition.log_sum_exp(logits, np.empty(len(logits)))


def unset_records(columns):
    return np.full((ROWS, record_words(columns)), 0xAAAA, np.uint16)


@pytest.fixture(params=[definition, log_probabilities], ids=["reference", "cpu"])
def module(request):
    return request.param


@pytest.mark.parametrize("columns", SIZES)
def test_sums(module, columns):
    logits = random_logits(columns)
    found = module.log_sum_exp(logits, np.full(ROWS, np.nan))
    expected = logits.astype(np.float64)[:, 0] - log_softmax(logits)[:, 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # exponentials to two units of the last place


def test_sums_of_many_terms_are_as_exact_as_their_terms():
    logits = random_logits(160_000, spread=1.0)[:2]
    found = log_probabilities.log_sum_exp(logits, np.empty(2))
    np.testing.assert_allclose(found, log_sums_of(logits), rtol=0, atol=5e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 256, 299])
def test_a_logit_that_is_not_finite(module, value, at):
    logits = random_logits(300)
    logits[1, at] = value
    found = module.log_sum_exp(logits, np.zeros(ROWS))
    assert np.isnan(found).tolist() == [False, True, False, False, False]


def test_logits_of_tokens_that_never_follow(module):
    """Minus infinity is a probability of 0, and the size of logits does not matter."""
    logits = random_logits(300)
    logits[:, 7] = -np.inf
    expected = log_sums_of(np.delete(logits, 7, axis=1))
    np.testing.assert_allclose(module.log_sum_exp(logits, np.empty(ROWS)), expected, atol=1e-6)
    far = module.log_sum_exp(logits + np.float32(1024), np.empty(ROWS))
    np.testing.assert_allclose(far - 1024, expected, atol=1e-3)  # the logits themselves lose bits


@pytest.mark.parametrize("columns", SIZES)
def test_records(module, columns):
    """The four words of the head, codes that stand for the log-probabilities, and zeros behind them."""
    logits = random_logits(columns)
    records = module.encode(logits, log_sums_of(logits), unset_records(columns))
    heads = np.ascontiguousarray(records[:, :4]).view(np.float32).astype(np.float64)
    scale, low = heads[:, :1], heads[:, 1:]
    exact = log_softmax(logits)
    least = np.maximum(exact.min(-1), exact.max(-1) - 16)
    np.testing.assert_allclose(low[:, 0], least, rtol=0, atol=4e-6)
    np.testing.assert_allclose(scale[:, 0], (exact.max(-1) - least) / 65535, rtol=1e-5, atol=1e-12)
    found = scale * records[:, 4 : 4 + columns] + low
    wanted = np.maximum(exact, least[:, None])
    assert np.abs(found - wanted).max() <= scale.max() * 0.51 + 4e-6
    np.testing.assert_array_equal(found, definition.decode(records, columns))
    assert not records[:, 4 + columns :].any()


def test_records_of_both_are_the_same_but_for_rounding():
    logits = random_logits(999)
    pair = [each.encode(logits, log_sums_of(logits), unset_records(999)) for each in (definition, log_probabilities)]
    codes = [each[:, 4:].astype(np.int64) for each in pair]
    assert np.abs(codes[0] - codes[1]).max() <= 1
    assert (codes[0] == codes[1]).mean() > 0.95


@pytest.mark.parametrize("spread", [0.0, 1e-36])
def test_records_of_logits_that_are_all_the_same(module, spread):
    logits = random_logits(40, spread=spread)
    records = module.encode(logits, log_sums_of(logits), unset_records(40))
    np.testing.assert_allclose(definition.decode(records, 40), -np.log(40), rtol=1e-6)


@pytest.mark.parametrize("columns", SIZES)
def test_divergences(module, columns):
    logits, base = random_logits(columns), random_logits(columns, seed=1)
    records = definition.encode(base, log_sums_of(base), unset_records(columns))
    same = np.full(ROWS, 9, np.int32)
    found = module.divergence(logits, log_sums_of(logits), records, np.full(ROWS, np.nan), same)
    p = definition.decode(records, columns)
    expected = np.where(p > -16, np.exp(p) * (p - log_softmax(logits)), 0).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=5e-6)  # float32 throughout
    assert same.tolist() == (logits.argmax(-1) == base.argmax(-1)).astype(int).tolist()


def test_divergence_from_itself_is_none(module):
    logits = random_logits(5003)
    records = definition.encode(logits, log_sums_of(logits), unset_records(5003))
    same = np.zeros(ROWS, np.int32)
    found = module.divergence(logits, log_sums_of(logits), records, np.empty(ROWS), same)
    assert np.abs(found).max() < 2e-5  # codes are 2.4e-4 apart
    assert same.all()


@pytest.mark.parametrize("at", [(3, 3), (3, 200), (200, 3), (1030, 1029), (0, 2047)])
def test_of_equal_tokens_the_first_is_the_likeliest(module, at):
    """Each side has its largest number twice, within a block and in two of them."""
    first, second = at
    logits, base = np.zeros((1, 2048), np.float32), np.zeros((1, 2048), np.float32)
    logits[0, [first, 2047]] = 5
    base[0, [second, 2047]] = 5
    records = definition.encode(base, log_sums_of(base), np.empty((1, record_words(2048)), np.uint16))
    same = np.empty(1, np.int32)
    module.divergence(logits, log_sums_of(logits), records, np.empty(1), same)
    assert same[0] == (first == second)


def test_kernels_as_python():
    logits, base = random_logits(70), random_logits(70, seed=1)
    sums, records = np.empty(ROWS), unset_records(70)
    log_probabilities._log_sum_exp.py_func(0, ROWS, logits, sums)
    np.testing.assert_allclose(sums, log_sums_of(logits), atol=1e-6)
    records[:, 4 + 70 :] = 0
    log_probabilities._encode.py_func(0, ROWS, base, log_sums_of(base), records)
    np.testing.assert_array_equal(records, log_probabilities.encode(base, log_sums_of(base), unset_records(70)))
    out, same = np.empty((2, ROWS)), np.empty((2, ROWS), np.int32)
    log_probabilities._divergence.py_func(0, ROWS, logits, sums, records, out[0], same[0])
    log_probabilities.divergence(logits, sums, records, out[1], same[1])
    np.testing.assert_allclose(out[0], out[1], rtol=1e-6)
    np.testing.assert_array_equal(same[0], same[1])


def test_arrays_that_do_not_fit():
    logits, sums, records = random_logits(10), np.empty(ROWS), unset_records(10)
    for out, logits_, words in (
        (np.empty(ROWS - 1), logits, "log_sum_exp: out is float64"),
        (np.empty(ROWS, np.float32), logits, "log_sum_exp: out is float32"),
        (sums, logits.astype(np.float64), "log_sum_exp: logits is float64"),
        (sums, logits[:, ::2], "log_sum_exp: logits is an array with strides"),
        (sums, np.empty((ROWS, 0), np.float32), "one column at least"),
    ):
        with pytest.raises(PymlaError, match=words):
            log_probabilities.log_sum_exp(logits_, out)
    with pytest.raises(PymlaError, match="encode: records is uint16"):
        log_probabilities.encode(logits, sums, records[:, 1:])
    with pytest.raises(PymlaError, match="divergence: same_top is int64"):
        log_probabilities.divergence(logits, sums, records, sums, np.empty(ROWS, np.int64))
