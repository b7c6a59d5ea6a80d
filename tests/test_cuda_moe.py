"""The GPU's router, experts and sampling against their twins, in the simulator."""

from types import SimpleNamespace

import numpy as np
import pytest
import simulated  # noqa: F401
from cases import TIES, random_qtensor, routing
from compare import assert_close

from pymla import ggml, reference
from pymla.cuda import memory, moe, quant, sampling
from pymla.cuda.machine import simulator
from pymla.cuda.sampling import draw, likeliest, philox, rows
from pymla.errors import PymlaError
from pymla.tensor import QTensor
from pymla.text.sampling import Sampler, SamplingParams

EXACT = {"rtol_max": 3e-6, "reason": "order of summation, and exponentials of 2 ulp"}
INT8 = {"rtol_max": 0.02, "reason": "hidden activations are int8"}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def on_device(w):
    return QTensor(w.qtype, memory.to_device(w.data))


def as_multiplied(x, qtype):
    """The activations that a product with `qtype` really sees."""
    if qtype not in ggml.QUANTISED:
        return x
    codes, scale = reference.quant.quantise_activations(x)
    return (codes.reshape(len(x), -1, 32) * scale[..., None]).reshape(x.shape)


def routed(logits, bias, used, backend, **config):
    """Ids and weights of a router."""
    config = routing(**config)
    if backend is reference.moe:
        ids, weights = np.empty((len(logits), used), np.int32), np.full((len(logits), used), np.nan, np.float32)
        backend.router(logits, bias, config, ids, weights)
        return ids, weights
    ids, weights = memory.empty((len(logits), used), np.int32), memory.empty((len(logits), used), np.float32)
    bias = None if bias is None else memory.to_device(bias)
    backend.router(memory.to_device(logits), bias, config, ids, weights)
    return memory.to_host(ids), memory.to_host(weights)


ROUTERS = {
    "softmax": ((3, 64), 6, {}),
    "scaled": ((2, 33), 3, {"routed_scaling_factor": 2.5, "norm_topk_prob": True}),
    "all of few": ((1, 5), 5, {"norm_topk_prob": True}),
    "sigmoid": ((2, 48), 4, {"scoring_func": "sigmoid", "bias": True}),
    "groups by their best": ((3, 40), 4, {"n_group": 8, "topk_group": 3}),
    "groups by two": (
        (3, 256),
        8,
        {"n_group": 8, "topk_group": 4, "group_score": "top2", "scoring_func": "sigmoid", "bias": True},
    ),
    "wide": ((1, 384), 33, {"scoring_func": "sigmoid", "bias": True, "norm_topk_prob": True}),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_router(name):
    shape, used, config = ROUTERS[name]
    config = dict(config)
    logits = normal(*shape)
    bias = normal(shape[1], seed=1) if config.pop("bias", False) else None
    ids, weights = routed(logits, bias, used, moe, **config)
    expected_ids, expected = routed(logits, bias, used, reference.moe, **config)
    np.testing.assert_array_equal(ids, expected_ids)
    assert_close(weights, expected, **EXACT)


@pytest.mark.parametrize("name", TIES)
def test_router_takes_the_lower_of_equals(name):
    logits, config, expected = TIES[name]
    ids, _ = routed(np.array([logits], np.float32), None, len(expected), moe, **config)
    assert ids[0].tolist() == expected


def run_experts(qtypes, tokens, choice, hidden=64, inner=32, count=5, used=2, shared=0, shared_types=None, add=False):
    """The GPU's result and the reference's. Experts are of the types of gate and up, and of down; `shared` of them, or
    none, of types of their own."""
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((tokens, count)), axis=1)[:, :used].astype(np.int32)
    if choice == "one takes all":
        ids[:] = (4, 1)
    weights = rng.random((tokens, used), dtype=np.float32)
    gate, up = (random_qtensor(qtypes[0], count, inner, hidden, seed=i) for i in (1, 2))
    down = random_qtensor(qtypes[1], count, hidden, inner, seed=3)
    x = as_multiplied(normal(tokens, hidden), qtypes[0]).astype(np.float32)
    own = None
    if shared:
        kinds = shared_types or qtypes
        own = [random_qtensor(kinds[0], shared * inner, hidden, seed=i) for i in (4, 5)]
        own.append(random_qtensor(kinds[1], hidden, shared * inner, seed=6))
    begin = normal(tokens, hidden, seed=7) if add else np.full((tokens, hidden), np.nan, np.float32)
    out = memory.to_device(begin)
    matrices, there = map(on_device, (gate, up, down)), own and list(map(on_device, own))
    activation = quant.Activation(memory.to_device(x))
    moe.experts(activation, memory.to_device(ids), memory.to_device(weights), *matrices, out, there, add)
    here = reference.quant.Activation(x)
    return memory.to_host(out), reference.moe.experts(here, ids, weights, gate, up, down, begin.copy(), own, add)


