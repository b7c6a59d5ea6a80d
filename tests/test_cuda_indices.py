"""Indices on the device that point anywhere: no kernel reads or writes outside an array, and the result is what the
last index in range gives.

In the simulator an address outside every array, and a negative index, raise. Arrays lie among guards here, which are
looked at afterwards: other arrays, poisoned.
"""

import numpy as np
import pytest
import simulated  # noqa: F401
from cases import random_qtensor

from pymla import ggml
from pymla.cuda import attention, memory, moe, quant
from pymla.errors import PymlaError
from pymla.pages import CACHE_TYPES, PAGE, Step
from pymla.tensor import QTensor

WILD = -1, -(2**31), 2**31 - 1, 10**6
TYPES = [ggml.F16, ggml.Q4_0, ggml.Q6_K]


class Guarded:
    """Device arrays with poisoned memory before and behind each."""

    def __init__(self):
        self._guards = []

    def array(self, values):
        """A copy of a NumPy array, of whole float32 or int32 elements or bytes."""
        size = values.nbytes
        whole = memory.empty(size + 2 * 4096, np.uint8)
        memory.fill(whole, 0xFF)
        inner = whole[4096 : 4096 + size]
        memory.write(inner, values.reshape(-1).view(np.uint8))
        self._guards.append((whole, size))
        return inner.view(values.dtype).reshape(values.shape)

    def tensor(self, w):
        return QTensor(w.qtype, self.array(np.array(w.data)))

    def out(self, *shape):
        return self.array(np.full(shape, np.nan, np.float32))

    def check(self):
        for whole, size in self._guards:
            data = memory.to_host(whole)
            assert (data[:4096] == 0xFF).all()
            assert (data[4096 + size :] == 0xFF).all()


@pytest.fixture
def guarded():
    made = Guarded()
    yield made
    made.check()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def ints(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize("qtype", TYPES, ids=ggml.NAME.get)
def test_tokens(guarded, qtype):
    w, tokens = guarded.tensor(random_qtensor(qtype, 5, 256)), guarded.array(ints(*WILD, 5, 4))
    out = memory.to_host(quant.embedding_rows(w, tokens, 1.0, guarded.out(6, 256)))
    np.testing.assert_array_equal(out, np.broadcast_to(out[-1], out.shape))


@pytest.mark.parametrize("tokens", [1, 9], ids=["by rows", "in tiles"])
@pytest.mark.parametrize("qtype", [ggml.F32, ggml.Q4_0], ids=ggml.NAME.get)
def test_experts(guarded, qtype, tokens):
    gate, up, down = (guarded.tensor(random_qtensor(qtype, 2, 32, 32, seed=i)) for i in range(3))
    x, weights = guarded.array(normal(tokens, 32)), guarded.array(np.ones((tokens, 4), np.float32))

    def result(ids):
        ids = guarded.array(np.tile(ints(*ids), (tokens, 1)))
        out = moe.experts(quant.Activation(x), ids, weights, gate, up, down, guarded.out(tokens, 32))
        return memory.to_host(out)

    np.testing.assert_array_equal(result(WILD), result((1, 1, 1, 1)))


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_slots_and_tables(guarded, cache_type):
    qtype = CACHE_TYPES[cache_type]
    empty = np.full((2 * PAGE, ggml.row_bytes(qtype, 32)), 0xAA, np.uint8)
    cache = guarded.tensor(QTensor(qtype, empty))
    attention.store(guarded.array(normal(4, 32)), guarded.array(ints(*WILD)), cache)
    np.testing.assert_array_equal(memory.to_host(cache.data), empty)  # nothing is stored
    attention.store(guarded.array(normal(1, 32)), guarded.array(ints(2 * PAGE - 1)), cache)
    last = memory.to_host(attention.load(cache, guarded.array(ints(1)), guarded.out(PAGE, 32)))
    for page in (*WILD, 2):
        rows = memory.to_host(attention.load(cache, guarded.array(ints(page)), guarded.out(PAGE, 32)))
        np.testing.assert_array_equal(rows, last)


def attend(guarded, operation, step, cache_type, tokens):
    """The result of a form of attention over a cache of two pages."""
    heads, rank, rope = 2, 32, 32
    qtype = CACHE_TYPES[cache_type]
    size, v = (rank + rope, rank) if operation != "full" else (32, 32)
    widths = (rank, rope) if operation != "full" else (heads * size, heads * v)
    cache = [guarded.tensor(random_qtensor(qtype, 2 * PAGE, width, seed=i)) for i, width in enumerate(widths)]
    arrays = Step(*(guarded.array(each) for each in step))
    q = guarded.array(normal(tokens, heads, size))
    return memory.to_host(getattr(attention, operation)(q, *cache, arrays, 0.1, guarded.out(tokens, heads, v)))


def step_of(positions, sequences, tables):
    tokens = ints(*positions)
    return Step(np.zeros_like(tokens), tokens, ints(*sequences), np.zeros_like(tokens), ints(*tables).reshape(-1, 1))


@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "f32"])
@pytest.mark.parametrize("operation", ["absorbed", "absorbed_materialised", "full"])
def test_steps(guarded, operation, cache_type):
    """Positions, sequences and pages, of single tokens."""
    expected = attend(guarded, operation, step_of((63,), (1,), (0, 1)), cache_type, 1)
    for wild in WILD:
        for step in (
            step_of((wild,), (1,), (0, 1)),
            step_of((63,), (wild,), (0, 1)),
            step_of((63,), (1,), (0, wild)),
            step_of((wild,), (wild,), (wild, wild)),
        ):
            np.testing.assert_array_equal(attend(guarded, operation, step, cache_type, 1), expected)


