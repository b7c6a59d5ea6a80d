"""The search of types whose codes stand for levels of a table, which are not evenly spaced and not symmetric.

A weight is ``d * number * level``. `d` is a float of a block of 256 weights, or of a row; `number` is the integer scale
of a small block of 16 or 32 weights, of either sign; all levels of a small block may be moved up by a constant. The
search takes three steps. Their candidates lie in the lanes of registers; `pymla.cpu.quantise.search` says what a pass
over the weights costs.

1. *Fit.* For each small block, for either sign and with the levels moved or not (its *options*): sixteen float scales.
   The best one, s, is kept with Q = Σ w·level² and the gain (Σ w·x·level)² / Q. With the same codes, a scale t leaves
   an error of ``Q * (t - s)**2 - gain``, less Σ w·x².
2. *Choose.* By these parabolas alone, without another look at the weights: the best `d` of 64, twice.
3. *Attempt.* With that `d`, each small block tries eight numbers about each option, with the nearest codes under each
   of them, and keeps the best. The best `d` for these codes is the next attempt, for as long as the error falls.

Weights are multiplied by a power of two, so that the largest of a block, or of a row, is between 1 and 2. Sums are
taken in the same order at all levels of instructions, which therefore write the same bytes.
"""

import math
from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.cpu.machine.simd import (
    absolute,
    add,
    address,
    div,
    fma,
    larger,
    largest,
    mul,
    round_even,
    sub,
    where_positive,
)
from pymla.cpu.machine.simd_levels import as_halves, nearest_of
from pymla.cpu.machine.simd_memory import load_f32, store_f16, store_f32
from pymla.cpu.machine.simd_quantise import (
    broadcast_f32x16,
    first_lane,
    lane_value,
    load_f32x16,
    ramp,
    ramp_of_halves,
    smaller,
    smallest,
    splat_f32x16,
    store_f32x16,
)
from pymla.cpu.quantise.packing import code_packer, field_writer
from pymla.cpu.quantise.quantiser import Quantiser
from pymla.cpu.quantise.search import extremes, inverse_of
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.planes import LAYOUTS, ROW_FLOAT, ROW_HALF

_ZERO, _ONE = np.float32(0), np.float32(1)
#: A small block whose weights are all below this, where the largest of the block is 1 or more, is zero.
_SMALLEST = np.float32(2.0**-40)
#: Floats of the work memory: weights and importance of a small block, codes of a block; records of small blocks.
_WEIGHTS_AT, _CODES_AT, _RECORDS_AT, _RECORD = 32, 64, 128, 16
#: Bytes in a record: three float32 for each option; number and move as kept; the same as attempted.
_OPTION, _KEPT, _ATTEMPTED = 12, 48, 56
#: Attempts that begin with one choice of `d`.
_ATTEMPTS = 3


class Numbers(NamedTuple):
    """Integer scales of small blocks: ``lowest + step * k`` for k from 0 to `count` - 1."""

    lowest: int
    step: int
    count: int

    @property
    def highest(self):
        """The largest number."""
        return self.lowest + self.step * (self.count - 1)


class Spread(NamedTuple):
    """Levels that the farthest weight of a small block is taken for in a fit, as multiples of the last level on its
    side: ``first + step * lane``. Above 1 it is clipped."""

    first: float
    step: float


class Scaled(NamedTuple):
    """Weights of a block or a row, and the work memory; `x`, `w` and `work` are addresses."""

    x: int
    w: int
    work: int
    small_blocks: int
    exponent: int  # the weights of which the search knows are x / 2 ** exponent
    unit: float  # 2 ** exponent
    per_unit: float  # 2 ** -exponent


@inlined
def scaled(x, w, scratch, small_blocks):
    """Weights whose largest is from 1 to 2 after division by a power of two, or below it where that power is out of
    reach."""
    low, high = extremes(address(x), len(x))
    _, exponent = math.frexp(max(high, -low))
    exponent = min(max(exponent - 1, -120), 126)
    unit, per_unit = np.float32(math.ldexp(1.0, exponent)), np.float32(math.ldexp(1.0, -exponent))
    return Scaled(address(x), address(w), address(scratch), small_blocks, exponent, unit, per_unit)


@inlined
def take(block, i, each):
    """Weights and importance of a small block of `each` weights to the work memory."""
    per_unit = splat_f32x16(block.per_unit)
    x, w, work = block.x + 4 * each * i, block.w + 4 * each * i, block.work
    for at in range(0, 4 * each, 64):
        store_f32x16(work + at, mul(load_f32x16(x + at), per_unit))
        store_f32x16(work + 4 * _WEIGHTS_AT + at, load_f32x16(w + at))


