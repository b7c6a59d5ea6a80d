"""Types of ik_llama.cpp that are no bit planes: IQ4_KSS, with a bit of the scale in each word, and IQ2_KL, where a code
stands for two weights."""

from pymla import ggml, planes
from pymla.codebooks import PAIRS
from pymla.cuda.formats.blocks import format_of_blocks
from pymla.cuda.formats.levels import ONES, looked_up, variants_looked_up
from pymla.cuda.formats.loads import GLOBAL, SHARED, words_of
from pymla.cuda.machine.ptx import load_f16, load_f32, prmt, to_f32
from pymla.cuda.runtime.jit import device, unrolled

# IQ4_KSS.

_look_up_variants = variants_looked_up(planes.IQ4_LEVELS)


@device
def _nibbles(word):
    """Codes of two halves: each, without its lowest bit, xor half of it."""
    even = word & 0xFFFEFFFE
    return even ^ (even >> 1 & 0x7FFF7FFF)


@device
def _codes_of_nibbles(word, k, moved):
    nibbles = _nibbles(word)
    return _look_up_variants(nibbles & 0x0F0F0F0F, nibbles >> 4 & 0x0F0F0F0F, moved)


@device
def _scale_and_variant(words):
    """The lowest bits of eight halves: the variant, and above it the scale, an odd number."""
    w0, w1, w2, w3 = words
    low = 0x00010001
    bits = w0 & low | (w1 & low) << 2 | (w2 & low) << 4 | (w3 & low) << 6
    number = (bits | bits >> 15) & 255
    moved = (number & 1) * (4 * ONES)
    return to_f32((number & 254) - 127), (moved, moved)


_four_shared, _four_global = words_of(SHARED, 4, 4), words_of(GLOBAL, 4, 4)
_four_pairs = unrolled(_codes_of_nibbles, 4)


@device
def _iq4_kss_block(block, i):
    words = _four_shared(block + 16 * i)
    d, moved = _scale_and_variant(words)
    p0, p1, p2, p3 = _four_pairs(0, words, moved)
    return (p0[0], p1[0], p2[0], p3[0], p0[1], p1[1], p2[1], p3[1]), d, d


@device
def _iq4_kss_piece(block, i, w):
    words = _four_global(block + 16 * i)
    d, moved = _scale_and_variant(words)
    w0, w1, w2, w3 = words
    first, second = _codes_of_nibbles(w0 if w == 0 else w1 if w == 1 else w2 if w == 2 else w3, w, moved)
    return first, second, d, d


IQ4_KSS = format_of_blocks(ggml.IQ4_KSS, _iq4_kss_piece, _iq4_kss_block, row_scale=load_f32)


# IQ2_KL.

_look_up_first, _look_up_second = looked_up(tuple(p[0] for p in PAIRS)), looked_up(tuple(p[1] for p in PAIRS))
#: Selectors that bring the levels of pairs 0 and 1, or 2 and 3, side by side.
_LOWER, _UPPER = 0x5140, 0x7362


@device
def _pair_codes(low, high, i):
    """Codes of four pairs, from words of their block."""
    return low >> 4 * (i & 1) & 0x0F0F0F0F | (high >> i & ONES) << 4


def _scale_of(memory):
    """A device function (block, i): the integer scale of 32 weights."""
    byte = memory.byte

    @device
    def scale(block, i):
        low, high = byte(block + 2 + (i & 3)) >> 4 * (i >> 2) & 15, byte(block + (i >> 2)) >> 2 * (i & 3) & 3
        return to_f32((low | high << 4) - 32)

    return scale


_scale_shared, _scale_global = _scale_of(SHARED), _scale_of(GLOBAL)
_four_words, _one_word = words_of(SHARED, 2, 4), words_of(GLOBAL, 2, 1)


@device
def _sixteen(codes, others):
    """16 weights, in order, of eight pairs."""
    first, more = _look_up_first(codes, others)
    second, others = _look_up_second(codes, others)
    return (
        prmt(first, second, _LOWER),
        prmt(first, second, _UPPER),
        prmt(more, others, _LOWER),
        prmt(more, others, _UPPER),
    )


@device
def _iq2_kl_block(block, i):
    l0, l1, l2, l3 = _four_words(block + 6 + 16 * (i >> 1))
    h0, h1, h2, h3 = _four_words(block + 70)
    first = _sixteen(_pair_codes(l0, h0, i), _pair_codes(l1, h1, i))
    second = _sixteen(_pair_codes(l2, h2, i), _pair_codes(l3, h3, i))
    d = _scale_shared(block, i)
    return first + second, d, d


@device
def _iq2_kl_piece(block, i, w):
    low, high = block + 6 + 16 * (i >> 1) + 4 * (w >> 1), block + 70 + 4 * (w >> 1)
    (l0,), (l1,), (h0,), (h1,) = _one_word(low), _one_word(low + 8), _one_word(high), _one_word(high + 8)
    c0, c1, c2, c3 = _sixteen(_pair_codes(l0, h0, i), _pair_codes(l1, h1, i))
    is_upper, d = w & 1, _scale_global(block, i)
    return c1 if is_upper else c0, c3 if is_upper else c2, d, d


IQ2_KL = format_of_blocks(ggml.IQ2_KL, _iq2_kl_piece, _iq2_kl_block, row_scale=load_f16)
