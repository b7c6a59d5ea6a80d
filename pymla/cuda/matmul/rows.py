"""Rows: products of a few rows of a quantised matrix with a few activations, by a warp.

`gemv` multiplies whole matrices with them, `pymla.cuda.moe.by_rows` rows of the chosen experts. A row is read once, in
pieces of 16 bytes that go straight to shared memory (`pymla.cuda.formats.runs.copying`): bytes on their way need no
registers. There, each lane takes a block of 32 weights of every row, 1024 columns at a time, and multiplies it on
integers with each activation.

A warp has two parts of its rows on their way from the beginning, which is all of 2048 columns. In q4_0 that is 4.6 KB
for four rows; 40 to 60 KB for a multiprocessor keep the memory of an H100 or H200 busy. Where a warp sums products of
single rows (`row_sums`), it has `AHEAD` parts on their way, across rows.
"""

import functools

import numpy as np
from numba import cuda

from pymla import ggml
from pymla.cuda.formats import FORMATS
from pymla.cuda.formats.runs import Run, copying
from pymla.cuda.machine.ptx import (
    WARP,
    cp_async_commit,
    cp_async_wait,
    fma,
    kept,
    lane,
    load_f32x2,
    load_u32x4,
    shared_address,
    syncwarp,
)
from pymla.cuda.matmul.operands import THREADS
from pymla.cuda.runtime.jit import device, unrolled

#: Parts of rows that `row_sums` has on their way, a power of two: as much as two parts of four rows.
AHEAD = 8

_LATEST = AHEAD - 1

_ZERO = np.float32(0)


@device
def load_activation(number, i, fixed):
    """A block of 32 activations of row `number`: words of codes, then scale and sum. `fixed`: the `Input` and the
    block."""
    x, at = fixed
    codes, scales = x.codes + x.columns * number + 32 * at, x.scales + 8 * ((x.columns >> 5) * number + at)
    return load_u32x4(codes) + load_u32x4(codes + 16), load_f32x2(scales)


