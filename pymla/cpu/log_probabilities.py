"""Log-probabilities of rows of logits: their sums, their records in files, and divergences. Twin of
`pymla.reference.log_probabilities`, for logits in the host's memory, whichever backend computed them.

A row is as long as the vocabulary, 640 KiB with 163,840 tokens, and is read two or three times. Every kernel goes
through it in blocks: terms are summed in float32 within a block, and the sums of blocks in float64, so that a sum of
100,000 terms is about as exact as its terms.

>>> import numpy as np
>>> from pymla.cpu import log_probabilities
>>> log_probabilities.log_sum_exp(np.zeros((1, 100_000), np.float32), np.empty(1)).round(4)
array([11.5129])
"""

from collections.abc import Callable

import numpy as np
from numba import types

from pymla.argument_checks import Abilities, Call
from pymla.cpu.machine.simd import (
    add,
    address,
    exp,
    fma,
    larger,
    largest,
    load_f32,
    load_f32xL,
    load_u16xL,
    mul,
    round_even,
    splat_f32xL,
    store_as_u16xL,
    store_f32,
    sub,
    total,
    where_positive,
)
from pymla.cpu.runtime.array_types import D1, F2, I1
from pymla.cpu.runtime.compiling import compile_all
from pymla.cpu.runtime.isa import LANES
from pymla.cpu.runtime.jit import helper, kernel
from pymla.files.kl_base import LEAST_SCALE, RANGE, record_words

#: Columns of a block; `LANES` divides it.
BLOCK = 1024
#: Codes of a record begin behind so many uint16.
_HEAD = 4

_RECORDS = types.Array(types.uint16, 2, "C")
_READ_RECORDS = types.Array(types.uint16, 2, "C", readonly=True)

_FLOAT32, _FLOAT64 = (np.dtype(np.float32),), (np.dtype(np.float64),)
_ABILITIES = Abilities(_FLOAT32, _FLOAT32, contiguous=True, known=lambda: True, pages={})


def log_sum_exp(logits: np.ndarray, out: np.ndarray) -> np.ndarray:
    """``out[t] = ln Σ_i exp(logits[t, i])``; `logits` float32 (T, V), `out` float64 (T,)."""
    _check("log_sum_exp", logits, out=out)
    _log_sum_exp[len(logits), 1](logits, out)
    return out


def encode(logits: np.ndarray, log_sums: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Rows of logits, float32 (T, V), as records, uint16 (T, ``record_words(V)``); `log_sums` float64 (T,) from
    `log_sum_exp`."""
    _check("encode", logits, log_sums=log_sums, records=out)
    out[:, _HEAD + logits.shape[1] :] = 0
    _encode[len(logits), 1](logits, log_sums, out)
    return out


def divergence(
    logits: np.ndarray, log_sums: np.ndarray, records: np.ndarray, out: np.ndarray, same_top: np.ndarray
) -> np.ndarray:
    """The Kullback-Leibler divergence of rows of logits, float32 (T, V), from a base's records, uint16 (T,
    ``record_words(V)``), in nats, float64 (T,), and whether the likeliest token is the same, int32 (T,); `log_sums`
    float64 (T,) from `log_sum_exp`."""
    _check("divergence", logits, log_sums=log_sums, records=records, out=out, same_top=same_top)
    _divergence[len(logits), 1](logits, log_sums, records, out, same_top)
    return out


def compile_kernels(progress: Callable[[int, int, str], object], warn: Callable[[str], object]) -> None:
    """Have the kernels of this module ready; arguments as for `pymla.backend.Backend.compile_for`."""
    compile_all([each.compiled for each in (_log_sum_exp, _encode, _divergence)], progress, warn)


def _check(operation: str, logits: np.ndarray, records: np.ndarray | None = None, **numbers: np.ndarray) -> None:
    """Compare the arguments' shapes and dtypes."""
    call = Call(operation, _ABILITIES)
    call.array("logits", logits, _FLOAT32, (None, None), contiguous=True)
    if not logits.shape[1]:
        call.refuse("logits", f"an array {logits.shape}", "one column at least")
    if records is not None:
        shape = len(logits), record_words(logits.shape[1])
        call.array("records", records, (np.dtype(np.uint16),), shape, contiguous=True)
    for name, array in numbers.items():
        dtypes = (np.dtype(np.int32),) if name == "same_top" else _FLOAT64
        call.array(name, array, dtypes, (len(logits),), contiguous=True)


@kernel(F2, D1)
def _log_sum_exp(first, last, logits, out):
    columns = logits.shape[1]
    for t in range(first, last):
        most = _most(logits[t], np.float32(1), 0, columns)
        out[t] = np.float64(most) + np.log(_sum_exp(logits[t], most))


