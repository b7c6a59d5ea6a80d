"""Products of weights with activations."""

import pytest
from cases import panel_codes
from products import INT8, Product
from shapes import HIDDEN, MATRICES, normal

from pymla import cpu, ggml, reference

EXACT = {"rtol_max": 1e-6, "reason": "rounding of the scale"}

#: Tokens of a prompt that an expert sees of 512, and a whole slice.
PROMPT = (48, 512)


def product(measure, qtype, shape, tokens):
    made = Product(qtype, shape, tokens)
    measure(made.run, made.checks, macs=made.macs, nbytes=made.nbytes, streamed=made.streamed, **INT8)


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
