"""A token drawn from a row, under filters that keep its likeliest tokens: one kernel."""

import numpy as np
from numba import cuda, types

from pymla.cuda.machine import ptx
from pymla.cuda.runtime.array_types import F2, I2, L2
from pymla.cuda.runtime.jit import device, kernel
from pymla.cuda.sampling.philox import philox
from pymla.cuda.sampling.rows import INFINITY, LOG2E_F32, SEGMENT, THREADS, ZERO, block_sum, row_maximum, row_normaliser

#: Candidates under top-k that shared memory has room for; where there are more, the whole row is read again and again.
CANDIDATES = 2048

_UNIT = 40  # bits of the likeliest token's probability

_ONE = np.float32(2.0**_UNIT)


@device
def _key(x):
    """An integer for a float32, in the same order; 0 and −0 are equal."""
    word = ptx.as_word(x + ZERO)
    return word if word >= 0 else word ^ 0x7FFFFFFF


@device
def _mass(x, most, scale):
    """2 ** ((x − most) * scale) in units of 2 ** −40; of −inf 0."""
    return int(ptx.exp2((x - most) * scale) * _ONE) if x > -INFINITY else 0


@device
def _before(key, token, last):
    """Whether a token comes no later in the order than another, each given by its logit's key and its number."""
    return key > last[0] or (key == last[0] and token <= last[1])


@device
def _mass_up_to(row, values, tokens, count, weighing, kept, last, parts):
    """The mass of the kept tokens that come no later than `last` and are at most `weighing[2]` below the maximum."""
    most, scale, floor = weighing
    total = 0
    for i in range(cuda.threadIdx.x, abs(count), THREADS):
        x = values[i] if count > 0 else row[i]
        token = tokens[i] if count > 0 else i
        key = _key(x)
        if _before(key, token, last) and _before(key, token, kept) and x - most >= floor:
            total += _mass(x, most, scale)
    return block_sum(total, parts)


@device
def _share(total, part):
    """``total * part / 2 ** 32``, rounded down, of integers below 2 ** 60 and up to 2 ** 32."""
    high, low = (total >> 30) * part, (total & (1 << 30) - 1) * part
    return (high >> 2) + (((high & 3) << 30) + low >> 32)


@device
def _bound(maxima, t, top_k, most, parts):
    """The `top_k`-th largest of a row's maxima, as a key: as many logits are as large."""
    low, high = _key(-INFINITY), _key(most)
    while low < high:
        middle = (low + high + 1) >> 1
        number = 0
        for s in range(cuda.threadIdx.x, maxima.shape[1], THREADS):
            number += 1 if _key(maxima[t, s]) >= middle else 0
        if block_sum(number, parts) >= top_k:
            low = middle
        else:
            high = middle - 1
    return low


@device
def _collect(row, segment_maxima, bound, values, tokens, number):
    """Logits with a key of at least `bound`, in any order, and in number[0] how many there are, also beyond the room
    for them."""
    for s in range(cuda.threadIdx.x >> 5, len(segment_maxima), THREADS >> 5):
        if _key(segment_maxima[s]) >= bound:
            for i in range(s * SEGMENT + ptx.lane(), min(s * SEGMENT + SEGMENT, len(row)), 32):
                if _key(row[i]) >= bound:
                    at = cuda.atomic.add(number, 0, 1)
                    if at < len(values):
                        values[at] = row[i]
                        tokens[at] = i
    cuda.syncthreads()


@device
def _one_with(row, values, tokens, count, key, kept, found, parts):
    """The range of the tokens with a key: one token if only one has it, else all."""
    number = 0
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, abs(count), THREADS):
        x = values[i] if count > 0 else row[i]
        token = tokens[i] if count > 0 else i
        if _key(x) == key and _before(key, token, kept):
            number += 1
            found[1] = token
    if block_sum(number, parts) > 1:
        return 0, min(len(row) - 1, kept[1])
    return found[1], found[1]


@device
def _last_up_to(target, row, values, tokens, count, weighing, kept, found, parts):
    """The last token, as its key and number, up to which the mass reaches a target: the largest key, then the first
    token with it."""
    low, high = kept[0], _key(weighing[0])
    while low < high:
        middle = (low + high + 1) >> 1
        if _mass_up_to(row, values, tokens, count, weighing, kept, (middle, len(row)), parts) >= target:
            low = middle
        else:
            high = middle - 1
    key = low
    low, high = _one_with(row, values, tokens, count, key, kept, found, parts)
    while low < high:
        middle = (low + high) >> 1
        if _mass_up_to(row, values, tokens, count, weighing, kept, (key, middle), parts) >= target:
            high = middle
        else:
            low = middle + 1
    return key, low


@kernel(F2, F2, F2, types.int64, types.int64, types.float32, types.float32, L2, I2, max_threads=THREADS)
def sample(logits, maxima, sums, top_k, top_p, floor, sharpness, state, out):
    """A block for each row. `top_p` in units of 2 ** −32; `floor` is the logarithm of min-p, `sharpness` log2(e) by the
    temperature."""
    floats = cuda.shared.array(32, np.float32)
    parts = cuda.shared.array(32, np.int64)
    found = cuda.shared.array(2, np.int32)
    values = cuda.shared.array(CANDIDATES, np.float32)
    tokens = cuda.shared.array(CANDIDATES, np.int32)
    t = cuda.blockIdx.x
    row = logits[t]
    most = row_maximum(maxima, t, floats)
    if most == -INFINITY or most == INFINITY:
        if cuda.threadIdx.x == 0:
            out[t, 0] = -1
            out[t, 1] = ptx.as_word(most)
            state[t, 1] += 1
        return
    normaliser = row_normaliser(maxima, sums, t, most, floats)
    count = -len(row)  # of the row; positive where candidates stand for it
    lowest = _key(-INFINITY)
    if cuda.threadIdx.x == 0:
        found[0] = 0
    if top_k and top_k <= maxima.shape[1]:
        lowest = _bound(maxima, t, top_k, most, parts)
        _collect(row, maxima[t], lowest, values, tokens, found)
        if found[0] <= CANDIDATES:
            count = found[0]
    cuda.syncthreads()
    kept = lowest, len(row)  # the last token that is kept
    for stage in range(3):
        # Top-k counts: every token has the same mass.
        scale = ZERO if stage == 0 else LOG2E_F32 if stage == 1 else sharpness
        weighing = most, scale, floor if stage == 2 else -INFINITY
        if (stage == 0 and top_k == 0) or (stage == 1 and top_p >> 32):
            continue
        total = _mass_up_to(row, values, tokens, count, weighing, kept, kept, parts)
        if stage == 0:
            target = min(total, top_k << _UNIT)
        elif stage == 1:
            target = max(1, _share(total, top_p))
        else:
            target = _share(total, philox(state[t, 0], state[t, 1])) + 1
        kept = _last_up_to(target, row, values, tokens, count, weighing, kept, found, parts)
    if cuda.threadIdx.x == 0:
        x = logits[t, kept[1]]
        out[t, 0] = kept[1]
        out[t, 1] = ptx.as_word(x - normaliser)
        state[t, 1] += 1