@functools.cache
def row_products(qtype, rows, tokens):
    """A device function (addresses, numbers, input) for all lanes of a warp, in a block of `THREADS` at most.

    It multiplies `rows` rows at `addresses` with `tokens` activations, which are rows `numbers` of a `quant.Input`. It
    returns a tuple for each row with a sum for each activation: the lane's part of the product.
    """
    block, dot, header = FORMATS[qtype].block, FORMATS[qtype].dot, ggml.ROW_HEADER[qtype]
    run = Run.of(qtype, WARP)
    copy_pieces = copying(run, WARP)
    row_bytes = 16 * run.pieces
    part_bytes = rows * row_bytes
    shared_bytes = THREADS // WARP * 2 * part_bytes
    no_sums = ((_ZERO,) * tokens,) * rows

    @device
    def keep(address, i, fixed):
        return kept(address + header)

    @device
    def copy_row(address, i, fixed):
        to, begin, nbytes = fixed
        copy_pieces(to + row_bytes * i, address + begin, nbytes, lane())
        return 0

    @device
    def add_activation(sum, i, fixed):
        weights, activations = fixed
        codes, (scale, total) = activations[i]
        return dot(weights, codes, scale, total, sum)

    add_activations = unrolled(add_activation, tokens)

    @device
    def add_row(sums, i, fixed):
        at, begin, addresses, activations = fixed
        weights = block(at + row_bytes * i + (addresses[i] + begin & 15), lane())
        return add_activations(0, sums, (weights, activations))

    keep_all, copy_rows, add_rows = (unrolled(each, rows) for each in (keep, copy_row, add_row))
    load_activations = unrolled(load_activation, tokens)
    scale_rows = _scaling(qtype, rows, tokens)

    @device
    def products(addresses, numbers, x):
        base = shared_address(cuda.shared.array(shared_bytes, np.uint8, alignment=16))
        base += 2 * part_bytes * (cuda.threadIdx.x // WARP)
        addresses, blocks = keep_all(0, addresses, 0), x.columns >> 5
        nbytes, parts, sums = run.nbytes * blocks // run.blocks, blocks + WARP - 1 >> 5, no_sums
        for part in range(-2, parts):
            at = base + part_bytes * (part & 1)
            if part >= 0:
                mine = WARP * part + lane()
                activations = load_activations(0, numbers, (x, min(mine, blocks - 1)))
                cp_async_wait(1)
                syncwarp()
                if mine < blocks:
                    sums = add_rows(0, sums, (at, run.nbytes * part, addresses, activations))
            # All lanes have read the bytes that the next copy overwrites.
            syncwarp()
            if part + 2 < parts:
                begin = run.nbytes * (part + 2)
                copy_rows(0, addresses, (at, begin, min(run.nbytes, nbytes - begin)))
            cp_async_commit()
        return scale_rows(0, sums, addresses)

    return products


def _scaling(qtype, rows, tokens):
    """A device function (0, sums, addresses): `tokens` sums for each of `rows` rows, times the scale in the row's
    header, where rows of the type have one. `addresses` are those behind the headers."""
    row_scale, header = FORMATS[qtype].row_scale, ggml.ROW_HEADER[qtype]
    if row_scale is None:

        @device
        def as_they_are(_, sums, addresses):
            return sums

        return as_they_are

    @device
    def scale_sum(sum, i, scale):
        return scale * sum

    scale_sums = unrolled(scale_sum, tokens)

    @device
    def scale_row(sums, i, addresses):
        return scale_sums(0, sums, row_scale(addresses[i] - header))

    return unrolled(scale_row, rows)


@functools.cache
def row_sums(qtype, choose):
    """A device function (count, input, fixed) for all lanes of a warp, in a block of `THREADS` at most.

    It returns the lane's part of the sum of `count` products of a row and an activation, each with a weight: ``address,
    number, weight = choose(i, fixed)``, of a device function, are those of product i.
    """
    block, dot = FORMATS[qtype].block, FORMATS[qtype].dot
    run = Run.of(qtype, WARP)
    copy_pieces = copying(run, WARP)
    part_bytes = 16 * run.pieces
    shared_bytes = THREADS // WARP * AHEAD * part_bytes

    choose = _behind_headers(qtype, choose)

    @device
    def total(count, x, fixed):
        base = shared_address(cuda.shared.array(shared_bytes, np.uint8, alignment=16))
        base += AHEAD * part_bytes * (cuda.threadIdx.x // WARP)
        blocks, sum = x.columns >> 5, _ZERO
        nbytes, parts = run.nbytes * blocks // run.blocks, blocks + WARP - 1 >> 5
        # The product and the part of it that are computed next, and that are copied next.
        i = part = coming = coming_part = 0
        for step in range(-AHEAD, count * parts):
            at = base + part_bytes * (step & _LATEST)
            if step >= 0:
                address, number, weight = choose(i, fixed)
                mine = WARP * part + lane()
                codes, (scale, whole) = load_activation(number, 0, (x, min(mine, blocks - 1)))
                cp_async_wait(_LATEST)
                syncwarp()
                if mine < blocks:
                    weights = block(at + (address + run.nbytes * part & 15), lane())
                    sum = fma(weight, dot(weights, codes, scale, whole, _ZERO), sum)
                part += 1
                if part == parts:
                    i, part = i + 1, 0
            # All lanes have read the bytes that the next copy overwrites.
            syncwarp()
            if coming < count:
                begin = run.nbytes * coming_part
                copy_pieces(at, choose(coming, fixed)[0] + begin, min(run.nbytes, nbytes - begin), lane())
                coming_part += 1
                if coming_part == parts:
                    coming, coming_part = coming + 1, 0
            cp_async_commit()
        return sum

    return total


def _behind_headers(qtype, choose):
    """`choose` of `row_sums` with the addresses behind the headers of rows, whose scales are in the weights."""
    row_scale, header = FORMATS[qtype].row_scale, ggml.ROW_HEADER[qtype]
    if row_scale is None:
        return choose

    @device
    def behind(i, fixed):
        address, number, weight = choose(i, fixed)
        return address + header, number, weight * row_scale(address)

    return behind
