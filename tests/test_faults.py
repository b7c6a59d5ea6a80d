"""A fault in the input shows in what is computed from it: NaN and infinity never become a number."""

import numpy as np
import pytest
from cases import QUANTISED_REPRESENTATIVES, random_qtensor

from pymla import cpu, ggml


def faulty(tokens, columns, fault):
    x = np.random.default_rng(0).standard_normal((tokens, columns), dtype=np.float32)
    x[tokens // 2, 37] = fault
    return x


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("qtype", QUANTISED_REPRESENTATIVES, ids=ggml.NAME.get)
def test_products(qtype, tokens, fault):
    w = random_qtensor(qtype, 50, 256)
    out = cpu.quant.matmul(w, cpu.quant.Activation(faulty(tokens, 256, fault)), np.zeros((tokens, 50), np.float32))
    assert np.isnan(out[tokens // 2]).all()
    assert np.isfinite(np.delete(out, tokens // 2, axis=0)).all()


@pytest.mark.parametrize("tokens", [1, 40])
def test_experts(tokens):
    gate, up, down = (random_qtensor(ggml.Q4_0, *shape) for shape in ((4 * 64, 256), (4 * 64, 256), (4 * 256, 64)))
    gate, up, down = (type(w)(w.qtype, w.data.reshape(4, -1, w.data.shape[1])) for w in (gate, up, down))
    ids = np.tile(np.array([1, 3], np.int32), (tokens, 1))
    weights, out = np.full(ids.shape, 0.5, np.float32), np.zeros((tokens, 256), np.float32)
    cpu.moe.experts(cpu.quant.Activation(faulty(tokens, 256, np.nan)), ids, weights, gate, up, down, out)
    assert np.isnan(out[tokens // 2]).all()
    assert np.isfinite(np.delete(out, tokens // 2, axis=0)).all()


def test_decoding_over_a_faulty_row():
    rng = np.random.default_rng(0)
    config = {"heads": 2, "rank": 64, "rope": 32}
    from pymla.pages import Step

    cache = cpu.attention.latent_cache([(ggml.Q8_0, config["rank"]), (ggml.F16, config["rope"])], 128)
    for rows, width in zip(cache, (config["rank"], config["rope"]), strict=True):
        values = rng.standard_normal((128, width), dtype=np.float32)
        if width == config["rank"]:
            values[70, :32] = np.nan
        cpu.attention.store(values, np.arange(128, dtype=np.int32), rows)
    q = rng.standard_normal((2, config["heads"], config["rank"] + config["rope"]), dtype=np.float32)
    positions = np.array([69, 70], np.int32)
    zeros = np.zeros(2, np.int32)
    step = Step(zeros, positions, zeros, positions, np.array([[0, 1]], np.int32))
    out = cpu.attention.absorbed(q, *cache, step, 0.1, np.zeros((2, config["heads"], config["rank"]), np.float32))
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()
