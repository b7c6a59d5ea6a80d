"""Router and experts of every backend against their definitions."""

import numpy as np
import pytest
from cases import TIES, as_multiplied, random_qtensor, routing
from compare import assert_close
from definitions import dense, route, swiglu
from tested import SIMULATED, each_backend

from pymla import ggml

pytestmark = [each_backend, pytest.mark.filterwarnings("error")]

EXACT = {"rtol_max": 3e-6, "reason": "order of summation, and exponentials of 2 ulp"}
INT8 = {"rtol_max": 0.03, "reason": "hidden activations are int8"}


def routed(backend, logits, bias, used, config):
    """Ids and weights of a router."""
    ids, weights = backend.put(np.full((len(logits), used), -1, np.int32)), backend.unset(len(logits), used)
    there = backend.put(logits)
    backend.moe.router(there, None if bias is None else backend.put(bias), config, ids, weights)
    np.testing.assert_array_equal(backend.memory.to_host(there), logits)
    return backend.memory.to_host(ids), backend.memory.to_host(weights)


def check_router(backend, logits, bias, used, config):
    ids, weights = routed(backend, logits, bias, used, config)
    expected_ids, expected = route(logits, bias, used, config)
    np.testing.assert_array_equal(ids, expected_ids)
    for row, wanted in zip(weights, expected, strict=True):
        assert_close(row, wanted, **backend.tolerance(cpu=EXACT, cuda=EXACT))


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
def test_router(backend, name):
    shape, used, config = ROUTERS[name]
    bias = np.random.default_rng(1).standard_normal(shape[1]).astype(np.float32) if config.get("bias") else None
    check_router(backend, backend.normal(*shape), bias, used, routing(**config))


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("height", [0, 20_000])
def test_router_by_every_rule(backend, scoring_func, groups, biased, norm_topk_prob, height):
    """A token's logits lie higher than the last one's by `height`, which overflows exponentials."""
    config = routing(
        scoring_func=scoring_func,
        n_group=groups[0],
        topk_group=groups[1],
        group_score="top2" if scoring_func == "sigmoid" else "max",
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=2.5,
    )
    logits = backend.normal(6, 16)
    if scoring_func == "softmax":
        logits += height * np.arange(6, dtype=backend.dtype)[:, None]
    bias = np.random.default_rng(1).standard_normal(16).astype(np.float32) if biased else None
    check_router(backend, logits, bias, 3, config)


@pytest.mark.parametrize("name", TIES)
def test_router_takes_the_lower_of_equals(backend, name):
    logits, config, expected = TIES[name]
    ids, _ = routed(backend, np.array([logits], backend.dtype), None, len(expected), routing(**config))
    assert ids[0].tolist() == expected


def test_weights_of_experts_without_a_score(backend):
    """Sigmoids that are 0: a sum of 0 is no divisor."""
    config = routing(scoring_func="sigmoid", norm_topk_prob=True)
    with np.errstate(over="ignore"):
        _, weights = routed(backend, np.full((1, 4), -20_000, backend.dtype), None, 2, config)
    assert weights.tolist() == [[0, 0]]
    assert not np.signbit(weights).any()


def three(qtypes, count, hidden, inner, seed):
    """Gate, up and down of their types: matrices, or those of `count` experts."""
    shapes = (inner, hidden), (inner, hidden), (hidden, inner)
    several = (count,) if count else ()
    return [
        random_qtensor(qtype, *several, *shape, seed=seed + i)
        for i, (qtype, shape) in enumerate(zip(qtypes, shapes, strict=True))
    ]


def check_experts(backend, qtypes, tokens, choice, hidden, inner, count, *, shared=0, shared_types=None, adds=(0, 1)):
    """Experts of the types of gate, up and down; `shared` of them, or none, of types of their own. `adds`: overwriting,
    adding, or both."""
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((tokens, count)), axis=1)[:, :2].astype(np.int32)
    if choice == "one takes all":
        ids[:] = (4, 1)
    weights = rng.standard_normal((tokens, 2)).astype(backend.dtype)
    matrices = three(qtypes, count, hidden, inner, seed=1)
    own = three(shared_types or qtypes, None, hidden, shared * inner, seed=4) if shared else None
    x = np.random.default_rng(0).standard_normal((tokens, hidden), dtype=np.float32)
    if hidden % 32 == 0:
        x = as_multiplied(x, ggml.Q4_0)  # rounding it again changes nothing
    x, before = x.astype(backend.dtype), backend.normal(tokens, hidden, seed=7)
    of_experts, of_shared = [dense(w) for w in matrices], [dense(w) for w in own or ()]
    expected = np.zeros((tokens, hidden))
    for t in range(tokens):
        for e, weight in zip(ids[t], weights[t], strict=True):
            expected[t] += weight * swiglu(x[t].astype(np.float64), *(w[e] for w in of_experts))
        if own:
            expected[t] += swiglu(x[t].astype(np.float64), *of_shared)
    exact = not any(w.qtype in ggml.QUANTISED for w in (matrices[2], *(own or ())[2:]))
    there = [backend.put(w) for w in matrices], own and [backend.put(w) for w in own]
    for add in map(bool, adds):
        out = backend.put(before.copy()) if add else backend.unset(tokens, hidden)
        activation = backend.activation(x.copy())
        arguments = backend.put(ids), backend.put(weights), *there[0], out, there[1], add
        assert backend.moe.experts(activation, *arguments) is out
        np.testing.assert_array_equal(backend.memory.to_host(activation.x), x)
        tolerance = EXACT if exact else INT8
        wanted = expected + before if add else expected
        assert_close(backend.memory.to_host(out), wanted, **backend.tolerance(cpu=tolerance, cuda=tolerance))


