"""Norm, residual sum, rope and embedding: what stands between the products."""

import numpy as np
import pytest
from shapes import HEADS, HIDDEN, NOPE, ROPE, matrix, normal

from pymla import cpu, ggml, reference

EXACT = {"rtol_max": 2e-6, "reason": "order of summation"}
TOKENS = pytest.mark.parametrize("tokens", [1, 512])


@TOKENS
def bench_rms_norm(measure, tokens):
    x, weight, out = normal(tokens, HIDDEN), normal(HIDDEN), np.empty((tokens, HIDDEN), np.float32)

    def run():
        cpu.norm.rms_norm(x, weight, 1e-6, out)

    def checks():
        yield out, reference.norm.rms_norm(x, weight, 1e-6, np.empty_like(out))

    measure(run, checks, nbytes=x.nbytes, **EXACT)


@TOKENS
def bench_add(measure, tokens):
    x, y = np.zeros((tokens, HIDDEN), np.float32), normal(tokens, HIDDEN)

    def run():
        cpu.norm.add(x, y)

    def checks():
        yield x, y

    measure(run, checks, nbytes=2 * x.nbytes, **EXACT)


@TOKENS
def bench_rope(measure, tokens):
    positions, inv_freq = np.arange(tokens, dtype=np.int32), 10000.0 ** -(np.arange(ROPE // 2) / (ROPE // 2))
    cos_sin = cpu.rope.angles(positions, inv_freq, 1.0, np.empty((tokens, ROPE // 2, 2), np.float32))
    begin = normal(tokens, HEADS, NOPE + ROPE)
    x = begin.copy()

    def run():
        cpu.rope.rope_interleaved(x, cos_sin)

    def checks():
        yield x, reference.rope.rope_interleaved(begin, cos_sin)

    measure(run, checks, nbytes=x.nbytes, **EXACT)


@TOKENS
def bench_embedding(measure, tokens):
    w, out = matrix(ggml.Q4_0, 102400, HIDDEN), np.empty((tokens, HIDDEN), np.float32)
    ids = np.random.default_rng(0).integers(102400, size=tokens, dtype=np.int32)

    def run():
        cpu.quant.embedding_rows(w, ids, 1.0, out)

    def checks():
        yield out, reference.quant.embedding_rows(w, ids, 1.0, np.empty_like(out))

    measure(run, checks, nbytes=tokens * w.data.shape[1], **EXACT)
