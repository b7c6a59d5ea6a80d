"""Tiles: products of 128 rows of a quantised matrix and 64 or 128 activations, on int8 tensor cores.

`quant` multiplies whole matrices with them, `moe` the rows of an expert with the tokens that chose it. What differs is
where rows and activations lie and where results go: every thread names a row and an activation, and stores what it gets
back through a function of the kernel's own.

A tile goes through its columns in slices of 64. Two slices are on their way to shared memory while one is multiplied,
as they lie in memory: the activations' codes and scales, and the pieces of 16 bytes around the rows' blocks
(`formats.copying`). When a slice has come, each thread unpacks a row of it to codes of a byte; then every warp
multiplies 32 or 64 rows with 64 activations.

What it costs, counted in the machine code of q4_0 for compute capability 9.0: in a slice of a wide tile a warp executes
64 ``mma`` of 16 × 8 × 32 among 920 instructions. 512 of these are multiply-adds for scales, two for each of a lane's
four results (`_times`), as every 32 columns have a scale in either factor; 48 are ``ldmatrix``, loads of scales and
fences, 70 unpack, 140 copy. A multiprocessor of an H100 issues 4 in a cycle, so that an ``mma`` takes 3.6 cycles where
the tensor cores would need one: 28 % of their dense rate, 530 TOP/s at 1.755 GHz, is the bound (the multiply-adds alone
allow 50 %). On an H200 245 TOP/s were measured, 20 % of its rate. Shared memory needs 2.7 cycles per ``mma``: 1.25 for
fragments and scales, 0.5 for what arrives and 0.9 to unpack. 31 KB are on their way for a block, of which a
multiprocessor holds two.
"""

import functools
from typing import NamedTuple

import numpy as np
from numba import cuda

from pymla.cuda.formats import FORMATS, Run, copying
from pymla.cuda.machine.ptx import (
    WARP,
    as_f32,
    as_word,
    cp_async_4,
    cp_async_16,
    cp_async_commit,
    cp_async_wait,
    fma,
    lane,
    ldmatrix_x4,
    load_shared_f32x4,
    load_shared_u64x2,
    mma_s8,
    mma_s8_k16,
    shared_address,
    store_shared_u32x2,
    store_shared_u32x4,
    store_shared_u64,
    syncwarp,
)
from pymla.cuda.runtime.jit import device, unrolled

__all__ = ["NARROW", "ROWS", "THREADS", "WIDE", "Tile", "tile_of"]

#: Rows of a tile, and threads of the block that multiplies it.
ROWS = THREADS = 128
#: Activations of a tile.
NARROW, WIDE = 64, 128
#: Slices in shared memory: one is multiplied, the others are on their way.
STAGES = 3
_UNDER_WAY = STAGES - 2
#: Bytes of 64 codes.
_SLICE = 64
#: A float32 whose last bits count ones: products on integers begin with its bits, and are floats that far above it.
_ONES, _ONES_BITS = np.float32(1.5 * 2**23), 0x4B400000
_MINUS_ONES = -_ONES
_ZEROS = (np.float32(0),) * 4


@device
def _swizzled(row, chunk):
    """Where 16 of a row's 64 codes lie: eight rows, or two chunks of four, that are accessed together are in different
    banks."""
    return _SLICE * row + 16 * (chunk ^ (row >> 1 & 3))


@device
def _times(d, minus, bits):
    """``d`` times the integer that was added to `_ONES_BITS`, rounded once; `minus` is ``d * _MINUS_ONES``. The integer
    is below 2 ** 20, and d has at most 22 significant bits, so that its product with `_ONES` is exact."""
    return fma(d, as_f32(bits), minus)


@device
def _place_of_activation(i):
    """Where the numbers of activation i lie: of 16, a lane finds its four together."""
    return (i & -16) + 4 * (i >> 1 & 3) + 2 * (i >> 3 & 1) + (i & 1)


@device
def _place_of_row(i):
    """Where the numbers of row i lie: a lane finds those of two rows that are 8 apart together."""
    return (i & -16) + 2 * (i & 7) + (i >> 3 & 1)


