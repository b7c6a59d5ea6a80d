"""K-quants: super-blocks of 256 weights, whose layouts are those of `pymla.reference.formats.k_quants`.

`pymla.cpu.quantise.super_blocks` chooses halves, integers and codes; here they are put into bytes. A round of the
search and a pass over a super-block cost four cycles for a weight each, with registers of 512 bits: four of them for
Q3_K, seven for Q6_K, eight for types with minima. As much again goes into what follows a round of a small block,
because each step of it waits for the one before.
"""

import numpy as np

from pymla import ggml
from pymla.cpu.machine.simd import address, store_f16
from pymla.cpu.quantise.quantiser import Quantiser
from pymla.cpu.quantise.super_blocks import (
    CODES,
    INTEGERS,
    MOST,
    SCRATCH,
    SIZE,
    line_super_blocks_for,
    scaled_super_blocks_for,
)
from pymla.cpu.runtime.compiling import helper, inlined

#: Rounds of the search for scale and minimum of a small block.
_ROUNDS = 1
#: Halves that a super-block starts from. Two more would lower errors by 0.3 %; of Q3_K, a second one by 0.1 %.
_STARTS = 2
#: The integers of six bits with a sign.
_SIX_BITS = -32, 31


@inlined
def _codes(scratch):
    """The codes of a super-block, uint8 (256,)."""
    return scratch[CODES : CODES + SIZE // 4].view(np.uint8)


@inlined
def _write_nibbles(codes, run, out):
    """The low four bits of `run` codes in low nibbles, those of the next in high ones."""
    for i in range(run):
        out[i] = (codes[i] & 15) | (codes[run + i] & 15) << 4


@inlined
def _write_pairs(codes, shift, out):
    """Two bits of 128 codes, from bit `shift` on: those of the first 32 codes are the lowest of 32 bytes."""
    for i in range(32):
        low = (codes[i] >> shift & 3) | (codes[32 + i] >> shift & 3) << 2
        out[i] = low | (codes[64 + i] >> shift & 3) << 4 | (codes[96 + i] >> shift & 3) << 6


@inlined
def _write_bits(codes, shift, out):
    """Bit `shift` of 256 codes: those of the first 32 codes are the lowest of 32 bytes."""
    for i in range(32):
        low = (codes[i] >> shift & 1) | (codes[32 + i] >> shift & 1) << 1
        low |= (codes[64 + i] >> shift & 1) << 2 | (codes[96 + i] >> shift & 1) << 3
        high = (codes[128 + i] >> shift & 1) | (codes[160 + i] >> shift & 1) << 1
        high |= (codes[192 + i] >> shift & 1) << 2 | (codes[224 + i] >> shift & 1) << 3
        out[i] = low | high << 4


@inlined
def _write_scales_and_minima(scratch, out):
    """Eight scales and eight minima of 6 bits in 12 bytes: of the last four of each, the low bits are in the last four
    bytes, the high ones above the first four of each."""
    for i in range(4):
        scale, minimum = int(scratch[INTEGERS + i]), int(scratch[INTEGERS + MOST + i])
        last_scale, last_minimum = int(scratch[INTEGERS + i + 4]), int(scratch[INTEGERS + MOST + i + 4])
        out[i], out[i + 4] = scale | last_scale >> 4 << 6, minimum | last_minimum >> 4 << 6
        out[i + 8] = (last_scale & 15) | (last_minimum & 15) << 4


@inlined
def _write_halves(d, dmin, at):
    store_f16(at, d)
    store_f16(at + 2, dmin)


_choose_2 = line_super_blocks_for(16, 3, 15, _ROUNDS, _STARTS)
_choose_3 = scaled_super_blocks_for(16, -4, 3, _SIX_BITS, 1)
_choose_4 = line_super_blocks_for(32, 15, 63, _ROUNDS, _STARTS)
_choose_5 = line_super_blocks_for(32, 31, 63, _ROUNDS, _STARTS)
_choose_6 = scaled_super_blocks_for(16, -32, 31, (-128, 127), _STARTS)


@helper
def _q2_k(x, w, block, scratch):
    """Nibbles of sixteen scales and minima, codes, two halves."""
    d, dmin = _choose_2(x, w, scratch)
    codes = _codes(scratch)
    for i in range(16):
        block[i] = int(scratch[INTEGERS + i]) | int(scratch[INTEGERS + MOST + i]) << 4
    for half in range(2):
        _write_pairs(codes[128 * half :], 0, block[16 + 32 * half :])
    _write_halves(d, dmin, address(block) + 80)


@helper
def _q3_k(x, w, block, scratch):
    """High bits, pairs of low ones, sixteen scales of 6 bits, a half."""
    d = _choose_3(x, w, scratch)
    codes = _codes(scratch)
    _write_bits(codes, 2, block)
    for half in range(2):
        _write_pairs(codes[128 * half :], 0, block[32 + 32 * half :])
    scales = scratch[INTEGERS : INTEGERS + 16]
    for i in range(8):
        low, high = int(scales[i]) + 32, int(scales[8 + i]) + 32
        block[96 + i] = (low & 15) | (high & 15) << 4
    for i in range(4):
        first, second = int(scales[i]) + 32 >> 4, int(scales[4 + i]) + 32 >> 4
        third, fourth = int(scales[8 + i]) + 32 >> 4, int(scales[12 + i]) + 32 >> 4
        block[104 + i] = first | second << 2 | third << 4 | fourth << 6
    store_f16(address(block) + 108, d)


@helper
def _q4_k(x, w, block, scratch):
    """Two halves, scales and minima, nibbles."""
    d, dmin = _choose_4(x, w, scratch)
    codes = _codes(scratch)
    _write_halves(d, dmin, address(block))
    _write_scales_and_minima(scratch, block[4:16])
    for i in range(4):
        _write_nibbles(codes[64 * i :], 32, block[16 + 32 * i :])


@helper
def _q5_k(x, w, block, scratch):
    """Two halves, scales and minima, fifth bits, nibbles."""
    d, dmin = _choose_5(x, w, scratch)
    codes = _codes(scratch)
    _write_halves(d, dmin, address(block))
    _write_scales_and_minima(scratch, block[4:16])
    _write_bits(codes, 4, block[16:48])
    for i in range(4):
        _write_nibbles(codes[64 * i :], 32, block[48 + 32 * i :])


@helper
def _q6_k(x, w, block, scratch):
    """Nibbles, pairs of high bits, sixteen scales of 8 bits, a half."""
    d = _choose_6(x, w, scratch)
    codes = _codes(scratch)
    for half in range(2):
        _write_nibbles(codes[128 * half :], 64, block[64 * half :])
        _write_pairs(codes[128 * half :], 4, block[128 + 32 * half :])
    for i in range(16):
        block[192 + i] = int(scratch[INTEGERS + i]) & 255
    store_f16(address(block) + 208, d)


QUANTISERS = {
    ggml.Q2_K: Quantiser(_q2_k, SCRATCH),
    ggml.Q3_K: Quantiser(_q3_k, SCRATCH),
    ggml.Q4_K: Quantiser(_q4_k, SCRATCH),
    ggml.Q5_K: Quantiser(_q5_k, SCRATCH),
    ggml.Q6_K: Quantiser(_q6_k, SCRATCH),
}