@pytest.mark.parametrize(
    ("qtypes", "tokens", "choice", "hidden", "inner"),
    [
        ((ggml.F32, ggml.F32), 3, "one takes all", 33, 5),
        ((ggml.BF16, ggml.F16), 1, "random", 7, 6),
        ((ggml.Q4_0, ggml.Q8_0), 2, "random", 32, 32),
        ((ggml.Q8_0, ggml.Q4_1), 1, "random", 32, 32),
        ((ggml.Q4_1, ggml.F32), 2, "random", 64, 9),
        ((ggml.Q6_K, ggml.F32), 1, "random", 256, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("shared", [0, 1, 3])
def test_experts_of_few_tokens(qtypes, tokens, choice, hidden, inner, shared):
    actual, expected = run_experts(qtypes, tokens, choice, hidden, inner, shared=shared, add=shared == 1)
    assert_close(actual, expected, **(INT8 if qtypes[1] in ggml.QUANTISED else EXACT))


@pytest.mark.parametrize(
    ("qtypes", "tokens", "choice", "inner"),
    [
        ((ggml.Q4_0, ggml.Q8_0), 3, "random", 32),
        ((ggml.Q4_1, ggml.Q4_0), 67, "one takes all", 96),
    ],
    ids=["an expert without tokens", "one takes all"],
)
@pytest.mark.parametrize("shared", [0, 2])
def test_experts_in_tiles(qtypes, tokens, choice, inner, shared):
    count = 5 if tokens > 5 else 2
    actual, expected = run_experts(qtypes, tokens, choice, inner=inner, count=count, shared=shared, add=shared > 0)
    assert_close(actual, expected, **INT8)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("tokens", "count", "shared_types"),
    [
        (1, 5, (ggml.F32, ggml.Q8_0)),
        (3, 5, (ggml.Q4_0, ggml.Q4_0)),
        (3, 2, (ggml.Q4_0, ggml.F16)),
        (moe.FEW + 1, 2 * moe.FEW, None),
    ],
    ids=["gate and up of another type", "down of another type", "in tiles", "tokens for a product"],
)
def test_shared_experts_apart(tokens, count, shared_types, add):
    """What is not in the routed experts' launches gives the same."""
    assert_close(*run_experts((ggml.Q4_0, ggml.Q8_0), tokens, "random", 32, 32, count, 2, 2, shared_types, add), **INT8)


def test_launches_of_a_token(monkeypatch):
    """Shared experts cost none."""
    launched = []
    monkeypatch.setattr(simulator, "launch", lambda function, *arguments: launched.append(function.__name__))
    for shared in (0, 2):
        run_experts((ggml.Q4_0, ggml.Q4_0), 1, "random", shared=shared, add=True)
        assert launched == ["quantise_activations", "gate_up", "quantise_activations", "down"]
        launched.clear()


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(
    "kinds",
    [
        (ggml.Q4_0, ggml.Q8_0, ggml.Q4_1),
        (ggml.Q4_1, ggml.Q4_0, ggml.F16),
        (ggml.F32, ggml.Q8_0, ggml.Q8_0),
        (ggml.Q4_0, ggml.BF16, ggml.Q4_0),
    ],
    ids=str,
)
def test_experts_whose_gate_and_up_differ_in_type(kinds, tokens, shared):
    rng = np.random.default_rng(4)
    ids = rng.integers(2, size=(tokens, 1), dtype=np.int32)
    weights = np.ones((tokens, 1), np.float32)
    matrices = [random_qtensor(qtype, 2, 32, 32, seed=i) for i, qtype in enumerate(kinds)]
    own = [random_qtensor(qtype, 32, 32, seed=7 + i) for i, qtype in enumerate(kinds)] if shared else None
    x = as_multiplied(normal(tokens, 32), ggml.Q8_0).astype(np.float32)
    out = memory.empty((tokens, 32), np.float32)
    moe.experts(
        quant.Activation(memory.to_device(x)),
        memory.to_device(ids),
        memory.to_device(weights),
        *map(on_device, matrices),
        out,
        own and list(map(on_device, own)),
    )
    expected = np.empty((tokens, 32), np.float32)
    reference.moe.experts(reference.quant.Activation(x), ids, weights, *matrices, expected, own)
    assert_close(memory.to_host(out), expected, **INT8)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("qtype", [ggml.F32, ggml.Q4_0], ids=ggml.NAME.get)
def test_ffn(qtype, tokens, add):
    gate, up, down = (random_qtensor(qtype, *shape, seed=i) for i, shape in enumerate(((32, 32), (32, 32), (32, 32))))
    x = as_multiplied(normal(tokens, 32), qtype).astype(np.float32)
    begin = normal(tokens, 32, seed=7) if add else np.full((tokens, 32), np.nan, np.float32)
    out = memory.to_device(begin)
    moe.ffn(quant.Activation(memory.to_device(x)), *map(on_device, (gate, up, down)), out, add)
    expected = reference.moe.ffn(reference.quant.Activation(x), gate, up, down, begin.copy(), add)
    assert_close(memory.to_host(out), expected, **(INT8 if qtype == ggml.Q4_0 else EXACT))


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
    monkeypatch.setattr(draw, "philox", lambda seed, draw, row: (2 * draw + 1 << 32) // 8)
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
    assert philox.philox(0, 0, 0) == 0x6627E8D5


def test_penalties_stay_with_the_host():
    with pytest.raises(PymlaError, match="not sampled on the device"):
        sampling.sample(memory.zeros((1, 5), np.float32), SamplingParams(presence_penalty=1), None, None)
    assert sampling.on_device(SamplingParams())
    assert not sampling.on_device(SamplingParams(logprobs=3))
