"""IQ1: eight neighbouring weights together are one of 2,048 vectors of -1, 0 and 1, all moved up or down by an eighth.

The error of a group of weights x with the scale s, a vector g and the shift δ is

    Σ w (x - s (g + δ))²  =  Σ w x²  -  s (Σ 2 w x g ± Σ w x / 4  -  s (Σ w (g² ± g / 4) + Σ w / 64))

The sums over g are those of its first four numbers and of its last four, for which there are 81 patterns each. With a
scale and a shift each pattern has a value, and a vector's is the sum of two. The search begins with the first half of
the vector that was best with another scale, and the best second half of those that the codebook has with it. Only first
halves follow that could do better with the very best second half: one or two of 81, and the best vector of all is among
them. The shift with the higher bound comes first, and often the bound of the other one is lower than what is found.

Which scale a small block would choose is found without the codebook: each weight takes the best of three levels. The
number of the block is found by `block_scales`, whose candidates are compared by the best vectors.
"""

import numpy as np

from pymla import ggml
from pymla.codebooks import codebook
from pymla.cpu.machine.simd import (
    add,
    address,
    broadcast_f32xL,
    fma,
    larger,
    largest,
    load_f32,
    load_f32x32,
    load_f32xL,
    mul,
    splat_f32x32,
    splat_f32xL,
    store_f32x32,
    store_f32xL,
)
from pymla.cpu.machine.simd_search import lanes_at_least, largest_four, lowest_bit
from pymla.cpu.quantise import block_scales
from pymla.cpu.quantise.block_scales import GAINS, NUMBERS, WANTED, Multiples, choice_for, nearest_number, vertex
from pymla.cpu.quantise.codebooks import CACHE_LINE, LEAST_IMPORTANCE, aligned, largest_magnitude
from pymla.cpu.quantise.fields import places_of, write
from pymla.cpu.quantise.quantiser import Quantiser
from pymla.cpu.quantise.search import SMALLEST
from pymla.cpu.runtime.compiling import helper
from pymla.cpu.runtime.isa import LANES
from pymla.vectors import IQ1_M_HALF, IQ1_M_SCALES, VECTORS

#: Patterns of four numbers of which three are possible, and the first one again to fill registers of every level.
_PATTERN_NUMBERS = np.append(np.arange(3**4), np.zeros(15, int))
_PATTERNS = len(_PATTERN_NUMBERS)
_ROW = 4 * _PATTERNS
#: Bytes of a group's sums: of first halves and of second ones, each ``Σ 2 w x g`` and, moved up and down,
#: ``Σ w (g² ± g / 4)``.
_GROUP_SUMS = 6 * _ROW
#: Bytes of a group's values: first halves and second ones, both moved up and both moved down.
_GROUP_VALUES = 4 * _ROW
#: Scales at which a small block's curve is computed, as parts of its largest weight.
_CURVE = (1.1 * 0.94 ** np.arange(32)).astype(np.float32)
#: Candidates for the number of a block.
_SIZES = block_scales.ranges(0.8, 1.15, 2)
#: Scales ``number of the block * (2 * number + 1)`` of vectors whose numbers are near -1, 0 and 1.
_MULTIPLES = Multiples(2, 1, 7)

_ZERO, _ONE, _EIGHTH, _HALF, _TWO, _FOUR = (np.float32(value) for value in (0, 1, 1 / 8, 1 / 2, 2, 4))
_LOWEST = np.float32(-np.inf)