def choose(guarded, step, qtype, tokens, most=7):
    """The choice of positions among those of two pages."""
    keys = guarded.tensor(random_qtensor(qtype, 2 * PAGE, 32))
    arrays = Step(*(guarded.array(each) for each in step))
    out = guarded.array(np.full((tokens, most), -7, np.int32))
    q, weights = guarded.array(normal(tokens, 2, 32)), guarded.array(normal(tokens, 2, seed=1))
    return memory.to_host(attention.choose(q, weights, keys, arrays, out))


@pytest.mark.parametrize("qtype", [ggml.F16, ggml.Q8_0, ggml.F32], ids=ggml.NAME.get)
def test_steps_of_the_indexer(guarded, qtype):
    """Positions, sequences and pages, of a single token and of a prompt."""
    expected = choose(guarded, step_of((63,), (1,), (0, 1)), qtype, 1)
    assert (np.diff(expected) > 0).all()
    of_prompt = choose(guarded, step_of((61, 62, 63), (1,) * 3, (0, 1)), qtype, 3)
    for wild in WILD:
        for step in (
            step_of((wild,), (1,), (0, 1)),
            step_of((63,), (wild,), (0, 1)),
            step_of((wild,), (wild,), (wild, wild)),
        ):
            np.testing.assert_array_equal(choose(guarded, step, qtype, 1), expected)
        step = step_of((61, 62, wild), (wild,) * 3, (0, wild))
        np.testing.assert_array_equal(choose(guarded, step, qtype, 3), of_prompt)


def attend_chosen(guarded, step, chosen, cache_type):
    """Sparse attention over a cache of two pages."""
    heads, rank, rope = 2, 32, 32
    cache = [guarded.tensor(random_qtensor(CACHE_TYPES[cache_type], 2 * PAGE, w, seed=w)) for w in (rank, rope)]
    arrays, tokens = Step(*(guarded.array(each) for each in step)), len(chosen)
    q, out = guarded.array(normal(tokens, heads, rank + rope)), guarded.out(tokens, heads, rank)
    return memory.to_host(attention.sparse(q, *cache, arrays, guarded.array(chosen), 0.1, out))


