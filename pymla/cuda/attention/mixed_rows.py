"""Rows of few bits that are mixed before they are rounded (`pymla.pages.HADAMARD_TYPES`), q6_0, q5_0 and q4_0, as
ggml's blocks.

A warp mixes 32 numbers by five exchanges of its lanes. Rows are read as they are stored: `mixed_queries` mixes the
queries that meet them, and `unmix` the results, as the matrix is its own inverse but for a factor.
"""

import numpy as np
from numba import cuda

from pymla import ggml
from pymla.cuda.attention.steps import PLACE, place
from pymla.cuda.formats.codes import unaligned_word
from pymla.cuda.machine import ptx
from pymla.cuda.memory import DeviceArray, empty
from pymla.cuda.runtime.array_types import I32
from pymla.cuda.runtime.jit import device, kernel
from pymla.pages import CACHE_TYPES, READ, STORED

#: Threads of a block of `mix_heads`.
THREADS = 128
#: Bits of a code, by type.
CODE_BITS = {CACHE_TYPES["q6_0"]: 6, CACHE_TYPES["q5_0"]: 5, CACHE_TYPES["q4_0"]: 4}
ZERO = np.float32(0)


@device
def mixed(x, lane):
    """A warp's 32 numbers times the Hadamard matrix."""
    distance = 1
    while distance < 32:
        other = ptx.shfl_xor(x, distance)
        x = other - x if lane & distance else other + x
        distance *= 2
    return x


def write_of(qtype):
    """`CacheRows.write` of a type: 32 lanes write a block together."""
    bits, block_bytes = CODE_BITS[qtype], ggml.BLOCK_BYTES[qtype]
    nibbles, zero, most = block_bytes - 16, np.float32(1 << bits - 1), (1 << bits) - 1
    half, stored, unit = zero + np.float32(0.5), np.float32(STORED), np.float32(-1) / zero

    @device
    def write(row, i, x):
        lane, block = i & 31, row + block_bytes * (i >> 5)
        x = mixed(x, lane) * stored
        largest = ptx.warp_max(abs(x))
        # The first lane that has it; where it is NaN none does, and lane 0 is NaN as the others are.
        first = 31 - ptx.warp_max(31 - lane if abs(x) == largest else -1)
        d = ptx.shfl_idx(x, first) * unit
        inverse = ptx.div(np.float32(1), d) if d != ZERO else ZERO
        # Rounded twice, as ggml does.
        code = min(int(ptx.fma(x, inverse, ZERO) + half), most)
        if lane == 0:
            ptx.store_f16(block, d)
        other = ptx.shfl_idx(code, lane + 16)
        if lane < 16:
            ptx.store_u8(block + nibbles + lane, code & 15 | (other & 15) << 4)
        write_high(block + 2, lane, code)

    write_high = {4: _no_high_bits, 5: _write_fifth_bits, 6: _write_high_pairs}[bits]
    return write


@device
def _no_high_bits(at, lane, code):
    pass


@device
def _write_fifth_bits(at, lane, code):
    word = ptx.ballot((code & 16) != 0)
    if lane < 4:
        ptx.store_u8(at + lane, word >> 8 * lane & 255)


@device
def _write_high_pairs(at, lane, code):
    """Byte i of eight has the high bits of codes i, i + 16, i + 8 and i + 24."""
    high = code >> 4
    second, third, fourth = ptx.shfl_idx(high, lane + 16), ptx.shfl_idx(high, lane + 8), ptx.shfl_idx(high, lane + 24)
    if lane < 8:
        ptx.store_u8(at + lane, high | second << 2 | third << 4 | fourth << 6)


@device
def shared_word(at):
    """The word at an address of shared memory that 2 divides."""
    odd = at & 2
    return ptx.funnel_shift_r(ptx.load_shared_u32(at - odd), ptx.load_shared_u32(at + odd), 8 * odd)


def codes_of(qtype, word_at):
    """A device function (block, j): codes 4 j to 4 j + 3 of a block, unsigned bytes. ``word_at(address)`` reads a word
    at an even address."""
    bits, nibbles = CODE_BITS[qtype], ggml.BLOCK_BYTES[qtype] - 16

    @device
    def no_high_bits(block, j):
        return 0

    @device
    def fifth_bits(block, j):
        return (word_at(block + 2) >> 4 * j & 15) * 0x00204081 & 0x01010101

    @device
    def high_pairs(block, j):
        field = j >> 2 | j & 2
        return word_at(block + 2 + 4 * (j & 1)) >> 2 * field & 0x03030303

    high_bits = {4: no_high_bits, 5: fifth_bits, 6: high_pairs}[bits]

    @device
    def codes(block, j):
        low = word_at(block + nibbles + 4 * (j & 3)) >> 4 * (j >> 2) & 0x0F0F0F0F
        return low | high_bits(block, j) << 4

    return codes


