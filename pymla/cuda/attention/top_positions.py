"""The positions of the largest scores of a token, in order: a radix select, and a compaction that keeps the order.

The choice is made twice: among the maxima of groups of eight neighbours, and among the scores of the k groups that were
chosen. A group whose maximum is not among the k largest, of equal ones the first, has no score among the k largest. So
of many positions an eighth is looked at, and then eight times k. The result does not depend on the order in which
threads run.
"""

import numpy as np
from numba import cuda

from pymla.cuda.attention.index_input import GROUP
from pymla.cuda.attention.softmax import ZERO
from pymla.cuda.attention.steps import STEP, seen_by
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.array_types import I2, I64, addresses
from pymla.cuda.runtime.jit import device, kernel

__all__ = ["choose_positions"]

#: Threads of a block. It has as many warps as a warp has lanes, at most: a warp adds up what the warps have.
THREADS = 512
WARPS = THREADS // ptx.WARP
#: Sums of warps, of two kinds.
ALL_PARTS = 2 * WARPS
#: Bits of a digit, and the counters of its values.
DIGIT = 11
BINS = 1 << DIGIT
#: Counters that a thread adds up.
OWN_BINS = BINS // THREADS

#: The low half of an int64.
_WORD = 0xFFFFFFFF


@device
def _read_maximum(source, i):
    return ptx.load_f32(source[0] + 4 * i)


@device
def _write_group(source, groups, place, i):
    groups[source[2], place] = i


@device
def _position(source, i):
    """The position of score i of the chosen groups."""
    _, groups, t = source
    return GROUP * groups[t, i // GROUP] + i % GROUP


@device
def _read_score(source, i):
    return ptx.load_f32(source[0] + 4 * _position(source, i))


@device
def _write_position(source, out, place, i):
    out[source[2], place] = _position(source, i)


@device
def key_of(x):
    """An integer from 0 to 2 ** 32 - 1 for a float32, in the same order; 0 and −0 are equal."""
    word = ptx.as_word(x + ZERO)
    return (word if word >= 0 else word ^ 0x7FFFFFFF) + (1 << 31)


@device
def _before(value, parts):
    """The sum of the values of the threads before this one."""
    lane, warp = ptx.lane(), cuda.threadIdx.x >> 5
    total, distance = value, 1
    while distance < ptx.WARP:
        other = ptx.shfl_idx(total, lane - distance)
        total += other if lane >= distance else 0
        distance *= 2
    if lane == ptx.WARP - 1:
        parts[warp] = total
    cuda.syncthreads()
    return total - value + ptx.warp_sum(parts[lane] if lane < warp else 0)


def _last_of(read):
    """A device function (source, count, wanted, shared): the key of the last of `wanted` values in descending order,
    among `count`, and how many values with that key are wanted. A radix select: digit by digit from the highest."""

    @device
    def last(source, count, wanted, shared):
        bins, parts, found = shared
        thread, prefix, high = cuda.threadIdx.x, 0, 32
        while high > 0:
            low = max(high - DIGIT, 0)
            for i in range(thread, BINS, THREADS):
                bins[i] = 0
            cuda.syncthreads()
            for i in range(thread, count, THREADS):
                key = key_of(read(source, i))
                if key >> high == prefix:
                    cuda.atomic.add(bins, key >> low & (1 << high - low) - 1, 1)
            cuda.syncthreads()
            # The first threads have the highest digits.
            digit, own = BINS - 1 - OWN_BINS * thread, 0
            for i in range(OWN_BINS):
                own += bins[digit - i]
            before = _before(own, parts)
            for i in range(OWN_BINS):
                number = bins[digit - i]
                if before < wanted and wanted <= before + number:
                    found[0] = digit - i
                    found[1] = wanted - before
                before += number
            cuda.syncthreads()
            prefix, wanted, high = prefix << high - low | found[0], found[1], low
        return prefix, wanted

    return last


def _compact(read, write):
    """A device function (source, count, last, target, parts): write the values that come no later than `last`, which
    `_last_of` gives, without changing their order. Warps take ranges."""

    @device
    def compact(source, count, last, target, parts):
        key, ties = last
        lane, warp = ptx.lane(), cuda.threadIdx.x >> 5
        length = ((count + THREADS - 1) // THREADS) * ptx.WARP
        begin, end = min(length * warp, count), min(length * warp + length, count)
        larger = equal = 0
        for i in range(begin + lane, end, ptx.WARP):
            mine = key_of(read(source, i))
            larger += 1 if mine > key else 0
            equal += 1 if mine == key else 0
        larger, equal = ptx.warp_sum(larger), ptx.warp_sum(equal)
        if lane == 0:
            parts[warp] = larger
            parts[WARPS + warp] = equal
        cuda.syncthreads()
        larger = ptx.warp_sum(parts[lane] if lane < warp else 0)
        equal = ptx.warp_sum(parts[WARPS + lane] if lane < warp else 0)
        below = (1 << lane) - 1
        for first in range(begin, end, ptx.WARP):
            i, mine = first + lane, -1
            if i < end:
                mine = key_of(read(source, i))
            of_larger, of_equal = ptx.ballot(mine > key), ptx.ballot(mine == key)
            place = larger + cuda.popc(of_larger & below)
            tie = equal + cuda.popc(of_equal & below)
            if mine > key or (mine == key and tie < ties):
                write(source, target, place + min(tie, ties), i)
            larger += cuda.popc(of_larger & _WORD)
            equal += cuda.popc(of_equal & _WORD)

    return compact


def _selection(read, write):
    """A device function (source, count, wanted, target, shared): write the `wanted` largest of `count` values, of equal
    ones the first, in the order in which they are. ``read(source, i)`` is a value, ``write(source, target, place, i)``
    writes value i. `shared` are arrays in shared memory for counters."""
    last_of, compact = _last_of(read), _compact(read, write)

    @device
    def select(source, count, wanted, target, shared):
        compact(source, count, last_of(source, count, wanted, shared), target, shared[1])

    return select


_choose_groups = _selection(_read_maximum, _write_group)
_choose_scores = _selection(_read_score, _write_position)


@kernel(addresses(2), I64, STEP, I2, I2, max_threads=THREADS)
def choose_positions(values, longest, step, groups, out):
    """A block takes a token. `values` are addresses of scores (T, longest) and maxima (T, longest // GROUP); `groups`
    is room for as many groups as `out` has positions."""
    t, thread = cuda.blockIdx.x, cuda.threadIdx.x
    seen, most = seen_by(step, t), out.shape[1]
    if seen <= most:
        for i in range(thread, most, THREADS):
            out[t, i] = i if i < seen else -1
        return
    bins = cuda.shared.array(BINS, np.int32)
    parts = cuda.shared.array(ALL_PARTS, np.int32)
    found = cuda.shared.array(2, np.int32)
    shared = bins, parts, found
    count = (seen + GROUP - 1) // GROUP
    if count > most:
        _choose_groups((values[1] + 4 * (longest // GROUP) * t, groups, t), count, most, groups, shared)
        count = most
    else:
        for i in range(thread, count, THREADS):
            groups[t, i] = i
    cuda.syncthreads()
    # A position that the token does not see has a score of −inf and is behind all others: none is chosen.
    _choose_scores((values[0] + 4 * longest * t, groups, t), GROUP * count, most, out, shared)