@helper
def _most(row, sign, start, stop):
    """The largest of ``sign * row[start:stop]``, float32; `LANES` divides `start`. NaN is passed over."""
    at, whole = address(row), stop // LANES * LANES
    signs, lanes = splat_f32xL(sign), splat_f32xL(np.float32(-np.inf))
    for i in range(start, whole, LANES):
        lanes = larger(mul(signs, load_f32xL(at + 4 * i)), lanes)
    most = largest(lanes)
    for i in range(max(start, whole), stop):
        if sign * row[i] > most:
            most = sign * row[i]
    return most


@helper
def _sum_exp(row, most):
    """The sum of ``exp(row - most)``."""
    at, columns = address(row), len(row)
    summed, offset = 0.0, splat_f32xL(most)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        whole, sums = stop // LANES * LANES, splat_f32xL(np.float32(0))
        for i in range(start, whole, LANES):
            sums = add(sums, exp(sub(load_f32xL(at + 4 * i), offset)))
        summed += np.float64(total(sums))
        for i in range(whole, stop):
            summed += np.exp(row[i] - most)
    return summed


@kernel(F2, D1, _RECORDS)
def _encode(first, last, logits, log_sums, records):
    columns = logits.shape[1]
    whole = columns // LANES * LANES
    for t in range(first, last):
        row = logits[t]
        most = _most(row, np.float32(1), 0, columns)
        least = max(-_most(row, np.float32(-1), 0, columns), most - np.float32(RANGE))
        scale = (most - least) / np.float32(65535)
        if scale < LEAST_SCALE:
            scale, inverse = np.float32(0), np.float32(0)
        else:
            inverse = np.float32(1) / scale
        head, source = address(records[t]), address(row)
        store_f32(head, scale)
        store_f32(head + 4, np.float32(np.float64(least) - log_sums[t]))
        lows, inverses = splat_f32xL(least), splat_f32xL(inverse)
        for i in range(0, whole, LANES):
            above = sub(larger(load_f32xL(source + 4 * i), lows), lows)
            store_as_u16xL(head + 2 * (_HEAD + i), round_even(mul(inverses, above)))
        for i in range(whole, columns):
            records[t, _HEAD + i] = np.uint16(np.rint(inverse * (max(row[i], least) - least)))


@kernel(F2, D1, _READ_RECORDS, D1, I1)
def _divergence(first, last, logits, log_sums, records, out, same_top):
    for t in range(first, last):
        out[t] = _row_divergence(logits[t], np.float32(log_sums[t]), records[t])
        same_top[t] = 1 if _top(logits[t]) == _top_code(records[t], logits.shape[1]) else 0


@helper
def _row_divergence(row, log_sum, record):
    """The divergence of a row of logits from a record."""
    source, head, columns = address(row), address(record), len(row)
    scale, low = load_f32(head), load_f32(head + 4)
    scales, lows, shift = splat_f32xL(scale), splat_f32xL(low), splat_f32xL(log_sum)
    summed, limit = 0.0, splat_f32xL(np.float32(RANGE))
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        whole, sums = stop // LANES * LANES, splat_f32xL(np.float32(0))
        for i in range(start, whole, LANES):
            base = fma(scales, load_u16xL(head + 2 * (_HEAD + i)), lows)
            gap = add(sub(base, load_f32xL(source + 4 * i)), shift)
            sums = add(sums, where_positive(add(base, limit), mul(exp(base), gap)))
        summed += np.float64(total(sums))
        for i in range(whole, stop):
            value = scale * np.float32(record[_HEAD + i]) + low
            if value > -RANGE:
                summed += np.exp(value) * (value - row[i] + log_sum)
    return summed


@helper
def _top(row):
    """The first column with the largest number of a row."""
    columns, best, at = len(row), np.float32(-np.inf), 0
    for start in range(0, columns, BLOCK):
        most = _most(row, np.float32(1), start, min(start + BLOCK, columns))
        if most > best:
            best, at = most, start
    while at < columns - 1 and row[at] != best:
        at += 1
    return at


@helper
def _top_code(record, columns):
    """The first column with the largest code of a record."""
    head, best, at = address(record) + 2 * _HEAD, np.float32(-1), 0
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        whole, lanes = stop // LANES * LANES, splat_f32xL(np.float32(-1))
        for i in range(start, whole, LANES):
            lanes = larger(load_u16xL(head + 2 * i), lanes)
        most = largest(lanes)
        for i in range(whole, stop):
            most = max(most, np.float32(record[_HEAD + i]))
        if most > best:
            best, at = most, start
    while at < columns - 1 and np.float32(record[_HEAD + at]) != best:
        at += 1
    return at
