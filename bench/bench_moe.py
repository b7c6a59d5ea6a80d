"""The router and the experts."""

import dataclasses

import numpy as np
import pytest
from cases import as_multiplied
from shapes import EXPERTS, HIDDEN, INNER, USED, cold, matrix, normal

from pymla import cpu, ggml, reference
from pymla.models.config import ModelConfig

ROUTER = {"rtol_max": 1e-5, "reason": "the exponential is accurate to two units of the last place"}
INT8 = {"rtol_max": 0.02, "reason": "hidden activations are int8"}


@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def bench_router(measure, tokens, scoring):
    fields = dict.fromkeys((field.name for field in dataclasses.fields(ModelConfig)), 0)
    fields |= {"scoring_func": scoring, "n_group": 1, "topk_group": 1, "group_score": "max"}
    config = ModelConfig(**fields | {"norm_topk_prob": True, "routed_scaling_factor": 1.0})
    logits = normal(tokens, EXPERTS)
    outs = [(np.empty((tokens, USED), np.int32), np.empty((tokens, USED), np.float32)) for _ in range(2)]

    def run():
        cpu.moe.router(logits, None, config, *outs[0])

    def checks():
        reference.moe.router(logits, None, config, *outs[1])
        return zip(*outs, strict=True)

    measure(run, checks, nbytes=logits.nbytes, **ROUTER)


@pytest.mark.parametrize("tokens", [1, 8, 64, 512])
def bench_experts_q4_0(measure, tokens):
    gate, up = (matrix(ggml.Q4_0, EXPERTS, INNER, HIDDEN) for _ in range(2))
    down = matrix(ggml.Q4_0, EXPERTS, HIDDEN, INNER)
    rng = np.random.default_rng(0)
    # Other experts in every run, as from layer to layer, so that they are not in the processor's caches.
    choices = [np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :USED].astype(np.int32) for _ in range(16)]
    x = as_multiplied(normal(tokens, HIDDEN), ggml.Q4_0)
    weights, out = rng.random((tokens, USED), dtype=np.float32), np.full((tokens, HIDDEN), np.nan, np.float32)
    activation = cpu.quant.Activation(x)
    activation.panels(ggml.Q4_0)
    turn = iter(range(1 << 30))
    last = [choices[0]]

    def run():
        last[0] = choices[next(turn) % len(choices)]
        cpu.moe.experts(activation, last[0], weights, gate, up, down, out)

    def checks():
        one = slice(tokens - 1, tokens)
        expected = np.empty((1, HIDDEN), np.float32)
        seen = reference.quant.Activation(x[one])
        yield out[one], reference.moe.experts(seen, last[0][one], weights[one], gate, up, down, expected)

    used = np.mean([len(np.unique(ids)) for ids in choices]) / EXPERTS
    few = tokens <= 8
    nbytes = used * (gate.data.nbytes + up.data.nbytes + down.data.nbytes) if few else 0
    measure(run, checks, macs=3 * tokens * USED * HIDDEN * INNER, nbytes=nbytes, streamed=few, **INT8)


@pytest.mark.parametrize("tokens", [1, 512])
def bench_shared_experts_q4_0(measure, tokens):
    gates, ups = (cold(matrix(ggml.Q4_0, 2 * INNER, HIDDEN)) for _ in range(2))
    downs = cold(matrix(ggml.Q4_0, HIDDEN, 2 * INNER))
    x = as_multiplied(normal(tokens, HIDDEN), ggml.Q4_0)
    out, activation = np.full((tokens, HIDDEN), np.nan, np.float32), cpu.quant.Activation(x)
    activation.panels(ggml.Q4_0)

    def run():
        cpu.moe.ffn(activation, next(gates), next(ups), next(downs), out)

    def checks():
        expected, seen = np.empty((1, HIDDEN), np.float32), reference.quant.Activation(x[-1:])
        yield out[-1:], reference.moe.ffn(seen, next(gates), next(ups), next(downs), expected)

    macs = 3 * tokens * HIDDEN * 2 * INNER
    measure(run, checks, macs=macs, nbytes=macs * 18 / 32 if tokens == 1 else 0, streamed=tokens == 1, **INT8)