class Tile(NamedTuple):
    """What a kernel's factory takes for products of a type in tiles.

    The kernel is launched with `THREADS` threads and `shared_bytes` of dynamic shared memory.
    """

    #: (row, token, input) -> sums, by all threads of a block: with ``i`` the thread, `row` is the address of row i of
    #: the tile, and `token` the row of the `quant.Input` that is activation i (where i is below `activations`).
    #: Whatever a thread names is read: what is not there is named by something that is.
    product: object
    #: (function) -> device function (sums, more): calls ``function(upper, lower, row, activation, more)`` for every two
    #: of the thread's results: of an activation, and of a row and the one 8 rows further, by their numbers in the tile.
    storing: object
    activations: int
    shared_bytes: int


@functools.cache
def tile_of(qtype, activations):
    """Tiles of a type with `NARROW` or `WIDE` activations."""
    block, halves, minimum = FORMATS[qtype].block, FORMATS[qtype].halves, FORMATS[qtype].minimum
    # A type whose own blocks are longer than a slice is copied for several slices at once.
    run = Run.of(qtype, 2)
    slices_of_run, copy_pieces = run.blocks // 2, copying(run, 4)
    stages_of_runs = STAGES if slices_of_run == 1 else 2
    # An odd number of pieces between rows: reads of 32 rows meet a bank as rarely as can be.
    row_stride = 16 * (run.pieces | 1) if slices_of_run == 1 else 16 * run.pieces
    # A warp multiplies 16, 32, ... rows, its strips, with 64 activations.
    strips = 2 * activations // 64
    warps_along_rows = ROWS // (16 * strips)
    # Shared memory: stages of codes, sums and scales of activations, stages of rows' bytes, codes of a slice's rows and
    # their two numbers, and what threads have named.
    inputs = 0
    totals = inputs + STAGES * activations * _SLICE
    factors = totals + (STAGES * activations * 8 if minimum else 0)
    raw = factors + STAGES * activations * 8
    codes = raw + stages_of_runs * ROWS * row_stride
    numbers = codes + ROWS * _SLICE
    named_rows = numbers + ROWS * 16
    named_codes = named_rows + ROWS * 8
    named_scales = named_codes + activations * 8
    shared_bytes = named_scales + 64 * 16

    @device
    def stage_of_run(part, stage):
        """Where the bytes of slice `part` lie."""
        return raw + ROWS * row_stride * (stage if slices_of_run == 1 else part // slices_of_run & 1)

    @device
    def copy_factors(to, at, nbytes):
        """Begin to copy the scale of a block of an activation, and its sum if a type needs it."""
        cp_async_4(to + factors, at, nbytes)
        if minimum:
            cp_async_4(to + totals, at + 4, nbytes)

    @device
    def copy(base, x, part, stage):
        """Begin to copy slice `part`: four threads share a row or an activation, two an activation's scales."""
        thread, blocks = cuda.threadIdx.x, x.columns >> 5
        first, chunk = thread >> 2, thread & 3
        # What is behind the last block is 0.
        column = _SLICE * part + 16 * chunk
        nbytes = 16 if column < x.columns else 0
        to = base + inputs + _SLICE * activations * stage + _swizzled(first, chunk)
        for k in range(0, activations // 32, 2):
            one, other = load_shared_u64x2(base + named_codes + 8 * (activations // 32 * first + k))
            cp_async_16(to + 32 * _SLICE * k, one + column, nbytes)
            cp_async_16(to + 32 * _SLICE * (k + 1), other + column, nbytes)
        begin = run.nbytes * (part // slices_of_run)
        if part % slices_of_run == 0:
            nbytes = min(run.nbytes, blocks * run.nbytes // run.blocks - begin)
            to = base + stage_of_run(part, stage) + row_stride * first
            for k in range(0, ROWS // 32, 2):
                one, other = load_shared_u64x2(base + named_rows + 8 * (ROWS // 32 * first + k))
                copy_pieces(to + 32 * row_stride * k, one + begin, nbytes, chunk)
                copy_pieces(to + 32 * row_stride * (k + 1), other + begin, nbytes, chunk)
        block, first = thread & 1, thread >> 1
        number = 2 * part + block
        nbytes = 4 if number < blocks else 0
        to = base + 4 * (activations * (2 * stage + block) + _place_of_activation(first))
        one, other = load_shared_u64x2(base + named_scales + 16 * first)
        copy_factors(to, one + 8 * number, nbytes)
        if activations > 64:
            copy_factors(to + 256, other + 8 * number, nbytes)

    @device
    def unpack(base, row, blocks, part, stage):
        """Codes and numbers of the thread's row in slice `part`."""
        thread, first = cuda.threadIdx.x, part // slices_of_run * run.blocks
        at = base + stage_of_run(part, stage) + row_stride * thread + (row + run.nbytes * (part // slices_of_run) & 15)
        to, to_numbers = base + codes, base + numbers + 8 * _place_of_row(thread)
        for half in range(2):
            (c0, c1, c2, c3, c4, c5, c6, c7), d, other = block(at, min(2 * part + half, blocks - 1) - first)
            store_shared_u32x4(to + _swizzled(thread, 2 * half), c0, c1, c2, c3)
            store_shared_u32x4(to + _swizzled(thread, 2 * half + 1), c4, c5, c6, c7)
            second = other if halves or minimum else d * _MINUS_ONES
            store_shared_u32x2(to_numbers + 8 * ROWS * half, as_word(d), as_word(second))

    @device
    def load_strip(address, i, fixed):
        """A strip's fragment, and the numbers of two of its rows."""
        codes_at, numbers_at = fixed
        return ldmatrix_x4(codes_at + 16 * _SLICE * i), load_shared_f32x4(numbers_at + 128 * i)

    @device
    def add_strip(sums, i, fixed):
        """`sums` and 16 rows times 8 activations over 32 columns."""
        fragments, (b0, b1), (x0, x1), (total0, total1) = fixed
        (a0, a1, a2, a3), (d0, other0, d1, other1) = fragments[i]
        s0, s1, s2, s3 = sums
        if halves:
            c0, c1, c2, c3 = mma_s8_k16(a0, a1, b0, _ONES_BITS, _ONES_BITS, _ONES_BITS, _ONES_BITS)
            e0, e1, e2, e3 = mma_s8_k16(a2, a3, b1, _ONES_BITS, _ONES_BITS, _ONES_BITS, _ONES_BITS)
            m0, m1, n0, n1 = d0 * _MINUS_ONES, d1 * _MINUS_ONES, other0 * _MINUS_ONES, other1 * _MINUS_ONES
            return (
                fma(x0, _times(d0, m0, c0) + _times(other0, n0, e0), s0),
                fma(x1, _times(d0, m0, c1) + _times(other0, n0, e1), s1),
                fma(x0, _times(d1, m1, c2) + _times(other1, n1, e2), s2),
                fma(x1, _times(d1, m1, c3) + _times(other1, n1, e3), s3),
            )
        m0, m1 = other0, other1
        if minimum:
            m0, m1 = d0 * _MINUS_ONES, d1 * _MINUS_ONES
            s0, s1 = fma(other0, total0, s0), fma(other0, total1, s1)
            s2, s3 = fma(other1, total0, s2), fma(other1, total1, s3)
        c0, c1, c2, c3 = mma_s8(a0, a1, a2, a3, b0, b1, _ONES_BITS, _ONES_BITS, _ONES_BITS, _ONES_BITS)
        return (
            fma(x0, _times(d0, m0, c0), s0),
            fma(x1, _times(d0, m0, c1), s1),
            fma(x0, _times(d1, m1, c2), s2),
            fma(x1, _times(d1, m1, c3), s3),
        )

    load_strips, add_strips = unrolled(load_strip, strips), unrolled(add_strip, strips)

    @device
    def add_activations(sums, i, fixed):
        """`sums` and all strips times 16 activations."""
        fragments, inputs_at, pairs_at = fixed
        # Without such fences the compiler begins more products than there are registers for.
        syncwarp()
        b0, b1, b2, b3 = ldmatrix_x4(inputs_at + 16 * _SLICE * i)
        x0, x1, x2, x3 = load_shared_f32x4(pairs_at + factors + 64 * i)
        t0 = t1 = t2 = t3 = np.float32(0)
        if minimum:
            t0, t1, t2, t3 = load_shared_f32x4(pairs_at + totals + 64 * i)
        left, right = (fragments, (b0, b1), (x0, x1), (t0, t1)), (fragments, (b2, b3), (x2, x3), (t2, t3))
        first = add_strips(0, sums[0], left)
        syncwarp()
        return first, add_strips(0, sums[1], right)

    add_all_activations = unrolled(add_activations, 4)

    @device
    def add_half(sums, half, fixed):
        """`sums` and the products of half a slice, which is two chunks of codes."""
        base, (own_codes, own_numbers, own_inputs, own_pairs), (inputs_at, pairs_at) = fixed
        codes_at = base + codes + (own_codes ^ 32 * half)
        fragments = load_strips(0, nowhere, (codes_at, base + numbers + own_numbers + 8 * ROWS * half))
        inputs_at += base + (own_inputs ^ 32 * half)
        return add_all_activations(
            0, sums, (fragments, inputs_at, base + pairs_at + own_pairs + 4 * activations * half)
        )

    nowhere, no_sums = (0,) * strips, (((_ZEROS,) * strips,) * 2,) * 4

    @device
    def product(row, token, x):
        """`Tile.product`: four times two times `strips` fragments, as of `ptx.mma_s8`."""
        base = shared_address(cuda.shared.array(0, np.uint8))
        thread, me, blocks = cuda.threadIdx.x, lane(), x.columns >> 5
        warp = thread // WARP
        # A thread finds together what it copies.
        store_shared_u64(base + named_rows + 8 * (ROWS // 32 * (thread & 31) + (thread >> 5)), row)
        if thread < activations:
            place = activations // 32 * (thread & 31) + (thread >> 5)
            store_shared_u64(base + named_codes + 8 * place, x.codes + x.columns * token)
            place = 2 * (thread & 63) + (thread >> 6)
            store_shared_u64(base + named_scales + 8 * place, x.scales + 8 * blocks * token)
        cuda.syncthreads()
        # What the warp multiplies, and what the lane reads of it for fragments of the first 32 columns.
        first, first_activation = 16 * strips * (warp % warps_along_rows), 64 * (warp // warps_along_rows)
        own = (
            _swizzled(first + (me & 15), me >> 4),
            8 * first + 16 * (me >> 2),
            _swizzled(first_activation + (me & 7) + 8 * (me >> 4), me >> 3 & 1),
            4 * first_activation + 16 * (me & 3),
        )
        sums, slices = no_sums, blocks + 1 >> 1
        for part in range(STAGES - 1):
            copy(base, x, part, part)
            cp_async_commit()
        stage, ahead = 0, STAGES - 1
        for part in range(slices):
            # The slice has come, and nobody multiplies the one whose stage is filled next.
            cp_async_wait(_UNDER_WAY)
            cuda.syncthreads()
            copy(base, x, part + STAGES - 1, ahead)
            cp_async_commit()
            unpack(base, row, blocks, part, stage)
            cuda.syncthreads()
            at = inputs + _SLICE * activations * stage, 8 * activations * stage
            for half in range(2):
                sums = add_half(sums, half, (base, own, at))
            ahead, stage = stage, stage + 1 if stage + 1 < STAGES else 0
        return sums

    def storing(function):
        """`Tile.storing`."""

        @device
        def store_strip(sums, i, fixed):
            row, activation, more = fixed
            function(sums[0], sums[2], row + 16 * i, activation, more)
            function(sums[1], sums[3], row + 16 * i, activation + 1, more)
            return 0

        store_strips = unrolled(store_strip, strips)

        @device
        def store_activations(sums, i, fixed):
            row, activation, more = fixed
            store_strips(0, sums[0], (row, activation + 16 * i, more))
            store_strips(0, sums[1], (row, activation + 16 * i + 8, more))
            return 0

        store_all_activations = unrolled(store_activations, 4)

        @device
        def store(sums, more):
            warp, me = cuda.threadIdx.x // WARP, lane()
            row = 16 * strips * (warp % warps_along_rows) + (me >> 2)
            activation = 64 * (warp // warps_along_rows) + 2 * (me & 3)
            store_all_activations(0, sums, (row, activation, more))

        return store

    return Tile(product, storing, activations, shared_bytes)
