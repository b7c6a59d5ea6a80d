"""Products of rows of weights with the activations of one token (gemv), for every type.

Rows of quantised types go four at a time, so that activations are loaded once for them, and far apart, so that each of
the four is a stream that the processor recognises and prefetches.
"""

import functools

from pymla.cpu.formats import FORMATS
from pymla.cpu.machine.simd import store_f32
from pymla.cpu.runtime.compiling import helper


@functools.cache
def dot_rows_for(qtype):
    """A function ``(row, stride, count, activations, columns, out)``: rows of weights times one activation vector.

    - row, stride, count : the address of the first row, the bytes from row to row, and their number.
    - activations : addresses of the parts of an `activations.Input` (`activations.parts`) in the type's order. Float
      types read the first, quantised types the others.
    - columns : their number.
    - out : address for float32 (count,).
    """
    dot_row, dot_four = FORMATS[qtype].dot_row, FORMATS[qtype].dot_four
    if dot_four is None:

        @helper
        def dot_rows(row, stride, count, activations, columns, out):
            for i in range(count):
                store_f32(out + 4 * i, dot_row(row + i * stride, activations[0], columns))

    else:

        @helper
        def dot_rows(row, stride, count, activations, columns, out):
            apart = (count + 3) // 4
            for i in range(apart):
                rows = _four(row, stride, i, apart, count)
                _store(out, i, apart, count, dot_four(rows, activations, columns))

    return dot_rows


@helper
def _four(row, stride, i, apart, count):
    """Addresses of the rows i, i + apart, i + 2 * apart and i + 3 * apart; rows past the end repeat the last row."""
    last = count - 1
    second, third, fourth = min(i + apart, last), min(i + 2 * apart, last), min(i + 3 * apart, last)
    return row + i * stride, row + second * stride, row + third * stride, row + fourth * stride


@helper
def _store(out, i, apart, count, results):
    """Store the results of four such rows."""
    last = count - 1
    first, second, third, fourth = results
    store_f32(out + 4 * i, first)
    store_f32(out + 4 * min(i + apart, last), second)
    store_f32(out + 4 * min(i + 2 * apart, last), third)
    store_f32(out + 4 * min(i + 3 * apart, last), fourth)
