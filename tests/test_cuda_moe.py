"""What the GPU's experts have for themselves (`test_experts.py` has what all backends share), and its sampling against
the host's, in the simulator."""

from types import SimpleNamespace

import numpy as np
import pytest
import simulated  # noqa: F401
from test_experts import three

from pymla import ggml
from pymla.cuda import memory, moe, quant, sampling
from pymla.cuda.runtime import simulator
from pymla.cuda.sampling import draw, likeliest, philox, rows
from pymla.errors import PymlaError
from pymla.tensor import QTensor
from pymla.text.sampling import Sampler, SamplingParams


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def on_device(w):
    return QTensor(w.qtype, memory.to_device(w.data))


def test_launches_of_a_token(monkeypatch):
    """Shared experts cost none."""
    launched, q4_0 = [], (ggml.Q4_0,) * 3
    monkeypatch.setattr(simulator, "launch", lambda function, *arguments: launched.append(function.__name__))
    routed, shared = (list(map(on_device, three(q4_0, count, 64, 32, seed=1))) for count in (5, None))
    for own in (None, shared):
        x, ids = quant.Activation(memory.zeros((1, 64), np.float32)), memory.zeros((1, 2), np.int32)
        weights, out = memory.zeros((1, 2), np.float32), memory.zeros((1, 64), np.float32)
        moe.experts(x, ids, weights, *routed, out, own, add=True)
        assert launched == ["quantise_activations", "gate_up", "quantise_activations", "down"]
        launched.clear()


# Sampling. A block has 32 threads here, so that many draws take little time.

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))
EVERYTHING = {"top_k": 0, "top_p": 1, "min_p": 0, "temperature": 1}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    for module in (sampling, rows, likeliest, draw):
        monkeypatch.setattr(module, "THREADS", 32)


def drawn(logits, params, state):
    """A token for each row, and its log probability."""
    out = memory.empty((len(logits), 2), np.int32)
    result = memory.to_host(sampling.sample(memory.to_device(logits), params, state, out))
    return result[:, 0], result[:, 1].copy().view(np.float32)


def test_greedy():
    logits = normal(3, 300)
    logits[0, [7, 131, 299]] = 9
    logits[1] = -1
    logits[2, 299] = 11
    out = memory.empty((3, 2), np.int32)
    result = memory.to_host(sampling.greedy(memory.to_device(logits), out))
    assert result[:, 0].tolist() == [7, 0, 299]
    expected = [Sampler(SamplingParams(temperature=0)).sample(row).logprob for row in logits]
    np.testing.assert_allclose(result[:, 1].copy().view(np.float32), expected, rtol=1e-5, atol=1e-5)