@inlined
def record_of(block, i):
    """The address of a small block's record."""
    return block.work + 4 * (_RECORDS_AT + _RECORD * i)


def sums_for(level, moved, each):
    """Make ``sums(work, inverse, move)``: for each lane the sums of w·x·q and of w·q·q of the small block at `work`. Of
    the levels, moved up by the lane's `move`, q is the nearest one to ``x * inverse``."""

    @inlined
    def sums(work, inverse, move):
        xq = qq = splat_f32x16(_ZERO)
        for at in range(work, work + 4 * each, 4):
            x = broadcast_f32x16(at)
            q = level(sub(mul(x, inverse), move)) if moved else level(mul(x, inverse))
            q = add(q, move) if moved else q
            product = mul(broadcast_f32x16(at + 4 * _WEIGHTS_AT), q)
            xq, qq = fma(product, x, xq), fma(product, q, qq)
        return xq, qq

    return sums


@inlined
def best_fit(xq, qq):
    """Of candidates with free scales: the best one's gain, its lane, its scale and its sum of w·q·q."""
    gains = where_positive(qq, div(mul(xq, xq), qq))
    gain = largest(gains)
    lane = first_lane(gains, gain)
    square = lane_value(qq, lane)
    scale = lane_value(xq, lane) / square if square > _ZERO else _ZERO
    return gain, lane, scale, square


@inlined
def costs(scale, xq, qq):
    """For each lane the error with a given scale, less Σ w·x²."""
    return mul(scale, sub(mul(scale, qq), add(xq, xq)))


@inlined
def inverses(scale):
    """For each lane ``1 / scale``, and 0 of 0."""
    return where_positive(absolute(scale), div(splat_f32x16(_ONE), scale))


@inlined
def halves(d, block):
    """For each lane the number next to `d` that an IEEE half has, in the block's unit."""
    return mul(as_halves(mul(d, splat_f32x16(block.unit))), splat_f32x16(block.per_unit))


