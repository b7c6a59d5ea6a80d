"""Attention over the cache."""

import numpy as np
import pytest
from cases import as_multiplied, latent_layout, on_cpu
from shapes import HEADS, NOPE, RANK, ROPE, V, matrix, normal

from pymla import cpu, ggml, reference
from pymla.pages import PAGE, Step
from pymla.tensor import QTensor

#: Tokens in the cache.
LENGTHS = (512, 4096, 16384, 65536)
SCALE = (NOPE + ROPE) ** -0.5
#: New tokens of a prompt, and heads that are expanded at a time where the cache is long.
NEW, SOME_HEADS = 128, 4

#: Of DeepSeek-V3.2: the indexer's heads, numbers of its keys, positions that it chooses, and heads that attend to them.
INDEX_HEADS, KEY, CHOSEN, SPARSE_HEADS = 64, 128, 2048, 128
#: Tokens in the cache where attention is sparse, and new ones.
SPARSE_LENGTHS, SPARSE_NEW = (8192, 32768, 131072), (1, 64)

CHOICE = {
    "rtol_max": 0.02,
    "reason": "queries and keys may be 8-bit codes, and scores change places",
}
ATTENTION = {"rtol_max": 0.02, "reason": "queries, keys and softmax weights may be 8-bit codes"}
INT8 = {"rtol_max": 0.1, "reason": "keys, values and softmax weights of 8 bits: 1 % of the length of a result"}
EXPANDED = {"rtol_max": 1e-5, "reason": "the reference reads the same int8 rows, in another order"}