# Where the numbers of a block are in its scratch, behind those of `block_scales`: of each weight ``2 w x`` and w; of
# each group what all its vectors explain by their shift and by their scale, and the likely first halves of its best
# vectors, moved up and down; of the groups with a shift the largest values of second halves; a curve; and from where a
# cache line begins the values of patterns of the groups with a shift, and the sums of patterns of each group.
_SLOPES = block_scales.SCRATCH
_WEIGHTS, _SHIFTED, _SPREAD = _SLOPES + 256, _SLOPES + 512, _SLOPES + 544
_LIKELY, _MOST, _CURVE_VALUES = _SLOPES + 576, _SLOPES + 640, _SLOPES + 648
_VALUES = _CURVE_VALUES + len(_CURVE)
_SCRATCH = _VALUES + (CACHE_LINE + 4 * _GROUP_VALUES + 32 * _GROUP_SUMS) // 4


def _patterns():
    """Numbers of the patterns of four, float32 (4, `_PATTERNS`)."""
    return np.ascontiguousarray((_PATTERN_NUMBERS // 3 ** np.arange(4)[:, None] % 3 - 1).astype(np.float32))


def _pairs():
    """Of each pattern of the first half and each of the second one: 0 where the codebook has that vector, else minus
    infinity, float32 (`_PATTERNS`, `_PATTERNS`); and its index, int16."""
    digits = codebook("IQ1_S").astype(np.int64) + 1
    first, second = (digits[:, half] @ 3 ** np.arange(4) for half in (slice(4), slice(4, 8)))
    index = np.full((3**4, 3**4), -1)
    index[first, second] = np.arange(len(digits))
    index = index[np.ix_(_PATTERN_NUMBERS, _PATTERN_NUMBERS)]
    missing = np.where(index < 0, -np.inf, 0).astype(np.float32)
    return missing, np.maximum(index, 0).astype(np.int16)


#: Of patterns: their numbers, and ``g² ± g / 4`` moved up and down.
_NUMBERS_OF = _patterns()
_UP_OF, _DOWN_OF = (np.abs(_NUMBERS_OF) + sign * _NUMBERS_OF / _FOUR for sign in (1, -1))
_MISSING, _INDEX = _pairs()


@helper
def prepare(x, w, largest_x, scratch):
    """Write what the search takes of each weight, and of each group what all vectors explain."""
    for i in range(len(x)):
        weight = max(w[i], LEAST_IMPORTANCE)
        scratch[_SLOPES + i] = _TWO * weight * (x[i] / largest_x)
        scratch[_WEIGHTS + i] = weight
    for group in range(len(x) // 8):
        slopes = weights = _ZERO
        for i in range(8 * group, 8 * group + 8):
            slopes += scratch[_SLOPES + i]
            weights += scratch[_WEIGHTS + i]
        scratch[_SHIFTED + group], scratch[_SPREAD + group] = _EIGHTH * slopes, _EIGHTH * _EIGHTH * weights


@helper
def write_sums(sums, numbers, factors):
    """The sums ``Σ factor * number`` of all patterns, from the addresses of their numbers and of four factors."""
    f0, f1 = broadcast_f32xL(factors), broadcast_f32xL(factors + 4)
    f2, f3 = broadcast_f32xL(factors + 8), broadcast_f32xL(factors + 12)
    for at in range(0, _ROW, 4 * LANES):
        found = mul(f0, load_f32xL(numbers + at))
        found = fma(f1, load_f32xL(numbers + _ROW + at), found)
        found = fma(f2, load_f32xL(numbers + 2 * _ROW + at), found)
        store_f32xL(sums + at, fma(f3, load_f32xL(numbers + 3 * _ROW + at), found))


@helper
def sums_of(scratch):
    """The address of the first group's sums of patterns. The values of patterns are in front of them."""
    return aligned(scratch, _VALUES) + 4 * _GROUP_VALUES


@helper
def fill(scratch):
    """The sums of all patterns for each group of a block."""
    sums = sums_of(scratch)
    for half in range(64):
        at = sums + half * (_GROUP_SUMS // 2)
        slopes, weights = address(scratch) + 4 * (_SLOPES + 4 * half), address(scratch) + 4 * (_WEIGHTS + 4 * half)
        write_sums(at, address(_NUMBERS_OF), slopes)
        write_sums(at + _ROW, address(_UP_OF), weights)
        write_sums(at + 2 * _ROW, address(_DOWN_OF), weights)


@helper
def guess(x, scratch, group, scale):
    """Begin to look for a group's vectors at the rounded weights."""
    pattern, place = 0, 1
    for i in range(8 * group, 8 * group + 4):
        if x[i] > _HALF * scale:
            pattern += 2 * place
        elif x[i] >= -_HALF * scale:
            pattern += place
        place *= 3
    scratch[_LIKELY + 2 * group] = scratch[_LIKELY + 2 * group + 1] = np.float32(pattern)


@helper
def write_values(sums, scale, values):
    """What patterns explain with a scale, divided by it: four rows from the address `values` on, of first and of second
    halves moved up, and of both moved down. The largest number of each row is returned."""
    minus = splat_f32xL(-scale)
    first_up = second_up = first_down = second_down = splat_f32xL(_LOWEST)
    for at in range(0, _ROW, 4 * LANES):
        linear, other = load_f32xL(sums + at), sums + _GROUP_SUMS // 2 + at
        up = fma(load_f32xL(sums + _ROW + at), minus, linear)
        down = fma(load_f32xL(sums + 2 * _ROW + at), minus, linear)
        store_f32xL(values + at, up)
        store_f32xL(values + 2 * _ROW + at, down)
        first_up, first_down = larger(up, first_up), larger(down, first_down)
        linear = load_f32xL(other)
        up = fma(load_f32xL(other + _ROW), minus, linear)
        down = fma(load_f32xL(other + 2 * _ROW), minus, linear)
        store_f32xL(values + _ROW + at, up)
        store_f32xL(values + 3 * _ROW + at, down)
        second_up, second_down = larger(up, second_up), larger(down, second_down)
    return largest_four(first_up, second_up, first_down, second_down)


@helper
def best_second(second, pattern):
    """The largest value of a second half that the codebook has with a first half; values are at an address."""
    missing, most = address(_MISSING) + _ROW * pattern, splat_f32xL(_LOWEST)
    for at in range(0, _ROW, 4 * LANES):
        most = larger(add(load_f32xL(second + at), load_f32xL(missing + at)), most)
    return largest(most)


@helper
def second_with(second, pattern, value):
    """The pattern of the second half that has this value."""
    missing, values = address(_MISSING) + _ROW * pattern, splat_f32xL(value)
    for at in range(0, _ROW, 4 * LANES):
        lanes = lanes_at_least(add(load_f32xL(second + at), load_f32xL(missing + at)), values)
        if lanes:
            return at // 4 + lowest_bit(lanes)
    return 0


@helper
def best_vector(first, most_second, likely):
    """What the best vector explains, and the pattern of its first half.

    Parameters
    ----------
    first : address
        Of the values of first halves; those of second halves follow.
    most_second : float32
        The largest of the latter.
    likely : int
        The pattern to begin with. Only first halves that could do better with the best second half follow.
    """
    second = first + _ROW
    best, chosen = load_f32(first + 4 * likely) + best_second(second, likely), likely
    limits = splat_f32xL(best - most_second)
    for at in range(0, _ROW, 4 * LANES):
        lanes = lanes_at_least(load_f32xL(first + at), limits)
        while lanes:
            pattern = at // 4 + lowest_bit(lanes)
            if pattern != likely:
                value = load_f32(first + 4 * pattern) + best_second(second, pattern)
                if value > best:
                    best, chosen = value, pattern
            lanes &= lanes - 1
    return best, chosen


@helper
def of_shift(scratch, first, count, is_down):
    """What the best vectors of some groups explain with a shift, divided by the scale whose values `best_shift` wrote.
    The first halves of these vectors become the likely ones."""
    values, found = aligned(scratch, _VALUES), _ZERO
    for i in range(count):
        likely, row = _LIKELY + 2 * (first + i) + is_down, i * _GROUP_VALUES + 2 * _ROW * is_down
        most_second = scratch[_MOST + 2 * i + is_down]
        value, pattern = best_vector(values + row, most_second, int(scratch[likely]))
        scratch[likely] = np.float32(pattern)
        found += value
    return found


@helper
def best_shift(scratch, first, count, scale):
    """The shift of some groups with which their best vectors explain most with a scale.

    Returns
    -------
    float32
        What they explain, divided by the scale.
    int
        1 if it is down.
    """
    sums, values = sums_of(scratch), aligned(scratch, _VALUES)
    all_up = all_down = bound_up = bound_down = _ZERO
    for i in range(count):
        group = first + i
        first_up, second_up, first_down, second_down = write_values(
            sums + group * _GROUP_SUMS, scale, values + i * _GROUP_VALUES
        )
        scratch[_MOST + 2 * i], scratch[_MOST + 2 * i + 1] = second_up, second_down
        shifted, spread = scratch[_SHIFTED + group], scale * scratch[_SPREAD + group]
        all_up, all_down = all_up + (shifted - spread), all_down - (shifted + spread)
        bound_up, bound_down = bound_up + (first_up + second_up), bound_down + (first_down + second_down)
    bound_up, bound_down = bound_up + all_up, bound_down + all_down
    if bound_up >= bound_down:
        up = all_up + of_shift(scratch, first, count, 0)
        down = all_down + of_shift(scratch, first, count, 1) if bound_down > up else _LOWEST
    else:
        down = all_down + of_shift(scratch, first, count, 1)
        up = all_up + of_shift(scratch, first, count, 0) if bound_up > down else _LOWEST
    return (down, 1) if down > up else (up, 0)


@helper
def best_of_levels(slope, weight, minus, shift):
    """What a weight explains with the best of three levels, divided by the scale, for each of 32 scales."""
    low, high = shift - _ONE, shift + _ONE
    middle = fma(minus, splat_f32x32(weight * shift * shift), splat_f32x32(slope * shift))
    lower = fma(minus, splat_f32x32(weight * low * low), splat_f32x32(slope * low))
    upper = fma(minus, splat_f32x32(weight * high * high), splat_f32x32(slope * high))
    return larger(larger(lower, middle), upper)


def _own_scale_for(small_block, together):
    """Make ``own_scale(scratch, small, farthest)``: the scale that a small block of so many weights would choose if it
    could have all vectors, and what that explains. `together` weights have one shift."""
    curve, count = _CURVE, len(_CURVE)

    @helper
    def own_scale(scratch, small, farthest):
        scales = mul(load_f32x32(address(curve)), splat_f32x32(farthest))
        minus, explained = mul(scales, splat_f32x32(-_ONE)), splat_f32x32(_ZERO)
        for first in range(small * small_block, (small + 1) * small_block, together):
            up = down = splat_f32x32(_ZERO)
            for i in range(first, first + together):
                slope, weight = scratch[_SLOPES + i], scratch[_WEIGHTS + i]
                up = add(up, best_of_levels(slope, weight, minus, _EIGHTH))
                down = add(down, best_of_levels(slope, weight, minus, -_EIGHTH))
            explained = add(explained, larger(up, down))
        values = scratch[_CURVE_VALUES : _CURVE_VALUES + count]
        store_f32x32(address(values), mul(explained, scales))
        at = 0
        for i in range(1, count):
            if values[i] > values[at]:
                at = i
        return farthest * vertex(values, at, count, curve), max(values[at], _ZERO)

    return own_scale


def _best_number_for(small_block, together):
    """Make ``best_number(scratch, small, wanted, d)``: the number of a small block with which it explains most, of the
    two around its own scale, and what it explains."""
    groups, with_shift = small_block // 8, together // 8
    times, plus, top = (np.float32(each) for each in _MULTIPLES)
    last = np.float32(_MULTIPLES.top - 1)

    @helper
    def explained(scratch, small, scale):
        found = _ZERO
        for first in range(small * groups, (small + 1) * groups, with_shift):
            value, _ = best_shift(scratch, first, with_shift, scale)
            found += value
        return scale * found

    @helper
    def best_number(scratch, small, wanted, d):
        below = min(np.float32(int(nearest_number(wanted, d, times, plus, top))), last)
        above = below + _ONE
        gain = explained(scratch, small, d * (times * below + plus))
        gain_above = explained(scratch, small, d * (times * above + plus))
        return (above, gain_above) if gain_above > gain else (below, gain)

    return best_number


def _group_writer_for(vectors, together):
    """Make ``write_groups(scratch, first, scale, block)``: the best vectors of the groups that have one shift, and that
    shift."""
    with_shift = together // 8
    indices, directions = places_of(vectors.indices, 32), places_of((vectors.down,), 32)

    @helper
    def write_groups(scratch, first, scale, block):
        _, is_down = best_shift(scratch, first, with_shift, scale)
        for i in range(with_shift):
            second = aligned(scratch, _VALUES) + i * _GROUP_VALUES + 2 * _ROW * is_down + _ROW
            pattern = int(scratch[_LIKELY + 2 * (first + i) + is_down])
            other = second_with(second, pattern, best_second(second, pattern))
            write(block, indices, first + i, np.int64(_INDEX[pattern, other]))
            write(block, directions, first + i, is_down)

    return write_groups


_NIBBLES = places_of((IQ1_M_HALF,), 4)


@helper
def move_half(block):
    """Move the half that a block begins with to the nibbles where IQ1_M has it."""
    bits = np.int64(block[0]) | np.int64(block[1]) << 8
    block[:2] = 0
    for i in range(4):
        write(block, _NIBBLES, i, bits >> 4 * i)


def _quantiser(qtype, small_block, together, scale_fields, is_spread):
    """The quantiser of a type: `together` weights of a small block have one shift. `is_spread`: the half lies in four
    nibbles, not at the beginning of the block."""
    small_blocks = 256 // small_block
    own_scale, best_number = _own_scale_for(small_block, together), _best_number_for(small_block, together)
    choose = choice_for(_MULTIPLES, small_blocks, _SIZES, best_number)
    numbers = places_of(scale_fields, small_blocks)
    write_groups = _group_writer_for(VECTORS[qtype], together)

    @helper
    def quantise_block(x, w, block, scratch):
        block[:] = 0
        largest_x = largest_magnitude(x, 0, len(x))
        if not largest_x > SMALLEST:
            return
        prepare(x, w, largest_x, scratch)
        fill(scratch)
        for small in range(small_blocks):
            farthest = largest_magnitude(x, small * small_block, (small + 1) * small_block) / largest_x
            scratch[WANTED + small], scratch[GAINS + small] = own_scale(scratch, small, farthest)
            for group in range(small * small_block // 8, (small + 1) * small_block // 8):
                guess(x, scratch, group, scratch[WANTED + small] * largest_x)
        d = choose(block, scratch, largest_x)
        if d > _ZERO:
            if is_spread:
                move_half(block)
            for small in range(small_blocks):
                number = scratch[NUMBERS + small]
                write(block, numbers, small, int(number))
                for first in range(small * small_block // 8, (small + 1) * small_block // 8, together // 8):
                    write_groups(scratch, first, d * (_TWO * number + _ONE), block)

    return Quantiser(quantise_block, _SCRATCH)


QUANTISERS = {
    ggml.IQ1_S: _quantiser(ggml.IQ1_S, 32, 32, VECTORS[ggml.IQ1_S].layout.scales.planes, False),
    ggml.IQ1_M: _quantiser(ggml.IQ1_M, 16, 8, (IQ1_M_SCALES,), True),
}
