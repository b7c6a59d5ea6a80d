"""The backends that tests of operations run over.

Under ``python -m pytest`` these are the reference, in float64, and the CPU's kernels. `test_cuda_simulator.py` runs the
same files once more in the CUDA simulator, where it is the GPU's kernels: whether these are simulated is decided once
per process, and the simulator wants small sizes.
"""

import os

import numpy as np
import pytest
from cases import as_multiplied, on_cpu, panel_codes
from definitions import cached
from operations import on

from pymla import cpu, ggml, reference
from pymla.reference.quant import quantise_activations

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"

#: Of the reference, which computes in float64: a step in a narrower type shows.
FLOAT64 = {"rtol_max": 64 * np.finfo(np.float64).eps, "reason": "float64"}


class Tested:
    """A backend, with what takes arrays to its memory and back. `quant`, `norm`, `rope`, `moe`, `attention` and
    `memory` are its modules."""

    #: Of its float arrays.
    dtype = np.float32
    #: Whether products with quantised matrices round their input to int8.
    rounds = True

    def __init__(self, backend):
        self.backend, self.name = backend, backend.NAME

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def tolerance(self, **by_name):
        """What `assert_close` takes, by the backend's name."""
        return by_name[self.name]

    def normal(self, *shape, seed=0):
        """Random numbers in the host's memory."""
        return np.random.default_rng(seed).standard_normal(shape, dtype=self.dtype)

    def seen(self, x, qtype):
        """The input (T, K) as products with a type see it."""
        return as_multiplied(x, qtype) if self.rounds else x

    def put(self, value):
        """An array, a QTensor or a Step in the backend's memory."""
        return on(self.backend, value)

    def unset(self, *shape):
        """An array of NaN in the backend's memory."""
        return self.put(np.full(shape, np.nan, self.dtype))

    def result(self, operation, *arguments, shape):
        """What an operation writes into its last argument."""
        return self.memory.to_host(operation(*map(self.put, arguments), self.unset(*shape)))

    def result_in_part(self, operation, *arguments, shape):
        """The same where that argument is some heads of some tokens of a larger array, whose rest stays as it is."""
        tokens, heads, size = shape
        whole = self.unset(tokens + 2, heads + 3, size)
        operation(*map(self.put, arguments), whole[1:-1, 2:-1])
        result = np.array(self.memory.to_host(whole))
        part = result[1:-1, 2:-1].copy()
        result[1:-1, 2:-1] = np.nan
        assert np.isnan(result).all()
        return part

    def activation(self, x):
        return self.quant.Activation(self.put(x))

    def latent(self, layout, blocks):
        """A latent cache that holds the rows of ggml blocks."""
        return [self.put(each) for each in blocks]

    def index(self, blocks):
        """A cache of an indexer's keys that holds the rows of ggml blocks; rows that are not numbers stay NaN."""
        target = self.attention.index_cache(
            blocks.qtype, ggml.columns(blocks.qtype, blocks.data.shape[1]), len(blocks.data)
        )
        nothing = np.full(target.data.shape, 0xFF, np.uint8)
        self.memory.write(target.data, nothing)
        with np.errstate(invalid="ignore"):
            rows = cached(blocks).astype(self.dtype)
        slots = np.flatnonzero(np.isfinite(rows).all(1)).astype(np.int32)
        self.attention.store(self.put(rows[slots]), self.put(slots), target)
        return target


class Reference(Tested):
    dtype, rounds = np.float64, False

    def tolerance(self, **by_name):
        return FLOAT64


class Cpu(Tested):
    def latent(self, layout, blocks):
        return on_cpu(layout, blocks)

    def quantised(self, activation, qtype):
        """Codes (T, K), scales and sums of codes * scale (T, K // 32) of an Activation, for products with a type."""
        made = activation.panels(qtype)
        return panel_codes(made), made.scale, made.sums


class Cuda(Tested):
    def quantised(self, activation, qtype):
        activation.input(qtype)
        scales = self.memory.to_host(activation.scales)
        return self.memory.to_host(activation.codes), scales[..., 0], scales[..., 1]


def _backends():
    if not SIMULATED:
        return Reference(reference), Cpu(cpu)
    import simulated  # noqa: F401 - skips the file where numba-cuda is missing

    from pymla.cuda import backend

    return (Cuda(backend),)


BACKENDS = _backends()


#: Gives all tests of a file the argument `backend`: ``pytestmark = each_backend``.
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)


def assert_quantised(backend, activation, qtype, x):
    """An Activation holds x (T, K) as the reference rounds it."""
    codes, scale, sums = backend.quantised(activation, qtype)
    expected_codes, expected_scale = quantise_activations(x)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scale, expected_scale)
    expected_sums = expected_codes.reshape(*scale.shape, 32).sum(-1, dtype=int) * expected_scale
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-6)
