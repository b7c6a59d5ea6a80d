"""The stages of a tile's product: slices of rows and activations are copied to shared memory ahead of their product
(``cp.async``), as they lie in memory, and a slice of the rows is unpacked to codes of a byte when it has come."""

from numba import cuda

from pymla.cuda.formats import FORMATS
from pymla.cuda.formats.runs import Run, copying
from pymla.cuda.machine.ptx import (
    as_word,
    cp_async_4,
    cp_async_16,
    load_shared_u64x2,
    store_shared_u32x2,
    store_shared_u32x4,
    store_shared_u64,
)
from pymla.cuda.matmul.gemm_layout import SLICE, TILE_ROWS, layout_of, place_of_activation, place_of_row, swizzled
from pymla.cuda.matmul.gemm_products import MINUS_ONES
from pymla.cuda.runtime.jit import device


def stages_of(qtype, activations):
    """Device functions that bring slices of a tile to shared memory: ``(name, copy, unpack)``.

    ``name(base, row, token, x)``: every thread says which row it stands for, and which activation, before the first
    copy. ``copy(base, x, part, stage)`` begins to copy slice `part`. ``unpack(base, row, blocks, part, stage)`` makes
    codes and numbers of the thread's row from it.
    """
    form = FORMATS[qtype]
    block, minimum, second_word = form.block, form.minimum, _second_word(form)
    layout, run = layout_of(qtype, activations), Run.of(qtype, 2)
    copy_pieces = copying(run, 4)
    slices_of_run, row_stride = layout.slices_of_run, layout.row_stride
    inputs, totals, factors, raw = layout.inputs, layout.totals, layout.factors, layout.raw
    codes, numbers = layout.codes, layout.numbers
    named_rows, named_codes, named_scales = layout.named_rows, layout.named_codes, layout.named_scales

    @device
    def name(base, row, token, x):
        """Addresses lie in such an order that a thread finds all of its copies' together."""
        thread, blocks = cuda.threadIdx.x, x.columns >> 5
        store_shared_u64(base + named_rows + 8 * (TILE_ROWS // 32 * (thread & 31) + (thread >> 5)), row)
        if thread < activations:
            place = activations // 32 * (thread & 31) + (thread >> 5)
            store_shared_u64(base + named_codes + 8 * place, x.codes + x.columns * token)
            place = 2 * (thread & 63) + (thread >> 6)
            store_shared_u64(base + named_scales + 8 * place, x.scales + 8 * blocks * token)

    @device
    def stage_of_run(part, stage):
        """Where the bytes of slice `part` lie."""
        return raw + TILE_ROWS * row_stride * (stage if slices_of_run == 1 else part // slices_of_run & 1)

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
        # Codes past the last block are 0.
        column = SLICE * part + 16 * chunk
        nbytes = 16 if column < x.columns else 0
        to = base + inputs + SLICE * activations * stage + swizzled(first, chunk)
        for k in range(0, activations // 32, 2):
            one, other = load_shared_u64x2(base + named_codes + 8 * (activations // 32 * first + k))
            cp_async_16(to + 32 * SLICE * k, one + column, nbytes)
            cp_async_16(to + 32 * SLICE * (k + 1), other + column, nbytes)
        begin = run.nbytes * (part // slices_of_run)
        if part % slices_of_run == 0:
            nbytes = min(run.nbytes, blocks * run.nbytes // run.blocks - begin)
            to = base + stage_of_run(part, stage) + row_stride * first
            for k in range(0, TILE_ROWS // 32, 2):
                one, other = load_shared_u64x2(base + named_rows + 8 * (TILE_ROWS // 32 * first + k))
                copy_pieces(to + 32 * row_stride * k, one + begin, nbytes, chunk)
                copy_pieces(to + 32 * row_stride * (k + 1), other + begin, nbytes, chunk)
        block, first = thread & 1, thread >> 1
        number = 2 * part + block
        nbytes = 4 if number < blocks else 0
        to = base + 4 * (activations * (2 * stage + block) + place_of_activation(first))
        one, other = load_shared_u64x2(base + named_scales + 16 * first)
        copy_factors(to, one + 8 * number, nbytes)
        if activations > 64:
            copy_factors(to + 256, other + 8 * number, nbytes)

    @device
    def unpack(base, row, blocks, part, stage):
        """Codes and numbers of the thread's row in slice `part`."""
        thread, first = cuda.threadIdx.x, part // slices_of_run * run.blocks
        at = base + stage_of_run(part, stage) + row_stride * thread + (row + run.nbytes * (part // slices_of_run) & 15)
        to, to_numbers = base + codes, base + numbers + 8 * place_of_row(thread)
        for half in range(2):
            (c0, c1, c2, c3, c4, c5, c6, c7), d, other = block(at, min(2 * part + half, blocks - 1) - first)
            store_shared_u32x4(to + swizzled(thread, 2 * half), c0, c1, c2, c3)
            store_shared_u32x4(to + swizzled(thread, 2 * half + 1), c4, c5, c6, c7)
            store_shared_u32x2(to_numbers + 8 * TILE_ROWS * half, as_word(d), second_word(d, other))

    return name, copy, unpack


def _second_word(form):
    """A device function of a block's two numbers: the second word that products read of a row."""

    @device
    def other_number(d, other):
        return as_word(other)

    @device
    def minima(d, other):
        return other

    @device
    def d_times_minus_ones(d, other):
        return as_word(d * MINUS_ONES)

    return minima if form.minima else other_number if form.halves or form.minimum else d_times_minus_ones
