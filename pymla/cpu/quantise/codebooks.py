"""IQ2 and IQ3: magnitudes of eight or four neighbouring weights together are an entry of a codebook.

The error of a group of weights x with the scale s, an entry g and its best signs is

    Σ w (|x| - s g)²  =  Σ w x²  -  s (Σ 2 w |x| g  -  s Σ w g²)

so that each entry is a straight line over s: the two sums of all entries are taken once for a block, and a scale then
costs a product and a comparison for each register of entries. No entry is left out, as it may be where only those near
the rounded weights are looked at, and importance and magnitudes decide together.

Some types store seven signs for eight weights, the last one so that the number of negative weights is even. Where it is
odd, one weight gets the wrong sign, which costs ``4 w |x| g`` of the sum above: the cheapest weight is another one for
each entry, and the search takes it into account. Where two entries share eight signs, the wrong one is in either.

A small block of weights would choose the largest of what its groups' best entries explain: a curve over s, of which
some points are computed. `block_scales` finds the float number of the block from that. Its candidates, and up to four
multiples of each for a small block, are compared by the curves' exact values.
"""

import numpy as np

from pymla import ggml
from pymla.codebooks import codebook
from pymla.cpu.machine.simd import (
    address,
    broadcast_f32xL,
    fma,
    larger,
    largest,
    load_f32xL,
    mul,
    splat_f32xL,
    store_f32xL,
    sub,
)
from pymla.cpu.machine.simd_search import lanes_at_least, largest_four, lowest_bit
from pymla.cpu.quantise import block_scales
from pymla.cpu.quantise.block_scales import GAINS, NUMBERS, WANTED, Multiples, choice_for, nearest_number, vertex
from pymla.cpu.quantise.fields import places_of, write
from pymla.cpu.quantise.quantiser import Quantiser
from pymla.cpu.quantise.search import SMALLEST
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.cpu.runtime.isa import LANES
from pymla.vectors import VECTORS

#: Importance below this, as a part of the largest one of a block, counts as this: so a weight that hardly matters still
#: becomes a number near it.
LEAST_IMPORTANCE = np.float32(1e-7)
#: Scales at which a small block's curve is computed, four at a time until four in a row explain less than those before
#: them: as parts of the scale that just reaches the largest weight. Where all weights are about equally large, four
#: larger ones may be better, with which weights are the smaller levels.
_CURVE = (1.15 * 0.9 ** np.arange(40)).astype(np.float32)
_LARGER_SCALES = 4
#: Candidates for the number of a block.
_SIZES = block_scales.ranges(0.9, 1.4, 3)

_ZERO, _TWO = np.float32(0), np.float32(2)
_LOWEST = np.float32(-np.inf)

# Where the numbers of a block are in its scratch, behind those of `block_scales`: of each weight ``2 w |x|`` and w; of
# each run of eight weights whether one sign is wrong; a curve; and the sums of entries, which begin where a cache line
# does.
_SLOPES = block_scales.SCRATCH
_WEIGHTS, _ODD, _VALUES = _SLOPES + 256, _SLOPES + 512, _SLOPES + 544
_SUMS = _VALUES + _LARGER_SCALES + len(_CURVE)
#: Bytes of a cache line.
CACHE_LINE = 64


@inlined
def add_four(sums, entries, levels, slopes, weights, is_first):
    """Add the parts of four weights to the sums of all entries.

    Parameters
    ----------
    sums : address
        Of `entries` float32, ``Σ 2 w |x| g``, and as many behind them, ``Σ w g²``. Multiples of 64 bytes.
    levels : address
        Of the entries' magnitudes for the first of these weights, float32; those for the next one follow.
    slopes, weights : addresses
        Of four numbers ``2 w |x|`` and of four numbers w.
    is_first : bool
        Whether they are the first of the entries' weights. A literal.
    """
    row = 4 * entries
    slope_0, slope_1 = broadcast_f32xL(slopes), broadcast_f32xL(slopes + 4)
    slope_2, slope_3 = broadcast_f32xL(slopes + 8), broadcast_f32xL(slopes + 12)
    weight_0, weight_1 = broadcast_f32xL(weights), broadcast_f32xL(weights + 4)
    weight_2, weight_3 = broadcast_f32xL(weights + 8), broadcast_f32xL(weights + 12)
    for at in range(0, row, 4 * LANES):
        if is_first:
            linear = square = splat_f32xL(_ZERO)
        else:
            linear, square = load_f32xL(sums + at), load_f32xL(sums + row + at)
        level = load_f32xL(levels + at)
        linear, square = fma(slope_0, level, linear), fma(mul(weight_0, level), level, square)
        level = load_f32xL(levels + row + at)
        linear, square = fma(slope_1, level, linear), fma(mul(weight_1, level), level, square)
        level = load_f32xL(levels + 2 * row + at)
        linear, square = fma(slope_2, level, linear), fma(mul(weight_2, level), level, square)
        level = load_f32xL(levels + 3 * row + at)
        linear, square = fma(slope_3, level, linear), fma(mul(weight_3, level), level, square)
        store_f32xL(sums + at, linear)
        store_f32xL(sums + row + at, square)


