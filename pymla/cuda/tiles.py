"""Tiles: products of 64 rows of a quantised matrix and 64 activations, on int8 tensor cores.

`quant` multiplies whole matrices with them, `moe` the rows of an expert with the tokens that chose it. What differs is
where rows and activations lie and where results go: kernels pass addresses, and store what they get back.
"""

import numpy as np
from numba import cuda

from pymla.cuda.formats import FORMATS
from pymla.cuda.jit import device
from pymla.cuda.ptx import (
    WARP,
    as_f32,
    as_word,
    cp_async_16,
    cp_async_commit,
    cp_async_wait,
    fma,
    lane,
    ldmatrix_x4,
    load_f32x2,
    load_shared_f32x4,
    load_shared_u32x2,
    mma_s8,
    shared_address,
    store_shared_u32,
    store_shared_u32x2,
)

__all__ = ["THREADS", "TILE", "TILE_PRODUCT", "store_two"]

#: Rows, and activations, of a block of threads' product.
TILE = 64
#: Threads of such a block: a warp for 16 rows.
THREADS = TILE // 16 * WARP
#: Bytes between rows of 64 codes in shared memory: with 16 unused ones, `ldmatrix_x4` meets no bank twice.
_STRIDE = 80
#: Bytes of a slice of 64 columns in shared memory: codes, and two pairs of float32 for each row.
_CODES, _PAIRS = TILE * _STRIDE, TILE * 2 * 8
_TWO_CODES, _TWO_PAIRS = 2 * _CODES, 2 * _PAIRS
#: A float32 whose last bits count ones: products on integers begin with its bits, and are floats once it is subtracted.
_ONES, _ONES_BITS = np.float32(1.5 * 2**23), 0x4B400000


