"""Operations that are called with what does not fit: an error that names the argument, and never a crash, memory that
is not the caller's, or a silent result."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import calls, copied, floats, run, spoiled, tensor, unset

from pymla import backend as protocols
from pymla import cpu, ggml, reference
from pymla.errors import PymlaError
from pymla.tensor import QTensor

BACKENDS = [reference, cpu]
INDICES = {"tokens", "ids", "slots", "positions", "block_table", "step"}


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.NAME)
def backend(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def refused(operation, *words, **arguments):
    with pytest.raises(PymlaError) as caught:
        operation(**arguments)
    assert all(word in str(caught.value) for word in words), caught.value


# Calls that once crashed, wrote elsewhere or gave garbage -------------------------------------------------------------


def test_an_out_of_the_wrong_shape(backend, rng):
    w, x = tensor(rng, ggml.Q4_0, 64, 96), backend.quant.Activation(floats(rng, 5, 96))
    for shape in ((5, 63), (5, 65), (4, 64), (6, 64), (5, 64, 1), (320,)):
        refused(backend.quant.matmul, "matmul: out is float32", "(5, 64)", w=w, activation=x, out=unset(*shape))
    refused(backend.quant.matmul, "out is float16", w=w, activation=x, out=np.empty((5, 64), np.float16))
    refused(backend.quant.matmul, "out is a list", w=w, activation=x, out=[])


@pytest.mark.parametrize("token", [64, -1, 2**31 - 1, -(2**31)])
def test_a_token_past_the_table(backend, rng, token):
    w = tensor(rng, ggml.Q8_0, 64, 32)
    words = f"embedding_rows: tokens has {token}", "rows of w go from 0 to 63"
    tokens = np.array([1, token], np.int32)
    refused(backend.quant.embedding_rows, *words, w=w, tokens=tokens, scale=1.0, out=unset(2, 32))


@pytest.mark.parametrize("exact", [True, False])
def test_a_position_past_the_keys(backend, rng, exact):
    made = backend.attention.keys_values(10, 2, 32, 16, 32, exact)
    arguments = {"q": floats(rng, 1, 2, 48), "keys_values": made, "scale": 1.0, "out": unset(1, 2, 32)}
    for position in (10, 127, 10**6, -1):
        words = f"expanded: positions has {position}", "from 0 to 9"
        refused(backend.attention.expanded, *words, positions=np.array([position], np.int32), **arguments)


@pytest.mark.parametrize("tokens", [1, 9])
def test_an_expert_past_the_last(backend, rng, tokens):
    gate, up, down = (tensor(rng, ggml.Q4_0, 3, 32, 32) for _ in range(3))
    x = backend.quant.Activation(floats(rng, tokens, 32))
    for expert in (3, -1, 10**6):
        ids = np.full((tokens, 2), expert, np.int32)
        arguments = {"weights": floats(rng, tokens, 2), "gate": gate, "up": up, "down": down, "out": unset(tokens, 32)}
        words = f"experts: ids has {expert}", "from 0 to 2"
        refused(backend.moe.experts, *words, activation=x, ids=ids, **arguments)


def test_columns_that_do_not_agree(backend, rng):
    x, out = backend.quant.Activation(floats(rng, 2, 64)), unset(2, 32)
    refused(
        backend.quant.matmul,
        "w is Q4_0 with rows of 96 columns",
        w=tensor(rng, ggml.Q4_0, 32, 96),
        activation=x,
        out=out,
    )
    odd = backend.quant.Activation(floats(rng, 2, 40))
    words = "w is Q8_0, in blocks of 32", "divide 40 columns"
    refused(backend.quant.matmul, *words, w=tensor(rng, ggml.Q8_0, 32, 64), activation=odd, out=out)


def test_keys_and_queries_of_different_width(backend, rng):
    for exact in (True, False):
        made = backend.attention.keys_values(10, 2, 32, 16, 32, exact)
        positions = np.zeros(1, np.int32)
        arguments = {"keys_values": made, "positions": positions, "scale": 1.0, "out": unset(1, 2, 32)}
        refused(
            backend.attention.expanded, "q is float32 (1, 2, 64)", "(n, 2, 48)", q=floats(rng, 1, 2, 64), **arguments
        )


def test_rotated_numbers_that_have_no_place(rng):
    """The CPU's codes of keys keep the rotated numbers apart from the others."""
    made = cpu.attention.keys_values(10, 2, 32, 16, 32, False)
    k_b, v_b = tensor(rng, ggml.Q8_0, 2, 16, 32), tensor(rng, ggml.Q8_0, 2, 32, 32)
    arguments = {"c_kv": floats(rng, 10, 32), "k_pe": floats(rng, 10, 32), "k_b": k_b, "v_b": v_b, "out": made}
    refused(cpu.attention.expand, "expand: k_pe is of 32 numbers", "16, as `keys_values` was told", **arguments)


def test_a_norm_weight_of_the_wrong_length(backend, rng):
    for operation in (backend.norm.rms_norm, backend.norm.normed):
        for count in (63, 65, 32):
            words = f"weight is float32 ({count},)", "(64,)"
            refused(operation, *words, x=floats(rng, 2, 64), weight=floats(rng, count), eps=0.0, out=unset(2, 64))


@pytest.mark.parametrize("qtype", [ggml.ID["I8"], ggml.ID["I32"], 99, 12345])
def test_a_type_that_is_not_run(backend, rng, qtype):
    w = QTensor(qtype, np.zeros((32, 144), np.uint8))
    x = backend.quant.Activation(floats(rng, 2, 256))
    refused(backend.quant.matmul, "matmul: w is of type", "Q4_0", w=w, activation=x, out=unset(2, 32))


# All operations, with anything ----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_nothing_crashes(seed):
    """Every operation once as it should be, and once with a spoiled argument: refused by name, or still valid."""
    for backend in BACKENDS:
        rng = np.random.default_rng(seed)
        for operation, arguments in calls(rng, backend):
            run(backend, operation, {name: copied(value) for name, value in arguments.items()})
            name = list(arguments)[rng.integers(len(arguments))]
            changed = spoiled(rng, arguments[name])
            if changed is None:
                continue
            with np.errstate(invalid="ignore"), contextlib.suppress(PymlaError):
                run(backend, operation, arguments | {name: changed})


def test_every_operation_is_called():
    """So that `test_nothing_crashes` leaves none out."""
    called = {operation.__name__ for operation, _ in calls(np.random.default_rng(0), cpu)}
    listed = {
        name
        for protocol in (protocols.Quant, protocols.Norm, protocols.Rope, protocols.MoE, protocols.Attention)
        for name in vars(protocol)
        if not name.startswith("_")
    }
    # These take sizes and no arrays, but for an activation, which is made for every call with one.
    assert listed - called == {"Activation", "heads_at_once", "keys_values", "latent_cache"}


def test_indices_of_a_recorded_step_are_not_looked_at(rng):
    """They are written before each replay: what lies there while it is recorded means nothing."""
    w, tokens = tensor(rng, ggml.F32, 8, 32), np.array([10**6], np.int32)
    out = unset(1, 32)
    graph = cpu.Graph(lambda: cpu.quant.embedding_rows(w, tokens, 1.0, out))
    tokens[0] = 3
    graph.replay()
    np.testing.assert_array_equal(out[0], w.data.view(np.float32)[3])