@inlined
def write_with_wrong_sign(linear, to, entries, levels, slopes, size):
    """The sums ``Σ 2 w |x| g`` of all entries with the wrong sign for the weight that it costs least, from one address
    to another, which may be the same; `size` weights are of an entry."""
    row = 4 * entries
    for at in range(0, row, 4 * LANES):
        least = splat_f32xL(_LOWEST)
        for j in range(size):
            product = mul(broadcast_f32xL(slopes + 4 * j), load_f32xL(levels + j * row + at))
            least = larger(sub(splat_f32xL(_ZERO), product), least)
        store_f32xL(to + at, fma(least, splat_f32xL(_TWO), load_f32xL(linear + at)))


@helper
def largest_of_scales(linear, square, entries, s0, s1, s2, s3):
    """For each of four scales the largest of all entries' ``linear - scale * square``; sums are at addresses."""
    n0, n1, n2, n3 = splat_f32xL(-s0), splat_f32xL(-s1), splat_f32xL(-s2), splat_f32xL(-s3)
    m0 = m1 = m2 = m3 = splat_f32xL(_LOWEST)
    for at in range(0, 4 * entries, 4 * LANES):
        a, b = load_f32xL(linear + at), load_f32xL(square + at)
        m0, m1 = larger(fma(b, n0, a), m0), larger(fma(b, n1, a), m1)
        m2, m3 = larger(fma(b, n2, a), m2), larger(fma(b, n3, a), m3)
    return largest_four(m0, m1, m2, m3)


@helper
def best_entry(linear, square, entries, scale):
    """The entry with the largest ``linear - scale * square``, and that number: the first one of several."""
    minus, most = splat_f32xL(-scale), splat_f32xL(_LOWEST)
    for at in range(0, 4 * entries, 4 * LANES):
        most = larger(fma(load_f32xL(square + at), minus, load_f32xL(linear + at)), most)
    value = largest(most)
    values = splat_f32xL(value)
    for at in range(0, 4 * entries, 4 * LANES):
        lanes = lanes_at_least(fma(load_f32xL(square + at), minus, load_f32xL(linear + at)), values)
        if lanes:
            return at // 4 + lowest_bit(lanes), value
    return 0, value


@helper
def cheapest(scratch, first, table, entry):
    """Which weight of an entry it costs least to give the wrong sign; its numbers ``2 w |x|`` begin at `first`."""
    best = 0
    for j in range(1, len(table)):
        if scratch[first + j] * table[j, entry] < scratch[first + best] * table[best, entry]:
            best = j
    return best


@helper
def largest_magnitude(x, first, last):
    """Of float32 from `first` on and before `last`."""
    found = _ZERO
    for i in range(first, last):
        found = max(found, abs(x[i]))
    return found


@helper
def aligned(scratch, first):
    """The address of a number of the scratch, the first one from `first` on at which a cache line begins."""
    return (address(scratch) + 4 * first + CACHE_LINE - 1) & -CACHE_LINE