def last_tokens(length, tokens=1):
    """The step of the last tokens of `length`."""
    zeros, positions = np.zeros(tokens, np.int32), np.arange(length - tokens, length, dtype=np.int32)
    table = np.arange(-(-length // PAGE), dtype=np.int32)[None]
    return Step(zeros, positions, zeros, positions, table)


def random_cache(cache_type, length):
    """Random rows of whole pages, which repeat after 1024, as blocks and as the CPU has them."""
    layout = latent_layout(cache_type, RANK, ROPE)
    rows = [QTensor(qtype, reference.quant.quantise(normal(1024, width), qtype)) for qtype, width in layout]
    slots = -(-length // PAGE) * PAGE
    return (
        [QTensor(each.qtype, np.resize(each.data, (slots, each.data.shape[1]))) for each in rows],
        [QTensor(each.qtype, np.resize(each.data, (slots, each.data.shape[1]))) for each in on_cpu(layout, rows)],
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q6_0", "q5_0", "q4_0"])
def bench_decode(measure, cache_type, length):
    blocks, cache = random_cache(cache_type, length)
    q, out = normal(1, HEADS, RANK + ROPE), np.full((1, HEADS, RANK), np.nan, np.float32)
    step = last_tokens(length)

    def run():
        cpu.attention.absorbed(q, *cache, step, SCALE, out)

    def checks():
        some = np.empty((1, 2, RANK), np.float32)
        yield out[:, -2:], reference.attention.absorbed(q[:, -2:].copy(), *blocks, step, SCALE, some)

    nbytes = sum(rows.data.nbytes for rows in cache)
    measure(run, checks, macs=length * HEADS * (2 * RANK + ROPE), nbytes=nbytes, **ATTENTION)


@pytest.mark.parametrize("tokens", SPARSE_NEW)
@pytest.mark.parametrize("length", SPARSE_LENGTHS)
@pytest.mark.parametrize("qtype", [ggml.F16, ggml.Q8_0], ids=ggml.NAME.get)
def bench_choose(measure, qtype, length, tokens):
    keys, rows = cpu.attention.index_cache(qtype, KEY, length), normal(length, KEY)
    cpu.attention.store(rows, np.arange(length, dtype=np.int32), keys)
    q, weights = normal(tokens, INDEX_HEADS, KEY, seed=1), normal(tokens, INDEX_HEADS, seed=2)
    step, out = last_tokens(length, tokens), np.full((tokens, CHOSEN), -1, np.int32)

    def run():
        cpu.attention.choose(q, weights, keys, step, out)

    def checks():
        blocks = QTensor(ggml.F32, rows.view(np.uint8))
        expected = np.empty((1, CHOSEN), np.int32)
        reference.attention.choose(q[-1:], weights[-1:], blocks, last_tokens(length), expected)
        yield tuple(np.sort(scores(positions)) for positions in (out[-1], expected[0]))

    def scores(positions):
        return weights[-1] @ np.maximum(q[-1] @ rows[positions].T, 0)

    measure(run, checks, macs=tokens * length * INDEX_HEADS * KEY, nbytes=keys.data.nbytes, **CHOICE)


@pytest.mark.parametrize("tokens", SPARSE_NEW)
@pytest.mark.parametrize("length", SPARSE_LENGTHS)
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def bench_sparse(measure, cache_type, length, tokens):
    blocks, cache = random_cache(cache_type, length)
    q, out = normal(tokens, SPARSE_HEADS, RANK + ROPE), np.full((tokens, SPARSE_HEADS, RANK), np.nan, np.float32)
    step, rng = last_tokens(length, tokens), np.random.default_rng(0)
    rows = [np.sort(rng.choice(length - tokens, CHOSEN, replace=False)) for _ in range(tokens)]
    chosen = np.array(rows, np.int32)

    def run():
        cpu.attention.sparse(q, *cache, step, chosen, SCALE, out)

    def checks():
        some, inputs = np.empty((1, 2, RANK), np.float32), q[-1:, -2:].copy()
        expected = reference.attention.sparse(inputs, *blocks, last_tokens(length), chosen[-1:], SCALE, some)
        yield out[-1:, -2:], expected

    row_bytes = sum(rows.data.shape[1] for rows in cache)
    macs = tokens * CHOSEN * SPARSE_HEADS * (2 * RANK + ROPE)
    measure(run, checks, macs=macs, nbytes=tokens * CHOSEN * row_bytes, **ATTENTION)


@pytest.mark.parametrize("exact", [False, True], ids=["int8", "float32"])
@pytest.mark.parametrize("length", LENGTHS)
def bench_prefill(measure, length, exact):
    heads = HEADS if length <= 4096 else SOME_HEADS
    k_b, v_b, c_kv, k_pe = latent_rows(length, heads)
    kv = cpu.attention.expand(c_kv, k_pe, k_b, v_b, cpu.attention.keys_values(length, heads, NOPE, ROPE, V, exact))
    q, out = normal(NEW, heads, NOPE + ROPE, seed=2), np.full((NEW, heads, V), np.nan, np.float32)
    positions = np.arange(length - NEW, length, dtype=np.int32)

    def run():
        cpu.attention.expanded(q, kv, positions, SCALE, out)

    def checks():
        some = reference.attention.keys_values(length, 1, NOPE, ROPE, V, True)
        reference.attention.expand(c_kv, k_pe, k_b.rows(0, 1), v_b.rows(0, 1), some)
        inputs = (q[-2:, :1].copy(), some, positions[-2:])
        yield out[-2:, :1], reference.attention.expanded(*inputs, SCALE, np.empty((2, 1, V), np.float32))

    pairs = NEW * length - NEW * (NEW - 1) // 2
    measure(run, checks, macs=pairs * heads * (NOPE + ROPE + V), **(ATTENTION if exact else INT8))


@pytest.mark.parametrize("exact", [False, True], ids=["int8", "float32"])
def bench_expand(measure, exact, length=4096):
    k_b, v_b, c_kv, k_pe = latent_rows(length, HEADS)
    kv = cpu.attention.keys_values(length, HEADS, NOPE, ROPE, V, exact)

    def run():
        cpu.attention.expand(c_kv, k_pe, k_b, v_b, kv)

    def checks():
        if not exact:
            # Panels are checked by what attention makes of them, above.
            return
        expected = reference.attention.keys_values(3, HEADS, NOPE, ROPE, V, True)
        reference.attention.expand(c_kv[-3:], k_pe[-3:], k_b, v_b, expected)
        yield kv.keys[-3:], expected.keys
        yield kv.values[-3:], expected.values

    measure(run, checks, macs=length * HEADS * RANK * (NOPE + V), **EXPANDED)


def latent_rows(length, heads):
    """Matrices and latent rows to expand."""
    k_b, v_b = matrix(ggml.Q4_0, heads, NOPE, RANK), matrix(ggml.Q4_0, heads, V, RANK)
    return k_b, v_b, as_multiplied(normal(length, RANK), ggml.Q4_0), normal(length, ROPE, seed=1)