@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "f32"])
def test_chosen_positions(guarded, cache_type):
    """A position that the token does not see is its own; the first negative one ends the list."""
    step = step_of((62,), (1,), (0, 1))

    def result(*chosen, step=step):
        return attend_chosen(guarded, step, ints(*chosen)[None], cache_type)

    expected = result(3, 7, 62, -1)
    for wild in (2**31 - 1, 10**6, 63):
        np.testing.assert_array_equal(result(3, 7, wild, -1), expected)
        np.testing.assert_array_equal(result(3, 7, wild, -(2**31)), expected)
    np.testing.assert_array_equal(result(-1, -1, -1, -1), result(62, -1, -1, -1))
    for wild in WILD:
        other = step_of((63,), (wild,), (0, wild))
        np.testing.assert_array_equal(
            result(3, 7, 63, -1, step=other), result(3, 7, 63, -1, step=step_of((63,), (1,), (0, 1)))
        )


@pytest.mark.parametrize("wild", WILD)
def test_prompts_of_full_attention(guarded, wild):
    right = attend(guarded, "full", step_of((61, 62, 63), (0, 0, 0), (1,)), "f16", 3)
    found = attend(guarded, "full", step_of((61, 62, wild), (wild,) * 3, (wild,)), "f16", 3)
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("wild", WILD)
def test_positions_of_expanded_attention(guarded, wild):
    keys, values = (guarded.array(normal(5, 2, width).astype(np.float16)) for width in (32, 16))
    made = attention.KeysValues(keys, values)
    q = guarded.array(normal(2, 2, 32))

    def result(last):
        positions, out = guarded.array(ints(3, last)), guarded.out(2, 2, 16)
        return memory.to_host(attention.expanded(q, made, positions, 0.2, out))

    np.testing.assert_array_equal(result(wild), result(4))


def test_arrays_without_anything_to_point_at_are_refused():
    tokens, out = memory.zeros(1, np.int32), memory.empty((1, 32), np.float32)
    nothing = QTensor(ggml.F16, memory.empty((0, 64), np.uint8))
    with pytest.raises(PymlaError, match="embedding_rows: tokens"):
        quant.embedding_rows(nothing, tokens, 1.0, out)
    with pytest.raises(PymlaError, match="store: slots"):
        attention.store(memory.zeros((1, 32), np.float32), tokens, nothing)
    with pytest.raises(PymlaError, match="load: "):
        attention.load(nothing, tokens, out)
    rows = QTensor(ggml.F16, memory.zeros((PAGE, 64), np.uint8))
    step = Step(*(memory.zeros(1, np.int32) for _ in range(4)), memory.zeros((1, 1), np.int32))
    q, result = memory.zeros((1, 1, 64), np.float32), memory.empty((1, 1, 32), np.float32)
    with pytest.raises(PymlaError, match=r"absorbed: step\.block_tables"):
        attention.absorbed(q, nothing, nothing, step, 1.0, result)
    chosen = memory.zeros((1, 1), np.int32)
    with pytest.raises(PymlaError, match=r"sparse: step\.block_tables"):
        attention.sparse(q, nothing, nothing, step, chosen, 1.0, result)
    index_q, weights = memory.zeros((1, 1, 32), np.float32), memory.zeros((1, 1), np.float32)
    with pytest.raises(PymlaError, match=r"choose: step\.block_tables"):
        attention.choose(index_q, weights, nothing, step, chosen)
    with pytest.raises(PymlaError, match=r"absorbed: step\.positions"):
        attention.absorbed(q, rows, rows, step._replace(block_tables=memory.empty((1, 0), np.int32)), 1.0, result)
    with pytest.raises(PymlaError, match=r"absorbed: step\.seq_of"):
        attention.absorbed(q, rows, rows, step._replace(block_tables=memory.empty((0, 1), np.int32)), 1.0, result)