@helper
def prepare(x, w, largest_x, scratch):
    """Write what the search takes of each weight, and which runs of eight have an odd number of negative ones."""
    for i in range(len(x)):
        weight = max(w[i], LEAST_IMPORTANCE)
        scratch[_SLOPES + i] = _TWO * weight * (abs(x[i]) / largest_x)
        scratch[_WEIGHTS + i] = weight
    for run in range(len(x) // 8):
        negative = 0
        for i in range(8 * run, 8 * run + 8):
            negative += x[i] < _ZERO
        scratch[_ODD + run] = np.float32(negative & 1)


class _Search:
    """The functions of the search for one type, and where sums of entries lie."""

    def __init__(self, qtype):
        vectors = VECTORS[qtype]
        self.vectors = vectors
        self.table = np.ascontiguousarray(codebook(vectors.name).T.astype(np.float32))
        self.size, self.entries = self.table.shape
        self.has_parity = vectors.signs.bits == 7
        # Two sums of each entry, and where two groups share eight signs the first one with a wrong sign.
        self.sums = 3 if self.has_parity and self.size == 4 else 2
        self.group_bytes = 4 * self.sums * self.entries
        self.run_bytes = self.group_bytes * (8 // self.size)
        self.runs = vectors.layout.each // 8
        self.small_blocks = 256 // vectors.layout.each
        scales = vectors.layout.scales
        self.multiples = Multiples(scales.times, scales.plus, (1 << scales.planes[0].bits) - 1)
        self.scratch = _SUMS + CACHE_LINE // 4 + 32 * self.run_bytes // 4


def _sums_for(search):
    """Make ``fill(scratch)``: the sums of all entries for each group of a block."""
    table, size, entries, has_parity = search.table, search.size, search.entries, search.has_parity
    row, group_bytes = 4 * entries, search.group_bytes

    @helper
    def fill(scratch):
        sums, levels = aligned(scratch, _SUMS), address(table)
        for group in range(256 // size):
            at = sums + group * group_bytes
            slopes = address(scratch) + 4 * (_SLOPES + group * size)
            weights = address(scratch) + 4 * (_WEIGHTS + group * size)
            add_four(at, entries, levels, slopes, weights, True)
            if size == 8:
                add_four(at, entries, levels + 4 * row, slopes + 16, weights + 16, False)
            if has_parity and scratch[_ODD + group * size // 8] > _ZERO:
                to = at if size == 8 else at + 2 * row
                write_with_wrong_sign(at, to, entries, levels, slopes, size)

    return fill


def _explained_for(search):
    """Make ``explained(scratch, small, s0, s1, s2, s3)``: how much of a small block's weighted squared sum four scales
    explain, with the best entries for each."""
    size, entries, has_parity, runs = search.size, search.entries, search.has_parity, search.runs
    row, group_bytes, run_bytes = 4 * entries, search.group_bytes, search.run_bytes

    @helper
    def of_run(at, is_odd, s0, s1, s2, s3):
        """Of eight weights, whose sums begin at an address, each divided by its scale."""
        a0, a1, a2, a3 = largest_of_scales(at, at + row, entries, s0, s1, s2, s3)
        if size == 8:
            return a0, a1, a2, a3
        second = at + group_bytes
        b0, b1, b2, b3 = largest_of_scales(second, second + row, entries, s0, s1, s2, s3)
        if not (has_parity and is_odd):
            return a0 + b0, a1 + b1, a2 + b2, a3 + b3
        c0, c1, c2, c3 = largest_of_scales(at + 2 * row, at + row, entries, s0, s1, s2, s3)
        d0, d1, d2, d3 = largest_of_scales(second + 2 * row, second + row, entries, s0, s1, s2, s3)
        return max(c0 + b0, a0 + d0), max(c1 + b1, a1 + d1), max(c2 + b2, a2 + d2), max(c3 + b3, a3 + d3)

    @helper
    def explained(scratch, small, s0, s1, s2, s3):
        sums = aligned(scratch, _SUMS)
        t0 = t1 = t2 = t3 = _ZERO
        for run in range(small * runs, (small + 1) * runs):
            v0, v1, v2, v3 = of_run(sums + run * run_bytes, scratch[_ODD + run] > _ZERO, s0, s1, s2, s3)
            t0, t1, t2, t3 = t0 + v0, t1 + v1, t2 + v2, t3 + v3
        return s0 * t0, s1 * t1, s2 * t2, s3 * t3

    return explained


def _own_scale_for(search, explained):
    """Make ``own_scale(scratch, small, reach)``: the scale that a small block would choose, and what it explains;
    `reach` is the scale that just reaches its largest weight."""
    larger_scales = np.geomspace(search.table.max() / search.table.min(), 1.4, _LARGER_SCALES)
    curve = np.concatenate([larger_scales, _CURVE]).astype(np.float32)

    @helper
    def own_scale(scratch, small, reach):
        values = scratch[_VALUES : _VALUES + len(curve)]
        at = count = 0
        while count < len(curve) and (at >= count - 4 or count < 12):
            first = count
            values[first], values[first + 1], values[first + 2], values[first + 3] = explained(
                scratch,
                small,
                reach * curve[first],
                reach * curve[first + 1],
                reach * curve[first + 2],
                reach * curve[first + 3],
            )
            count += 4
            for i in range(first, count):
                if values[i] > values[at]:
                    at = i
        return reach * vertex(values, at, count, curve), max(values[at], _ZERO)

    return own_scale


def _best_number_for(search, explained):
    """Make ``best_number(scratch, small, wanted, d)``: the number of a small block with which it explains most, of four
    around its own scale, and what it explains."""
    times, plus, top = (np.float32(each) for each in search.multiples)
    last = np.float32(search.multiples.top - 3)
    one, three = np.float32(1), np.float32(3)

    @helper
    def best_number(scratch, small, wanted, d):
        below = np.float32(int(nearest_number(wanted, d, times, plus, top))) - one
        first = min(max(below, _ZERO), last)
        s0, s1 = d * (times * first + plus), d * (times * (first + one) + plus)
        s2, s3 = d * (times * (first + _TWO) + plus), d * (times * (first + three) + plus)
        v0, v1, v2, v3 = explained(scratch, small, s0, s1, s2, s3)
        number, gain = first, v0
        if v1 > gain:
            number, gain = first + one, v1
        if v2 > gain:
            number, gain = first + _TWO, v2
        if v3 > gain:
            number, gain = first + three, v3
        return number, gain

    return best_number


def _run_writer_for(search):
    """Make ``write_run(x, scratch, run, scale, block)``: the best entries of eight weights, and their signs."""
    table, size, entries, has_parity = search.table, search.size, search.entries, search.has_parity
    row, group_bytes, run_bytes = 4 * entries, search.group_bytes, search.run_bytes
    indices = places_of(search.vectors.indices, 256 // size)
    sign_places = places_of((search.vectors.signs,), 32)

    @helper
    def write_run(x, scratch, run, scale, block):
        at = aligned(scratch, _SUMS) + run * run_bytes
        first = 8 * run
        is_wrong = has_parity and scratch[_ODD + run] > _ZERO
        signs = 0
        for i in range(8):
            if x[first + i] < _ZERO:
                signs |= 1 << i
        entry, value = best_entry(at, at + row, entries, scale)
        if size == 8:
            write(block, indices, run, entry)
            if is_wrong:
                signs ^= 1 << cheapest(scratch, _SLOPES + first, table, entry)
        else:
            second = at + group_bytes
            other, other_value = best_entry(second, second + row, entries, scale)
            if is_wrong:
                wrong, wrong_value = best_entry(at + 2 * row, at + row, entries, scale)
                other_wrong, other_wrong_value = best_entry(second + 2 * row, second + row, entries, scale)
                if wrong_value + other_value > value + other_wrong_value:
                    entry = wrong
                    signs ^= 1 << cheapest(scratch, _SLOPES + first, table, wrong)
                else:
                    other = other_wrong
                    signs ^= 16 << cheapest(scratch, _SLOPES + first + 4, table, other_wrong)
            write(block, indices, 2 * run, entry)
            write(block, indices, 2 * run + 1, other)
        write(block, sign_places, run, signs)

    return write_run


def _quantiser(qtype):
    """The quantiser of a type."""
    search = _Search(qtype)
    layout, small_blocks, runs = search.vectors.layout, search.small_blocks, search.runs
    times, plus = np.float32(search.multiples.times), np.float32(search.multiples.plus)
    per_block, highest_level = layout.each, np.float32(search.table.max())
    fill, explained = _sums_for(search), _explained_for(search)
    own_scale, write_run = _own_scale_for(search, explained), _run_writer_for(search)
    choose = choice_for(search.multiples, small_blocks, _SIZES, _best_number_for(search, explained))
    numbers = places_of(layout.scales.planes, small_blocks)

    @helper
    def quantise_block(x, w, block, scratch):
        block[:] = 0
        largest_x = largest_magnitude(x, 0, len(x))
        if not largest_x > SMALLEST:
            return
        prepare(x, w, largest_x, scratch)
        fill(scratch)
        for small in range(small_blocks):
            reach = largest_magnitude(x, small * per_block, (small + 1) * per_block) / largest_x / highest_level
            scratch[WANTED + small], scratch[GAINS + small] = own_scale(scratch, small, reach)
        d = choose(block, scratch, largest_x)
        if d > _ZERO:
            for small in range(small_blocks):
                number = scratch[NUMBERS + small]
                write(block, numbers, small, int(number))
                for run in range(small * runs, (small + 1) * runs):
                    write_run(x, scratch, run, d * (times * number + plus), block)

    return Quantiser(quantise_block, search.scratch)


QUANTISERS = {qtype: _quantiser(qtype) for qtype in (ggml.IQ2_XXS, ggml.IQ2_XS, ggml.IQ2_S, ggml.IQ3_XXS, ggml.IQ3_S)}