def _tile_product(qtype):
    """`TILE_PRODUCT` of a type."""
    piece, halves, minimum = FORMATS[qtype].piece, FORMATS[qtype].halves, FORMATS[qtype].minimum

    @device
    def product(a0, a1, a2, a3, b0, b1):
        """16 rows times 8 activations over 32 columns: exact, as float32. Sums are below 2 ** 20."""
        c0, c1, c2, c3 = mma_s8(a0, a1, a2, a3, b0, b1, _ONES_BITS, _ONES_BITS, _ONES_BITS, _ONES_BITS)
        return as_f32(c0) - _ONES, as_f32(c1) - _ONES, as_f32(c2) - _ONES, as_f32(c3) - _ONES

    @device
    def scaled(a, b0, b1, upper, lower, pairs, sums):
        """`sums` and a block's products, with the scales of two rows and of two activations."""
        a0, a1, a2, a3 = a
        s0, s1, s2, s3 = sums
        x0, total0, x1, total1 = load_shared_f32x4(pairs)
        d0, other0 = as_f32(upper[0]), as_f32(upper[1])
        d1, other1 = as_f32(lower[0]), as_f32(lower[1])
        if halves:
            c0, c1, c2, c3 = product(a0, a1, 0, 0, b0, b1)
            e0, e1, e2, e3 = product(0, 0, a2, a3, b0, b1)
            return (
                fma(x0, fma(d0, c0, other0 * e0), s0),
                fma(x1, fma(d0, c1, other0 * e1), s1),
                fma(x0, fma(d1, c2, other1 * e2), s2),
                fma(x1, fma(d1, c3, other1 * e3), s3),
            )
        if minimum:
            s0, s1 = fma(other0, total0, s0), fma(other0, total1, s1)
            s2, s3 = fma(other1, total0, s2), fma(other1, total1, s3)
        c0, c1, c2, c3 = product(a0, a1, a2, a3, b0, b1)
        return fma(d0 * x0, c0, s0), fma(d0 * x1, c1, s1), fma(d1 * x0, c2, s2), fma(d1 * x1, c3, s3)

    @device
    def store_piece(one, codes, pairs, part):
        """A piece to shared memory: codes, and by the first of four lanes the two numbers."""
        c0, c1, d, other = one
        store_shared_u32(codes, c0)
        store_shared_u32(codes + 16, c1)
        if part == 0:
            store_shared_u32x2(pairs, as_word(d), as_word(other))

    @device
    def tile_product(r0, r1, r2, r3, x0, x1, scales, blocks):
        """`TILE` rows times `TILE` activations, each of `blocks` blocks of 32, by a block of `THREADS` threads.

        64 columns at a time: while the tensor cores multiply a slice, the next one is on its way. With ``i`` the thread
        in the block, it copies parts of

        - rows of weights ``i // 8``, + 16, + 32 and + 48: their addresses are `r0` to `r3`,
        - activations ``i // 4`` and + 32: the addresses of their codes are `x0` and `x1`,
        - and the scales of activation ``i // 2``: at `scales`;

        whatever a thread names is read, so that rows that are not there are named by the address of another one. A warp
        multiplies 16 rows. Returns eight times four sums: number n has rows ``16 * warp + lane // 4`` and 8 below,
        times activations ``8 * n + 2 * (lane % 4)`` and the next one, as a fragment of `ptx.mma_s8`; see `store_two`.
        """
        weights = cuda.shared.array(_TWO_CODES, np.uint8, alignment=16)
        numbers = cuda.shared.array(_TWO_PAIRS, np.uint8, alignment=16)
        inputs = cuda.shared.array(_TWO_CODES, np.uint8, alignment=16)
        factors = cuda.shared.array(_TWO_PAIRS, np.uint8, alignment=16)
        thread, me = cuda.threadIdx.x, lane()
        # What this thread copies: pieces, 16 codes at a time, a pair of scales.
        part, odd, row = thread & 3, thread >> 2 & 1, thread >> 3
        to_codes = shared_address(weights) + _STRIDE * row + 32 * odd + 4 * part
        to_numbers = shared_address(numbers) + 8 * (TILE * odd + row)
        chunk = 16 * (thread & 3)
        to_inputs = shared_address(inputs) + _STRIDE * (thread >> 2) + chunk
        to_factors = shared_address(factors) + 8 * (TILE * (thread & 1) + (thread >> 1))
        # What it reads for the products: fragments of its warp's rows and of all activations.
        warp = thread // WARP
        from_codes = shared_address(weights) + _STRIDE * (16 * warp + (me & 15)) + 16 * (me >> 4)
        from_inputs = shared_address(inputs) + _STRIDE * ((me & 7) + 8 * (me >> 4)) + 16 * (me >> 3 & 1)
        from_numbers = shared_address(numbers) + 8 * (16 * warp + (me >> 2))
        from_factors = shared_address(factors) + 16 * (me & 3)

        zero = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = zero
        # The slice before the first one has nothing to multiply.
        for i in range(-1, blocks + 1 >> 1):
            # An odd number of blocks is filled up with the last one, times activations of 0.
            block, other = min(2 * i + 2 + odd, blocks - 1), 2 * i + 2 + (thread & 1)
            target = i + 1 & 1
            p0, p1 = piece(r0, block, part), piece(r1, block, part)
            p2, p3 = piece(r2, block, part), piece(r3, block, part)
            nbytes = 16 if 64 * i + 64 + chunk < 32 * blocks else 0
            cp_async_16(to_inputs + _CODES * target, x0 + 64 * i + 64 + chunk, nbytes)
            cp_async_16(to_inputs + _CODES * target + 32 * _STRIDE, x1 + 64 * i + 64 + chunk, nbytes)
            cp_async_commit()
            scale = total = np.float32(0)
            if other < blocks:
                scale, total = load_f32x2(scales + 8 * other)
            if i >= 0:
                for half in range(2):
                    skip, skip_pairs = _CODES * (i & 1) + 32 * half, _PAIRS * (i & 1) + 8 * TILE * half
                    a = ldmatrix_x4(from_codes + skip)
                    upper = load_shared_u32x2(from_numbers + skip_pairs)
                    lower = load_shared_u32x2(from_numbers + skip_pairs + 64)
                    at, pairs = from_inputs + skip, from_factors + skip_pairs
                    b0, b1, b2, b3 = ldmatrix_x4(at)
                    s0 = scaled(a, b0, b1, upper, lower, pairs, s0)
                    s1 = scaled(a, b2, b3, upper, lower, pairs + 64, s1)
                    b0, b1, b2, b3 = ldmatrix_x4(at + 16 * _STRIDE)
                    s2 = scaled(a, b0, b1, upper, lower, pairs + 128, s2)
                    s3 = scaled(a, b2, b3, upper, lower, pairs + 192, s3)
                    b0, b1, b2, b3 = ldmatrix_x4(at + 32 * _STRIDE)
                    s4 = scaled(a, b0, b1, upper, lower, pairs + 256, s4)
                    s5 = scaled(a, b2, b3, upper, lower, pairs + 320, s5)
                    b0, b1, b2, b3 = ldmatrix_x4(at + 48 * _STRIDE)
                    s6 = scaled(a, b0, b1, upper, lower, pairs + 384, s6)
                    s7 = scaled(a, b2, b3, upper, lower, pairs + 448, s7)
            codes, pairs = to_codes + _CODES * target, to_numbers + _PAIRS * target
            store_piece(p0, codes, pairs, part)
            store_piece(p1, codes + 16 * _STRIDE, pairs + 128, part)
            store_piece(p2, codes + 32 * _STRIDE, pairs + 256, part)
            store_piece(p3, codes + 48 * _STRIDE, pairs + 384, part)
            store_shared_u32x2(to_factors + _PAIRS * target, as_word(scale), as_word(total))
            cp_async_wait(0)
            cuda.syncthreads()
        return s0, s1, s2, s3, s4, s5, s6, s7

    return tile_product


#: By type, the device function that multiplies a tile; `tile_product` above says what it takes and returns.
TILE_PRODUCT = {qtype: _tile_product(qtype) for qtype in FORMATS}


@device
def store_two(out, at, column, left, upper, lower):
    """Two of a lane's four sums, those of one activation: `upper` to ``out[at, column]``, `lower` 8 columns on. Of the
    matrix, whose rows are columns of `out`, `left` rows from the first one on are there."""
    if left > 0:
        out[at, column] = upper
    if left > 8:
        out[at, column + 8] = lower
