"""Products of weights with activations."""

from itertools import cycle

import numpy as np
import pytest
from cases import as_multiplied, panel_codes
from shapes import HIDDEN, MATRICES, copies, matrix, normal

from pymla import cpu, ggml, reference
from pymla.cpu.graph import Graph

INT8 = {"rtol_max": 1e-5, "reason": "the reference multiplies the same int8 activations, in float64"}
EXACT = {"rtol_max": 1e-6, "reason": "rounding of the scale"}

#: Tokens of a prompt that an expert sees of 512, and a whole slice.
PROMPT = (48, 512)


def product(measure, qtype, shape, tokens):
    w, x, out = matrix(qtype, *shape), normal(tokens, shape[1]), np.full((tokens, shape[0]), np.nan, np.float32)
    activation = cpu.quant.Activation(x)
    activation.panels(qtype)
    few = tokens <= 16
    # Launches are replayed, as in a step of a model, and not prepared by Python every time.
    weights = copies(w) if few else [w]
    turn = cycle([Graph(lambda w=each: cpu.quant.matmul(w, activation, out)) for each in weights])

    def run():
        next(turn).replay()

    def checks():
        # Some tokens and the last rows, which end in the middle of a panel.
        seen = as_multiplied(x[-3:], qtype).astype(np.float64)
        rows = w.rows(shape[0] - 50, shape[0])
        yield out[-3:, -50:], reference.quant.matmul(rows, reference.quant.Activation(seen), np.empty((len(seen), 50)))

    macs, nbytes = tokens * shape[0] * shape[1], w.data.nbytes if few else 0
    measure(run, checks, macs=macs, nbytes=nbytes, streamed=few, **INT8)


@pytest.mark.parametrize("qtype", ggml.SUPPORTED, ids=ggml.NAME.get)
def bench_matvec(measure, qtype):
    product(measure, qtype, (8192, HIDDEN), 1)


@pytest.mark.parametrize("name", MATRICES)
def bench_matvec_q4_0(measure, name):
    product(measure, ggml.Q4_0, MATRICES[name], 1)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 8, 12, 16])
def bench_few_tokens_q4_0(measure, tokens):
    product(measure, ggml.Q4_0, MATRICES["query"], tokens)


@pytest.mark.parametrize("tokens", PROMPT)
@pytest.mark.parametrize("qtype", ggml.SUPPORTED, ids=ggml.NAME.get)
def bench_matmul(measure, qtype, tokens):
    product(measure, qtype, (HIDDEN, HIDDEN), tokens)


@pytest.mark.parametrize("name", [name for name in MATRICES if name != "output"])
def bench_matmul_q4_0(measure, name):
    product(measure, ggml.Q4_0, MATRICES[name], 512)


@pytest.mark.parametrize("tokens", [1, 512])
def bench_quantise_activations(measure, tokens):
    x, found = normal(tokens, HIDDEN), []

    def run():
        made = cpu.quant.Activation(x).panels(ggml.Q4_0)
        found[:] = panel_codes(made), made.scale

    def checks():
        return zip(found, reference.quant.quantise_activations(x), strict=True)

    measure(run, checks, nbytes=x.nbytes, **EXACT)