def readers_of(qtype):
    """The functions `one`, `four`, `halves` and `shared_halves` of `CacheRows` for a type, of mixed numbers."""
    block_bytes, zero = ggml.BLOCK_BYTES[qtype], np.float32(1 << CODE_BITS[qtype] - 1)
    codes, shared_codes = codes_of(qtype, unaligned_word), codes_of(qtype, shared_word)
    #: Two float16: minus 1024 and the code that is zero.
    bias = (0xE400 + (1 << CODE_BITS[qtype] - 1)) * 0x10001

    @device
    def one(row, i):
        block = row + block_bytes * (i >> 5)
        code = codes(block, (i & 31) >> 2) >> 8 * (i & 3) & 255
        return ptx.load_f16(block) * (ptx.to_f32(code) - zero)

    @device
    def four(row, i):
        block = row + block_bytes * (i >> 3)
        d, word = ptx.load_f16(block), codes(block, i & 7)
        return (
            d * (ptx.to_f32(word & 255) - zero),
            d * (ptx.to_f32(word >> 8 & 255) - zero),
            d * (ptx.to_f32(word >> 16 & 255) - zero),
            d * (ptx.to_f32(word >> 24 & 255) - zero),
        )

    @device
    def halves(row, i):
        block, j = row + block_bytes * (i >> 2), 2 * (i & 3)
        d = ptx.load_u16(block)
        d = ptx.prmt(d, d, 0x1010)
        h0, h1 = scaled_codes(codes(block, j), d, bias)
        h2, h3 = scaled_codes(codes(block, j + 1), d, bias)
        return h0, h1, h2, h3

    @device
    def shared_halves(row, i):
        block, j = row + block_bytes * (i >> 2), 2 * (i & 3)
        d = ptx.load_shared_u16(block)
        d = ptx.prmt(d, d, 0x1010)
        h0, h1 = scaled_codes(shared_codes(block, j), d, bias)
        h2, h3 = scaled_codes(shared_codes(block, j + 1), d, bias)
        return h0, h1, h2, h3

    return one, four, halves, shared_halves


@device
def scaled_codes(word, scale, bias):
    """Four unsigned bytes plus a bias, times a scale, as two words: `bias` and `scale` are two equal float16 each, and
    1024 is taken off by the bias. 1024 + n is the float16 whose low byte is n."""
    low, high = ptx.prmt(word, 0x64646464, 0x4140), ptx.prmt(word, 0x64646464, 0x4342)
    one = 0x3C003C00
    return (
        ptx.fma_f16x2(ptx.fma_f16x2(low, one, bias), scale, 0),
        ptx.fma_f16x2(ptx.fma_f16x2(high, one, bias), scale, 0),
    )


@kernel(PLACE, PLACE, I32, I32, max_threads=THREADS)
def mix_heads(source, target, mixed_columns, columns):
    """The first columns of every head mixed as rows are read, the others as they are. `source` and `target` are a
    `place` each. Grid: tokens, heads, columns."""
    t, h, i = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z * THREADS + cuda.threadIdx.x
    if i < columns:
        x = ptx.load_f32(source[0] + t * source[1] + h * source[2] + 4 * i)
        # Blocks of 32 columns are warps.
        if i < mixed_columns:
            x = mixed(x, i & 31) * np.float32(READ)
        ptx.store_f32(target[0] + t * target[1] + h * target[2] + 4 * i, x)


def mixed_queries(q: DeviceArray, rank: int) -> DeviceArray:
    """Queries float32 (T, H, rank + R) for rows of `rank` mixed numbers and R others."""
    out = empty(q.shape, np.float32)
    _launch(q, out, rank)
    return out


def unmix(out: DeviceArray) -> None:
    """Results float32 (T, H, rank), any `place`, of mixed rows: in place."""
    _launch(out, out, out.shape[2])


def _launch(source: DeviceArray, target: DeviceArray, mixed_columns: int) -> None:
    tokens, heads, columns = source.shape
    blocks = tokens, heads, -(-columns // THREADS)
    mix_heads[blocks, THREADS](place(source), place(target), mixed_columns, columns)
