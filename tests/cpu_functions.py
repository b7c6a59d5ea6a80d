"""All functions of a type of tensors on the CPU (`pymla.cpu.formats.Format`) in one kernel.

The operations that call these functions are tested with a few types (`cases.REPRESENTATIVES`). This kernel calls each
function at one place, so that it takes a second to compile, and every type can be tested at every level of
instructions.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from pymla import ggml
from pymla.cpu.formats import FORMATS
from pymla.cpu.formats.panels import DECODED_ROW
from pymla.cpu.formats.rows import dequantise_row_for, write_row_for
from pymla.cpu.machine.simd import address, load_f32x32, store_f32x32
from pymla.cpu.machine.simd_panels import panel_codes8, panel_rows
from pymla.cpu.matmul.activations import INPUT, Activation, parts
from pymla.cpu.matmul.gemv import dot_rows_for, dot_rows_of_tokens_for
from pymla.cpu.memory import allocate
from pymla.cpu.runtime.array_types import F2, INT8_2, WEIGHTS_BYTES
from pymla.cpu.runtime.isa import LANES
from pymla.cpu.runtime.jit import kernel, variants
from pymla.tensor import QTensor

#: Scales and minima behind the last ones that `unpack` may write: those of four blocks at a time.
SPARE = 6


class Results(NamedTuple):
    """What the functions of a type make of a panel of rows (N, K), N up to `LANES`, of an activation (1, K), and of
    numbers (N, K)."""

    products: np.ndarray  # float32 (1, N), by `dot_four` or `dot_row`
    of_tokens: np.ndarray  # float32 (4, N), by `dot_tokens` where a type has it, with the activation for each token
    sums: np.ndarray  # float32 (N, K), to which `add_block` adds blocks of 32 weights
    codes: np.ndarray  # int8 (K // 4, 4 * LANES), by `unpack`
    scales: np.ndarray  # float32 (K // 16 + SPARE, LANES), by `unpack`
    minima: np.ndarray  # float32 (K // 16 + SPARE, LANES), by `unpack`
    weights: np.ndarray  # float32 (N, K), of float types, by `load_eight` and `load_one`
    written: np.ndarray  # uint8 (1, row bytes), of types of caches: the activation as a row

    @classmethod
    def unset(cls, qtype, sums):
        """Memory for results that are NaN or 85, but for sums to begin with."""
        rows, k = sums.shape

        def nan(*shape):
            return np.full(shape, np.nan, np.float32)

        return cls(
            nan(1, rows),
            nan(4, rows),
            sums.copy(),
            np.full((k // 4, 4 * LANES), 85, np.int8),
            nan(k // 16 + SPARE, LANES),
            nan(k // 16 + SPARE, LANES),
            nan(rows, k),
            np.full((1, ggml.row_bytes(qtype, k)), 85, np.uint8),
        )


RESULTS = types.NamedTuple((F2, F2, F2, INT8_2, F2, F2, F2, types.Array(types.uint8, 2, "C")), Results)


@variants
def functions(qtype):
    """A kernel that calls every function of a type once."""
    form = FORMATS[qtype]
    add_block, unpack, load_one, writes = form.add_block, form.unpack, form.load_one, writes_rows(qtype)
    dot_rows, dequantise_row, write_row = dot_rows_for(qtype), dequantise_row_for(qtype), write_row_for(qtype)
    dot_rows_of_tokens = dot_rows_of_tokens_for(qtype)

    @kernel(WEIGHTS_BYTES, INPUT, types.float64, types.int64, RESULTS)
    def functions(first, last, w, x, weight, start, out):
        """Rows times an activation; blocks times a weight plus sums; columns from `start` on as a panel."""
        rows, columns = out.sums.shape
        row, stride = address(w), w.shape[1]
        dot_rows(row, stride, rows, parts(x, 0), columns, address(out.products))
        four = parts(x, 0), parts(x, 0), parts(x, 0), parts(x, 0)
        dot_rows_of_tokens(row, stride, rows, four, 4, columns, address(out.of_tokens), 4 * rows)
        for i in range(rows):
            for block in range(columns // 32):
                at = address(out.sums[i]) + 128 * block
                store_f32x32(at, add_block(row + i * stride, block, np.float32(weight), load_f32x32(at)))
        if unpack is not None:
            panel = address(out.codes), address(out.scales), address(out.minima)
            blocks = (columns - start) // 32
            scratch = allocate(LANES * DECODED_ROW)
            rows_of_panel = panel_rows(row, stride, rows)
            unpack(rows_of_panel, start // 32, blocks, panel[0], panel[1], panel[2], address(scratch))
        if load_one is not None:
            for i in range(rows):
                dequantise_row(row + i * stride, address(out.weights[i]), columns)
        if writes:
            write_row(address(x.x), address(out.written), columns)

    return functions


def assembly(qtype: int) -> str:
    """The machine code of all functions of a type as text."""
    return functions(qtype).compiled.result._library.get_asm_str()


def writes_rows(qtype):
    """Whether a cache may have rows of this type."""
    return FORMATS[qtype].write_block is not None or FORMATS[qtype].store_one is not None


def call(w: QTensor, x: np.ndarray, weight: float, start: int, sums: np.ndarray) -> Results:
    """All functions of the type of `w` with rows (N, K), an activation (1, K) and sums (N, K) to begin with."""
    out = Results.unset(w.qtype, sums)
    functions(w.qtype)(0, 1, w.data, Activation(x).rows(w.qtype), weight, start, out)
    return out


def panel_weights(qtype: int, results: Results, start: int) -> np.ndarray:
    """The weights (N, K - start) that a panel stands for, float64, as products by panels take them."""
    form, (rows, k) = FORMATS[qtype], results.sums.shape
    codes = results.codes.reshape(-1, LANES, 4).transpose(1, 0, 2).reshape(LANES, -1)
    codes = codes[:rows, : k - start]
    if form.scale_each == 16:
        codes = panel_codes8(np.ascontiguousarray(codes)).astype(int)
    else:
        codes = codes.astype(int) if form.takes_tiles else codes.view(np.uint8).astype(int) - form.zero_point
        assert 0 <= codes.min() + form.zero_point <= codes.max() + form.zero_point < 1 << form.code_bits
    scales = results.scales[: (k - start) // form.scale_each, :rows].T.repeat(form.scale_each, axis=1)
    weights = scales.astype(np.float64) * codes
    if form.minimum_each:
        minima = results.minima[: (k - start) // form.minimum_each, :rows]
        weights += minima.T.repeat(form.minimum_each, axis=1)
    return weights
