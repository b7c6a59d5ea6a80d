"""Attention over the cache."""

import numpy as np
import pytest
from shapes import HEADS, NOPE, RANK, ROPE, V, as_multiplied, matrix, normal

from pymla import cpu, ggml, reference
from pymla.cache import CACHE_TYPES, PAGE, Step
from pymla.weights import QTensor

#: Tokens in the cache.
LENGTHS = (512, 4096, 16384, 65536)
SCALE = (NOPE + ROPE) ** -0.5
#: New tokens of a prompt, and heads that are expanded at a time where the cache is long.
NEW, SOME_HEADS = 128, 4

ATTENTION = {"rtol_max": 0.02, "reason": "queries, keys and softmax weights may be 8-bit codes"}
EXPANDED = {"rtol_max": 1e-5, "reason": "the reference reads the same int8 rows, in another order"}


def last_token(length):
    """The step of one token behind `length` - 1 others."""
    one = np.zeros(1, np.int32)
    table = np.arange(-(-length // PAGE), dtype=np.int32)[None]
    return Step(one, one + length - 1, one, one + length - 1, table)


def cache(qtype, length, width):
    """Random rows; they repeat after 1000."""
    rows = reference.quant.quantise(normal(1000, width), qtype)
    return QTensor(qtype, np.resize(rows, (-(-length // PAGE) * PAGE, rows.shape[1])))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("cache_type", ["q8_0", "f16"])
def bench_decode(measure, cache_type, length):
    latent, rope = cache(CACHE_TYPES[cache_type], length, RANK), cache(ggml.F16, length, ROPE)
    q, out = normal(1, HEADS, RANK + ROPE), np.full((1, HEADS, RANK), np.nan, np.float32)
    step = last_token(length)

    def run():
        cpu.attention.absorbed(q, latent, rope, step, SCALE, out)

    def checks():
        some = np.empty((1, 2, RANK), np.float32)
        yield out[:, -2:], reference.attention.absorbed(q[:, -2:].copy(), latent, rope, step, SCALE, some)

    nbytes = latent.data.nbytes + rope.data.nbytes
    measure(run, checks, macs=length * HEADS * (2 * RANK + ROPE), nbytes=nbytes, **ATTENTION)


@pytest.mark.parametrize("length", LENGTHS)
def bench_prefill(measure, length):
    heads = HEADS if length <= 4096 else SOME_HEADS
    keys, values = normal(length, heads, NOPE + ROPE), normal(length, heads, V, seed=1)
    q, out = normal(NEW, heads, NOPE + ROPE, seed=2), np.full((NEW, heads, V), np.nan, np.float32)
    positions = np.arange(length - NEW, length, dtype=np.int32)

    def run():
        cpu.attention.expanded(q, keys, values, positions, SCALE, out)

    def checks():
        some = np.empty((2, 1, V), np.float32)
        inputs = (q[-2:, -1:].copy(), keys[:, -1:].copy(), values[:, -1:].copy(), positions[-2:])
        yield out[-2:, -1:], reference.attention.expanded(*inputs, SCALE, some)

    pairs = NEW * length - NEW * (NEW - 1) // 2
    measure(run, checks, macs=pairs * heads * (NOPE + ROPE + V), **ATTENTION)


def bench_expand(measure, length=4096):
    k_b, v_b = matrix(ggml.Q4_0, HEADS, NOPE, RANK), matrix(ggml.Q4_0, HEADS, V, RANK)
    c_kv, k_pe = as_multiplied(normal(length, RANK), ggml.Q4_0), normal(length, ROPE, seed=1)
    keys, values = np.empty((length, HEADS, NOPE + ROPE), np.float32), np.empty((length, HEADS, V), np.float32)

    def run():
        cpu.attention.expand(c_kv, k_pe, k_b, v_b, keys, values)

    def checks():
        expected = np.empty((3, HEADS, NOPE + ROPE), np.float32), np.empty((3, HEADS, V), np.float32)
        reference.attention.expand(c_kv[-3:], k_pe[-3:], k_b, v_b, *expected)
        return (keys[-3:], expected[0]), (values[-3:], expected[1])

    measure(run, checks, macs=length * HEADS * RANK * (NOPE + V), **EXPANDED)


def bench_absorb(measure):
    k_b = matrix(ggml.Q4_0, HEADS, NOPE, RANK)
    q, out = normal(1, HEADS, NOPE + ROPE), np.empty((1, HEADS, RANK + ROPE), np.float32)

    def run():
        cpu.attention.absorb(q, k_b, out)

    def checks():
        yield out, reference.attention.absorb(q, k_b, np.empty_like(out))

    measure(run, checks, macs=HEADS * RANK * NOPE, nbytes=k_b.data.nbytes, **ATTENTION)


def bench_store(measure, tokens=512):
    rows, slots = normal(tokens, RANK), np.random.default_rng(0).permutation(tokens).astype(np.int32)
    stored = cache(ggml.Q8_0, tokens, RANK)

    def run():
        cpu.attention.store(rows, slots, stored)

    def checks():
        expected = QTensor(ggml.Q8_0, np.empty_like(stored.data))
        reference.attention.store(rows, slots, expected)
        yield stored.data, expected.data

    measure(run, checks, nbytes=rows.nbytes, rtol_max=1e-9, reason="the same bytes")
