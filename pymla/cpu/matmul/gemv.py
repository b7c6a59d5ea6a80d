"""Products of rows of weights with the activations of one token or of a few (gemv), for every type.

Rows of quantised types go four at a time, so that activations are loaded once for them, and far apart, so that each of
the four is a stream that the processor recognises and prefetches.
"""

import functools

from pymla.cpu.formats import FORMATS
from pymla.cpu.machine.simd import store_f32
from pymla.cpu.matmul.activations import parts
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


@functools.cache
def dot_rows_of_tokens_for(qtype):
    """A function ``(row, stride, count, tokens, number, columns, out, apart)``: rows of weights times the activations
    of up to four tokens.

    - row, stride, count, columns : as for `dot_rows_for`.
    - tokens : the activations of four tokens, of which the first `number`, 1 to 4, count.
    - out, apart : the address of the first token's results, float32 (count,), and the bytes to the next token's.

    Three tokens cost as much as four. Two read rows twice, of which the second time is from a cache.
    """
    dot_rows, dot_tokens = dot_rows_for(qtype), FORMATS[qtype].dot_tokens

    @helper
    def one_by_one(row, stride, count, tokens, number, columns, out, apart):
        for j in range(number):
            dot_rows(row, stride, count, tokens[j], columns, out + j * apart)

    if dot_tokens is None:
        return one_by_one

    @helper
    def dot_rows_of_tokens(row, stride, count, tokens, number, columns, out, apart):
        if number < 3:
            one_by_one(row, stride, count, tokens, number, columns, out, apart)
            return
        second, third, fourth = out + apart, out + 2 * apart, out + (number - 1) * apart
        for i in range(count):
            a, b, c, d = dot_tokens(row + i * stride, tokens, columns)
            store_f32(out + 4 * i, a)
            store_f32(second + 4 * i, b)
            store_f32(third + 4 * i, c)
            store_f32(fourth + 4 * i, d)

    return dot_rows_of_tokens


@helper
def four_tokens(x, index, first, last):
    """The parts of an `activations.Input` of the tokens ``index[first]`` and the three behind it; those from `last` on
    repeat the one before."""
    end = last - 1
    a, b, c, d = index[first], index[min(first + 1, end)], index[min(first + 2, end)], index[min(first + 3, end)]
    return parts(x, a), parts(x, b), parts(x, c), parts(x, d)


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