def test_damaged_logits_are_told():
    logits = np.zeros((4, 130), np.float32)
    logits[0, 129] = np.nan
    logits[1, 3] = np.inf
    logits[2] = -np.inf
    logits[3, :129] = -np.inf
    state = sampling.new_state([1, 2, 3, 4])
    for params in (SamplingParams(temperature=0), SamplingParams()):
        assert drawn(logits, params, state)[0].tolist() == [-1, -1, -1, 129]


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 5, "top_p": 0.7},
        {"top_k": 1000, "top_p": 0.9, "temperature": 2},
        {"min_p": 0.2},
        {"top_k": 20, "min_p": 0.1, "temperature": 3},
        {"top_p": 0},
        {"temperature": 1e-30},
    ],
    ids=str,
)
def test_draws_are_the_hosts_where_the_random_numbers_are(filters, monkeypatch):
    params, logits = SamplingParams(**EVERYTHING | filters), 2 * normal(40)
    host, state = Sampler(params), sampling.new_state([0])
    monkeypatch.setattr(draw, "philox", lambda seed, draw: (2 * draw + 1 << 32) // 8)
    for number in (0.125, 0.375, 0.625, 0.875):
        host._generator = SimpleNamespace(random=lambda number=number: number)
        expected = host.sample(logits)
        token, logprob = drawn(logits[None], params, state)
        assert token == expected.token
        np.testing.assert_allclose(logprob, expected.logprob, atol=1e-5)


@pytest.mark.parametrize("room", [2048, 2])
def test_equal_logits_and_candidates(room, monkeypatch):
    """Of equal logits the lower tokens are kept, whether candidates have room or not."""
    monkeypatch.setattr(draw, "CANDIDATES", room)
    logits = np.full((1, 700), -4, np.float32)
    logits[0, [5, 200, 400, 600]] = 1
    logits[0, 650] = 2
    state = sampling.new_state([3])
    kept = {int(drawn(logits, SamplingParams(**EVERYTHING | {"top_k": 4}), state)[0][0]) for _ in range(3)}
    assert kept <= {650, 5, 200, 400}


def test_same_seed_same_tokens():
    logits = normal(2, 50)
    first, second = sampling.new_state([5, 5]), sampling.new_state([5, 6])
    a, b = ([drawn(logits, SamplingParams(), state)[0].tolist() for _ in range(3)] for state in (first, second))
    assert [row[0] for row in a] == [row[0] for row in b]
    assert memory.to_host(first).tolist() == [[5, 3], [5, 3]]
    assert len({tuple(row) for row in a}) > 1


def test_log_probability_is_the_models_own():
    token, logprob = drawn(LOGITS[None], SamplingParams(temperature=2), sampling.new_state([None]))
    np.testing.assert_allclose(logprob, LOGITS[token], atol=1e-5)


def test_philox():
    """A known answer of Random123 (tests/kat_vectors)."""
    assert philox.philox(0, 0) == 0x6627E8D5


def test_penalties_stay_with_the_host():
    with pytest.raises(PymlaError, match="not sampled on the device"):
        sampling.sample(memory.zeros((1, 5), np.float32), SamplingParams(presence_penalty=1), None, None)
    assert sampling.on_device(SamplingParams())
    assert not sampling.on_device(SamplingParams(logprobs=3))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"temperature": 0, "top_n_sigma": 1}, True),  # the likeliest token comes through that
        ({"temperature": 0, "xtc_probability": 1}, False),
        ({"samplers": "top_p;min_p"}, True),
        ({"samplers": "temperature;top_p"}, False),
        ({"samplers": ""}, True),
        ({"top_k": 1, "mirostat": 2}, False),
        ({"dynatemp_range": 0.5}, False),
        ({"typical_p": 0.5}, False),
        ({"min_keep": 1}, False),
        ({"presence_penalty": 1}, False),
        ({"samplers": "top_k", "presence_penalty": 1}, True),  # penalties are left out
        ({"logit_bias": {1: 1.0}}, False),
    ],
    ids=str,
)
def test_what_the_device_samples(options, expected):
    assert sampling.on_device(SamplingParams(**options)) == expected


def test_left_out_filters_are_off():
    logits, state = np.zeros((1, 64), np.float32), sampling.new_state([1])
    params = SamplingParams(samplers="temperature", top_k=2, top_p=0.1)
    assert len({int(drawn(logits, params, state)[0][0]) for _ in range(8)}) > 2


SEVERAL = [{}, {"temperature": 0}, {}, {"presence_penalty": 1, "temperature": 3}, {"temperature": 3}, {}]


def several():
    return [sampling.Sampler(SamplingParams(seed=i // 2, **options)) for i, options in enumerate(SEVERAL)]


def test_a_batch_is_its_rows(monkeypatch):
    """A text's tokens depend neither on its row nor on the others. Rows with equal filters are one launch."""
    logits = normal(6, 150)
    logits[5] = logits[0]
    rows, launches = memory.to_device(logits), []
    launch = sampling._launch
    monkeypatch.setattr(sampling, "_launch", lambda group, *rest: launches.append(len(group)) or launch(group, *rest))
    masks = [None, None, np.full(5, 1 << 7, np.uint32), None, None, None]
    alone, together = several(), several()
    together[5] = together[0].copy()
    alone[5] = alone[0].copy()
    for _ in range(3):
        found = sampling.sample_batch(together, rows, masks)
        assert launches == [2, 1]
        expected = [sampler.sample(rows[i], masks[i]) for i, sampler in enumerate(alone)]
        launches.clear()
        assert found == expected
        assert found[5] == found[0]
        assert found[2].token % 32 == 7


def test_rows_that_fail_leave_the_others_alone():
    logits = np.zeros((3, 130), np.float32)
    logits[1, 9] = np.nan
    samplers = several()[:3]
    found = sampling.sample_batch(samplers, memory.to_device(logits), [None, None, np.zeros(5, np.uint32)])
    assert [type(each) for each in found[1:]] == [PymlaError, PymlaError]
    assert "token 9 is nan" in str(found[1])
    assert found[0] == several()[0].sample(memory.to_device(logits[:1])[0])


def test_what_the_host_and_the_device_choose_is_one_history():
    logits = memory.to_device(normal(1, 40))[0]
    sampler = sampling.Sampler(SamplingParams(temperature=0), [1])
    token = sampler.sample(logits).token
    sampler.accept(3)
    assert sampler.choose(5, logits).token == 5
    assert sampler.on_host._state.history.last(0).tolist() == [1, token, 3, 5]
    assert sampler.distribution(logits).ids.tolist() == [token]
    assert 0 <= sampler.random() < 1
