"""Kernels as objects that a person looks at, calls and copies."""

import inspect
import pydoc

import numpy as np
import pytest
from numba import types

from pymla import ggml
from pymla.cpu import norm, quant
from pymla.cpu.attention import absorbed_form_int8
from pymla.cpu.cache_types import Q8_PAGES
from pymla.cpu.machine.simd import add, address, load_f32x8, splat_f32, store_f32x8
from pymla.cpu.matmul import kernels as products
from pymla.cpu.matmul.activations import counting
from pymla.cpu.matmul.matrices import Matrices
from pymla.cpu.moe import grouped
from pymla.cpu.runtime import compiling
from pymla.cpu.runtime.jit import Kernel, helper, kernel
from pymla.tensor import QTensor

F1 = types.Array(types.float32, 1, "C")
F2 = types.Array(types.float32, 2, "A")


@helper
def eight_more(at, value):
    """Add a number to eight float32 at an address."""
    store_f32x8(at, add(load_f32x8(at), splat_f32(value)))


@kernel(F1, types.float64)
def add_number(first, last, x, value):
    """Add a number to eights of `x`."""
    for i in range(first, last):
        eight_more(address(x) + 32 * i, np.float32(value))


@kernel(F2, types.UniTuple(types.int64, 2))
def undescribed(first, last, x, pair):
    x[first, 0] = pair[1]


def test_ways_to_run_a_kernel():
    x = np.zeros(32, np.float32)
    add_number[4](x, 1)
    add_number(0, 2, x, 2)
    add_number.py_func(2, 4, x, 3)
    eight_more(address(x), 4)
    assert x.reshape(4, 8).T[0].tolist() == [7, 3, 4, 4]
    with pytest.raises(TypeError, match="argument 0 of kernel add_number: expected array"):
        add_number(0, 1, x.astype(np.float64), 1)


def test_kernels_say_what_they_are():
    assert repr(add_number) == "<kernel test_jit.add_number(first: int, last: int, x: float32 (n,), value: float)>"
    assert "add_number(first: int" in pydoc.plain(pydoc.render_doc(add_number))
    assert "Add a number to eights of `x`." in pydoc.plain(pydoc.render_doc(add_number))
    assert str(inspect.signature(undescribed).parameters["x"]) == "x: float32 (n, m) with any strides"
    assert str(inspect.signature(undescribed).parameters["pair"]) == "pair: tuple of 2"
    assert "def add_number(first, last, x, value):" in inspect.getsource(add_number)
    assert repr(eight_more) == "<helper test_jit.eight_more(at, value)>"
    assert repr(add) == "<operation pymla.cpu.machine.simd_floats.add(x, y)>"
    assert "``x + y``" in pydoc.plain(pydoc.render_doc(add))


def test_kernels_of_the_package_say_what_they_are():
    attend = absorbed_form_int8.absorbed_pages(Q8_PAGES)
    kernels = [products.matmul_rows(ggml.Q4_0), grouped.gate_up_panels(ggml.Q6_K), attend]
    assert repr(kernels[0]).startswith(
        "<kernel pymla.cpu.matmul.kernels.matmul_rows[Q4_0](first: int, last: int, w: pymla.cpu.m"
    )
    for each in kernels:
        assert isinstance(each, Kernel)
        assert len(each.__doc__) > 20
        assert inspect.signature(each).parameters["first"].annotation is int
        assert inspect.isfunction(each.py_func)


def test_a_kernel_of_a_factory_is_called():
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((5, 64), dtype=np.float32), rng.standard_normal((2, 64), dtype=np.float32)
    matrices, out = Matrices.of(QTensor(ggml.F32, w.view(np.uint8))), np.zeros((3, 2, 5), np.float32)
    inputs, multiply = quant.Activation(x).rows(ggml.F32), products.matmul_rows(ggml.F32)
    multiply(0, 5, matrices, inputs, counting(2), out[0])
    multiply.py_func(0, 5, matrices, inputs, counting(2), out[1])
    multiply[5](matrices, inputs, counting(2), out[2])
    assert out[0].tobytes() == out[1].tobytes() == out[2].tobytes()
    np.testing.assert_allclose(out[0], x @ w.T, rtol=1e-4)


def test_source_of_a_kernel_can_be_copied(monkeypatch):
    monkeypatch.setattr(compiling, "COMPILED", [])
    copy = kernel(*norm._add.signature)(norm._add.py_func)
    x, y = np.ones((2, 1, 4), np.float32)
    copy[1](x, y)
    assert x[0, 0] == 2
    assert copy.compiled in compiling.COMPILED


def test_a_signature_must_fit_its_function():
    with pytest.raises(TypeError, match="kernel few takes 3 arguments, and its signature has 4"):

        @kernel(F1, F1)
        def few(first, last, x):
            pass