def fit_for(sums, levels, moved, each, spread):
    """Make ``fit(block, i)``, the first step for a small block: for each option scale, Q and gain to its record."""
    options, first, step = 4 if moved else 2, np.float32(spread.first), np.float32(spread.step)
    last_below, last_above = np.float32(-levels[0]), np.float32(levels[-1])

    @helper
    def fit(block, i):
        take(block, i, each)
        record, (low, high) = record_of(block, i), extremes(block.work, each)
        farthest = max(high, -low)
        for option in range(options):
            is_negative, move = option % 2 == 1, np.float32(option // 2 * moved)
            scale, square, gain = _ZERO, _ONE, _ZERO
            if farthest >= _SMALLEST:
                reach = last_above if (high >= -low) != is_negative else last_below
                inverse = mul(ramp(first, step), splat_f32x16((-reach if is_negative else reach) / farthest))
                gain, _, scale, square = best_fit(*sums(block.work, inverse, splat_f32x16(move)))
            at = record + _OPTION * option
            store_f32(at, scale)
            store_f32(at + 4, square)
            store_f32(at + 8, gain)

    return fit


def choice_for(numbers, options, is_half):
    """Make ``choose(block, start)``, the second step, with two starts: the best of 64 `d`, 0 where all weights are 0.

    They give the scale that is farthest from zero a number from 1.4 to 0.6 times the lowest one, or the highest one.
    Where numbers are symmetric, either is as good: the starts are then 1.4 to 1 and 1 to 0.6 times the lowest one.
    """
    parts, is_symmetric = 4, numbers.lowest == -numbers.highest
    ends = np.array([numbers.lowest, numbers.lowest if is_symmetric else numbers.highest], np.float32)
    first_ratios = np.array([1.4, 1.0 if is_symmetric else 1.4], np.float32)
    width = np.float32((0.4 if is_symmetric else 0.8) / (16 * parts))
    lowest, step, last = (np.float32(value) for value in (numbers.lowest, numbers.step, numbers.count - 1))
    first_k = np.float32(-numbers.lowest / numbers.step)

    @inlined
    def farthest_scale(block):
        """Of the scales of each small block's best option the one that is farthest from zero."""
        farthest = _ZERO
        for i in range(block.small_blocks):
            best, scale = _ZERO, _ZERO
            for at in range(record_of(block, i), record_of(block, i) + _OPTION * options, _OPTION):
                if load_f32(at + 8) > best:
                    best, scale = load_f32(at + 8), load_f32(at)
            if abs(scale) > abs(farthest):
                farthest = scale
        return farthest

    @inlined
    def cost_of(record, d, per_step):
        """What a small block adds to the error with each `d`."""
        cost = splat_f32x16(_ZERO)
        for at in range(record, record + _OPTION * options, _OPTION):
            scale = broadcast_f32x16(at)
            k = round_even(fma(scale, per_step, splat_f32x16(first_k)))
            k = larger(smaller(k, splat_f32x16(last)), splat_f32x16(_ZERO))
            number = fma(k, splat_f32x16(step), splat_f32x16(lowest))
            off = sub(mul(number, d), scale)
            parabola = sub(mul(mul(broadcast_f32x16(at + 4), off), off), broadcast_f32x16(at + 8))
            cost = smaller(parabola, cost)
        return cost

    @helper
    def choose(block, start):
        at_end, best_cost, best = splat_f32x16(farthest_scale(block) / ends[start]), _ZERO, _ZERO
        for part in range(parts):
            d = div(at_end, ramp(first_ratios[start] - np.float32(16 * part) * width, -width))
            if is_half:
                d = halves(d, block)
            per_step, cost = div(splat_f32x16(_ONE / step), d), splat_f32x16(_ZERO)
            for i in range(block.small_blocks):
                cost = add(cost, cost_of(record_of(block, i), d, per_step))
            least = smallest(cost)
            if least < best_cost:
                best_cost, best = least, lane_value(d, first_lane(cost, least))
        return best

    return choose


def attempt_for(sums, numbers, moved, each, is_half):
    """Make ``attempt(block, d)``, the third step: number and move of each small block to its record. Returns the error,
    less Σ w·x², and the best `d` for the codes that were found."""
    lowest, step, last_first = (np.float32(value) for value in (numbers.lowest, numbers.step, numbers.count - 8))
    first_k, before, variants = np.float32(-numbers.lowest / numbers.step), np.float32(3), 2 if moved else 1

    @inlined
    def first_of_eight(scale, per_step):
        """The first k of the eight that are tried for a scale."""
        return min(max(np.floor(scale * per_step + first_k) - before, _ZERO), last_first)

    @inlined
    def candidates(record, per_step):
        """Numbers about the scales of two options: eight for the positive one, eight for the negative one."""
        above = first_of_eight(load_f32(record), per_step)
        below = first_of_eight(load_f32(record + _OPTION), per_step)
        return fma(ramp_of_halves(above, _ONE, below, _ONE), splat_f32x16(step), splat_f32x16(lowest))

    @inlined
    def best_of(block, record, d, per_step):
        """A small block's best error, number, move, and its sums of w·x·q and w·q·q."""
        best = (np.float32(np.inf), _ZERO, _ZERO, _ZERO, _ZERO)
        for variant in range(variants):
            tried, move = candidates(record + 2 * _OPTION * variant, per_step), np.float32(moved * variant)
            scale = mul(tried, splat_f32x16(d))
            xq, qq = sums(block.work, inverses(scale), splat_f32x16(move))
            cost = costs(scale, xq, qq)
            least = smallest(cost)
            if least < best[0]:
                lane = first_lane(cost, least)
                best = (least, lane_value(tried, lane), move, lane_value(xq, lane), lane_value(qq, lane))
        return best

    @helper
    def attempt(block, d):
        error, numerator, denominator = 0.0, 0.0, 0.0
        per_step = _ONE / (d * step)
        for i in range(block.small_blocks):
            take(block, i, each)
            record = record_of(block, i)
            cost, number, move, xq, qq = best_of(block, record, d, per_step)
            store_f32(record + _ATTEMPTED, number)
            store_f32(record + _ATTEMPTED + 4, move)
            error += np.float64(cost)
            numerator += np.float64(number) * np.float64(xq)
            denominator += np.float64(number) * np.float64(number) * np.float64(qq)
        refined = np.float32(numerator / denominator) if denominator > 0 else d
        if is_half:
            refined = lane_value(halves(splat_f32x16(refined), block), 0)
        return error, refined

    return attempt


@inlined
def keep_attempt(block):
    """The last attempt becomes the one that is kept."""
    for i in range(block.small_blocks):
        record = record_of(block, i)
        store_f32(record + _KEPT, load_f32(record + _ATTEMPTED))
        store_f32(record + _KEPT + 4, load_f32(record + _ATTEMPTED + 4))


def search_for(level, levels, numbers, moved, each, spread, is_half):
    """Make ``search(block)``: all steps. Numbers and moves are in the records; returns `d`, 0 where that is best."""
    sums = sums_for(level, moved, each)
    fit = fit_for(sums, levels, moved, each, spread)
    choose = choice_for(numbers, 4 if moved else 2, is_half)
    attempt = attempt_for(sums, numbers, moved, each, is_half)

    @helper
    def search(block):
        for i in range(block.small_blocks):
            fit(block, i)
            store_f32(record_of(block, i) + _KEPT, _ZERO)
            store_f32(record_of(block, i) + _KEPT + 4, _ZERO)
        best_error, best = 0.0, _ZERO
        for start in range(2):
            d = choose(block, start)
            for _ in range(_ATTEMPTS):
                if d == _ZERO:
                    break
                error, refined = attempt(block, d)
                if error >= best_error:
                    break
                keep_attempt(block)
                best_error, best = error, d
                if refined == d:
                    break
                d = refined
        return best

    return search


def writer_for(layout, store_codes, numbers, moved, nbytes):
    """Make ``write(block, i, d, out, codes)``: codes, numbers and moves of 256 weights, whose first small block is the
    `i`-th, to a block of bytes, `out`. `codes` is where the work memory has room for them."""
    each, count = layout.each, 256 // layout.each
    pack, put_number = code_packer(layout.codes.planes, 256), field_writer(layout.scales.planes, count)
    put_sign = field_writer((layout.scales.negative,), count) if layout.scales.negative else put_number
    put_move = field_writer((layout.codes.variants,), count) if moved else put_number
    is_signed, has_sign, half_of_numbers = layout.scales.signed, layout.scales.negative is not None, numbers.count // 2
    lowest, step, shift = np.float32(numbers.lowest), np.float32(numbers.step), first_shift(layout.scales.planes)

    @inlined
    def put_scale(out, j, k):
        """The k-th number as the scale of a small block."""
        if has_sign:
            put_sign(out, j, 1 if k < half_of_numbers else 0)
            put_number(out, j, k - half_of_numbers if k >= half_of_numbers else half_of_numbers - 1 - k)
        elif is_signed:
            put_number(out, j, k + half_of_numbers & 255)
        else:
            put_number(out, j, k << shift)

    @helper
    def write(block, i, d, out, codes):
        for j in range(nbytes):
            out[j] = 0
        for j in range(count):
            record = record_of(block, i + j)
            number, move = load_f32(record + _KEPT), load_f32(record + _KEPT + 4)
            put_scale(out, j, np.int64((number - lowest) / step))
            if moved:
                put_move(out, j, 1 if move > _ZERO else 0)
            take(block, i + j, each)
            inverse, moves = splat_f32x16(inverse_of(number * d)), splat_f32x16(move)
            for at in range(0, each, 16):
                x = mul(load_f32x16(block.work + 4 * at), inverse)
                store_codes(block.work + 4 * _CODES_AT + each * j + at, sub(x, moves) if moved else x)
        pack(codes, out)

    return write


def first_shift(planes):
    """The lowest bit of numbers that any plane has: in types whose numbers are even it is not 0."""
    return min(plane.shift for plane in planes)


def level_quantiser(qtype, numbers, spread):
    """The quantiser of a type whose layout has levels and integer scales.

    Parameters
    ----------
    qtype : int
    numbers : Numbers
        What its integer scales may be.
    spread : Spread
    """
    layout, header, nbytes = LAYOUTS[qtype], ggml.ROW_HEADER[qtype], ggml.BLOCK_BYTES[qtype]
    levels, moved, each = layout.codes.levels, layout.codes.moved, layout.each
    is_float, scale_at = layout.scale == ROW_FLOAT, layout.scale_at
    level, store_codes = nearest_of(levels, range(len(levels)))
    search = search_for(level, levels, numbers, moved, each, spread, not is_float)
    write = writer_for(layout, store_codes, numbers, moved, nbytes)

    @inlined
    def found(x, w, scratch):
        """The block or row, and its `d`."""
        block = scaled(x, w, scratch, len(x) // each)
        return block, search(block)

    @helper
    def quantise_block(x, w, out, scratch):
        block, d = found(x, w, scratch)
        write(block, 0, d, out, scratch[_CODES_AT:_RECORDS_AT].view(np.uint8))
        store_f16(address(out) + scale_at, d * block.unit)

    @helper
    def quantise_row(x, w, out, scratch):
        block, d = found(x, w, scratch)
        for b in range(len(x) // 256):
            at = header + b * nbytes
            write(block, b * (256 // each), d, out[at : at + nbytes], scratch[_CODES_AT:_RECORDS_AT].view(np.uint8))
        if is_float:
            store_f32(address(out), d * block.unit)
        else:
            store_f16(address(out), d * block.unit)

    if layout.scale in (ROW_FLOAT, ROW_HALF):
        # K numbers more than these are there, and a record for each small block takes half as many.
        return Quantiser(quantise_row, _RECORDS_AT, whole_rows=True)
    return Quantiser(quantise_block, _RECORDS_AT + _RECORD * (256 // each))