F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q6_K = ggml.F32, ggml.F16, ggml.BF16, ggml.Q4_0, ggml.Q4_1, ggml.Q8_0, ggml.Q6_K

#: Types of gate, up and down, tokens, choice, hidden and inner size, experts. Where every expert has several
#: tokens, they are computed by panels or tiles.
EXPERTS = [
    ((F32, F32, F32), 3, "one takes all", 33, 5, 5),
    ((BF16, BF16, F16), 1, "random", 7, 6, 5),
    ((Q4_0, Q4_0, Q8_0), 2, "random", 32, 32, 5),
    ((Q8_0, Q8_0, Q4_1), 1, "random", 32, 32, 5),
    ((Q4_1, Q4_1, F32), 2, "random", 64, 9, 5),
    ((Q6_K, Q6_K, F32), 1, "random", 256, 3, 5),
    ((Q4_0, Q4_0, Q8_0), 3, "random", 64, 32, 2),
    ((Q4_1, Q4_1, Q4_0), 67, "one takes all", 64, 96, 5),
]
#: Rows with headers, whose columns cannot be taken apart.
EXPERTS += [((ggml.IQ2_BN,) * 3, tokens, "random", 64, 64, 2) for tokens in (1, 9)]
#: What takes too long in the simulator.
EXPERTS += [
    ((qtype, qtype, qtype), tokens, choice, 96, 64, 6)
    for qtype in (F32, Q4_0, Q8_0)
    for tokens, choice in ((1, "random"), (5, "random"), (17, "random"), (17, "one takes all"))
    if not SIMULATED
]


def named_types(qtypes):
    return "-".join(map(ggml.NAME.get, qtypes))


def named(case):
    qtypes, *sizes = case
    return "-".join([named_types(qtypes), *map(str, sizes)])


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("case", EXPERTS, ids=named)
def test_experts(backend, case, shared):
    check_experts(backend, *case, shared=shared, adds=(shared == 1,) if SIMULATED else (0, 1))


@pytest.mark.parametrize(
    ("tokens", "count", "shared_types"),
    [
        (1, 5, (F32, F32, Q8_0)),
        (3, 5, (Q4_0, Q4_0, Q4_0)),
        (3, 2, (Q4_0, Q4_0, F16)),
        (9, 16, None),
        (17, 6, (Q4_1, Q4_1, Q4_1)),
    ],
    ids=["gate and up of another type", "down of another type", "many pairs", "tokens for a product", "other types"],
)
def test_shared_experts_of_other_types(backend, tokens, count, shared_types):
    """What is not computed together with the routed experts gives the same."""
    check_experts(backend, (Q4_0, Q4_0, Q8_0), tokens, "random", 32, 32, count, shared=2, shared_types=shared_types)


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(
    "qtypes", [(Q4_0, Q8_0, Q4_1), (Q4_1, Q4_0, F16), (F32, Q8_0, Q8_0), (Q4_0, BF16, Q4_0)], ids=named_types
)
def test_gate_and_up_of_two_types(backend, qtypes, tokens, shared):
    """Their rows read the codes of the same activations in different orders."""
    hidden, adds = (32, (0,)) if SIMULATED else (512, (0, 1))
    check_experts(backend, qtypes, tokens, "random", hidden, 32, 2, shared=shared, adds=adds)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("tokens", [1, 3] if SIMULATED else [1, 3, 17])
@pytest.mark.parametrize("qtype", [F32, Q4_0], ids=ggml.NAME.get)
def test_ffn(backend, qtype, tokens, add):
    hidden, inner = (32, 32) if SIMULATED else (96, 64)
    matrices = three((qtype,) * 3, None, hidden, inner, seed=0)
    x = np.random.default_rng(0).standard_normal((tokens, hidden), dtype=np.float32)
    x, before = as_multiplied(x, Q4_0).astype(backend.dtype), backend.normal(tokens, hidden, seed=9)
    out = backend.put(before.copy()) if add else backend.unset(tokens, hidden)
    assert backend.moe.ffn(backend.activation(x), *map(backend.put, matrices), out, add) is out
    expected = [swiglu(row.astype(np.float64), *map(dense, matrices)) for row in x] + before * add
    tolerance = INT8 if qtype in ggml.QUANTISED else EXACT
    assert_close(backend.memory.to_host(out), expected, **backend.tolerance(cpu=tolerance, cuda=tolerance))


@pytest.mark.parametrize("columns", [1, 35])
def test_relu_squared(backend, columns):
    x = backend.normal(3, columns)
    there = backend.put(x.copy())
    assert backend.moe.relu_squared(there) is there
    expected = [[max(value, 0.0) ** 2 for value in row] for row in x.astype(np.float64)]
    tolerance = {"rtol_max": 1e-7, "reason": "one product"}
    assert_close(backend.memory.to_host(there), expected, **backend.tolerance(cpu=tolerance, cuda=tolerance))
