"""Choosing the next token on the device, so that a generated token costs the host a copy of eight bytes. Twin of
`pymla.text.sampling`.

The order is the same: top-k, top-p of what is left, min-p, temperature, a draw; of equal logits the lower token comes
first. The distribution is the same, the random stream is not: a draw takes one number of Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011), whose key is the seed and whose counter is the number of the draw.
Same parameters, seed and logits: same tokens. Logit bias, repetition, frequency and presence penalties, and the
log-probabilities of alternatives (``logprobs``) stay with the host, which then gets all logits (`on_device`).

Each filter keeps the first tokens of the order by logit, up to some *last token*, which the kernel finds by halving the
range of logits, then that of tokens, and adding up what lies before. Probabilities are integers there, in units of
``2 ** -40`` of the likeliest one, so that sums do not depend on their order; what is less likely is never drawn. Under
top-k a lower bound of the k-th largest logit, from the maxima of segments, leaves a few candidates of the vocabulary.
"""

import math

import numpy as np
from numba import cuda, types

from pymla.cuda.machine import ptx
from pymla.cuda.memory import empty, to_device, to_host
from pymla.cuda.runtime.jit import device, kernel
from pymla.errors import PymlaError
from pymla.text.sampling import Sampled
from pymla.text.sampling import Sampler as OnHost

__all__ = ["SEGMENT", "Sampler", "greedy", "new_state", "on_device", "sample"]

F2 = types.Array(types.float32, 2, "C")
I2 = types.Array(types.int32, 2, "C")
L2 = types.Array(types.int64, 2, "C")

#: Logits that a warp summarises.
SEGMENT = 128
#: Threads of the block that chooses a row's token; a power of two.
THREADS = 512
#: Candidates under top-k that shared memory has room for; where there are more, the whole row is read again and again.
CANDIDATES = 2048

_UNIT = 40  # bits of the likeliest token's probability
_ONE = np.float32(2.0**_UNIT)
_ZERO = np.float32(0)
_INFINITY = np.float32(np.inf)
_LOG2E = np.float32(math.log2(math.e))
_LN2 = np.float32(math.log(2))
_LARGEST = float(np.finfo(np.float32).max)
_WORD = 0xFFFFFFFF


def on_device(params):
    """Whether `sample` does all that a `pymla.text.sampling.SamplingParams` asks for."""
    penalties = params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty
    return not (penalties or params.logit_bias or params.logprobs)


def new_state(seeds):
    """The random numbers of several sequences, on the device: int64 (T, 2), the seed and the number of the next draw.

    Parameters
    ----------
    seeds : list of int or None
        Of 63 bits; None is a seed from the system.
    """
    entropy = (np.random.SeedSequence().generate_state(1, np.uint64)[0] if seed is None else seed for seed in seeds)
    return to_device(np.array([[int(seed) & (1 << 63) - 1, 0] for seed in entropy], np.int64).reshape(-1, 2))


class Sampler:
    """Draws tokens for one sequence. Twin of `pymla.text.sampling.Sampler`, which takes over where the parameters ask
    for what the device does not do.

    Parameters
    ----------
    params : SamplingParams
    history : list of int
        Tokens so far, which the penalties look back on.
    """

    def __init__(self, params, history=()):
        self.params = params
        self._on_host = OnHost(params, history)
        if on_device(params):
            self._state, self._out = new_state([params.seed]), empty((1, 2), np.int32)

    def sample(self, logits):
        """The next token after logits, float32 (V,) on the device.

        Raises
        ------
        PymlaError
            A logit is NaN or infinite; on the device, one of −inf is only never drawn.
        """
        if not on_device(self.params):
            return self._on_host.sample(to_host(logits))
        chosen = to_host(sample(logits[None], self.params, self._state, self._out))[0]
        if chosen[0] < 0:
            # The host finds out which one, and says so.
            return self._on_host.sample(to_host(logits))
        return Sampled(int(chosen[0]), float(chosen[1:].view(np.float32)[0]), [])


def greedy(logits, out):
    """The likeliest token of every row; of equal ones the lower.

    Parameters
    ----------
    logits : float32 array (T, V)
    out : int32 array (T, 2)
        Out: the token, and the bits of its log probability, a float32. Where a logit is NaN or +inf, or all are −inf,
        the token is −1.
    """
    maxima, sums = _summarise(logits)
    _greedy[len(logits), THREADS](logits, maxima, sums, out)
    return out


def sample(logits, params, state, out):
    """Draw a token for every row.

    Parameters
    ----------
    logits : float32 array (T, V)
        A logit of −inf is never drawn.
    params : SamplingParams
        One that `on_device` knows, for all rows.
    state : int64 array (T, 2)
        Of `new_state`; moves on by a draw.
    out : int32 array (T, 2)
        Out: as for `greedy`. The log probability is the model's own, before temperature and filters.

    Raises
    ------
    PymlaError
        The parameters ask for what the device does not do.
    """
    if not on_device(params):
        raise PymlaError("logit bias, penalties and logprobs are not sampled on the device")
    if params.temperature == 0 or params.top_k == 1:
        return greedy(logits, out)
    maxima, sums = _summarise(logits)
    top_k = min(params.top_k, logits.shape[1])
    _sample[len(logits), THREADS](
        logits,
        maxima,
        sums,
        top_k if top_k < logits.shape[1] else 0,
        round(params.top_p * 2**32),
        math.log(params.min_p) if params.min_p else -math.inf,
        min(math.log2(math.e) / params.temperature, _LARGEST),
        state,
        out,
    )
    return out


def _summarise(logits):
    """Maxima of segments, and sums of exponentials relative to them: float32 (T, segments) each."""
    tokens, segments = len(logits), -(-logits.shape[1] // SEGMENT)
    maxima, sums = empty((tokens, segments), np.float32), empty((tokens, segments), np.float32)
    _segments[(-(-segments // 4), tokens), 128](logits, maxima, sums)
    return maxima, sums


@device
def _logit(logits, t, i):
    """A logit; what is no number counts as +inf, what is behind the vocabulary as −inf."""
    if i >= logits.shape[1]:
        return -_INFINITY
    x = logits[t, i]
    return x if x < _INFINITY else _INFINITY


@kernel(F2, F2, F2, max_threads=128)
def _segments(logits, maxima, sums):
    """A warp for each segment: its maximum, and the sum of exp(logit − maximum)."""
    t, segment = cuda.blockIdx.y, cuda.blockIdx.x * 4 + (cuda.threadIdx.x >> 5)
    if segment >= maxima.shape[1]:
        return
    i = segment * SEGMENT + ptx.lane()
    x0, x1 = _logit(logits, t, i), _logit(logits, t, i + 32)
    x2, x3 = _logit(logits, t, i + 64), _logit(logits, t, i + 96)
    most = ptx.warp_max(max(max(x0, x1), max(x2, x3)))
    base = most if most > -_INFINITY else _ZERO
    total = ptx.exp2((x0 - base) * _LOG2E) + ptx.exp2((x1 - base) * _LOG2E)
    total += ptx.exp2((x2 - base) * _LOG2E) + ptx.exp2((x3 - base) * _LOG2E)
    total = ptx.warp_sum(total)
    if ptx.lane() == 0:
        maxima[t, segment] = most
        sums[t, segment] = total


@device
def _block_max(x, parts):
    """The maximum over the block for all threads; `parts` float32 (32,) in shared memory."""
    x = ptx.warp_max(x)
    cuda.syncthreads()  # until the last result has been read
    if ptx.lane() == 0:
        parts[cuda.threadIdx.x >> 5] = x
    cuda.syncthreads()
    for i in range(THREADS >> 5):
        x = max(x, parts[i])
    return x


@device
def _block_sum_f32(x, parts):
    """The sum over the block for all threads, always in the same order."""
    x = ptx.warp_sum(x)
    cuda.syncthreads()
    if ptx.lane() == 0:
        parts[cuda.threadIdx.x >> 5] = x
    cuda.syncthreads()
    total = _ZERO
    for i in range(THREADS >> 5):
        total += parts[i]
    return total


@device
def _block_sum(value, parts):
    """The sum of int64 over the block for all threads; `parts` int64 (32,) in shared memory."""
    mask = 16
    while mask:
        low, high = ptx.shfl_xor(value & _WORD, mask), ptx.shfl_xor(value >> 32, mask)
        value += high << 32 | low & _WORD
        mask >>= 1
    cuda.syncthreads()
    if ptx.lane() == 0:
        parts[cuda.threadIdx.x >> 5] = value
    cuda.syncthreads()
    total = 0
    for i in range(THREADS >> 5):
        total += parts[i]
    return total


@device
def _row_maximum(maxima, t, parts):
    most = -_INFINITY
    for s in range(cuda.threadIdx.x, maxima.shape[1], THREADS):
        most = max(most, maxima[t, s])
    return _block_max(most, parts)


@device
def _row_normaliser(maxima, sums, t, most, parts):
    """The logarithm of the sum of exponentials of a row."""
    total = _ZERO
    for s in range(cuda.threadIdx.x, maxima.shape[1], THREADS):
        total += sums[t, s] * ptx.exp2((maxima[t, s] - most) * _LOG2E)
    return most + ptx.log2(_block_sum_f32(total, parts)) * _LN2


@kernel(F2, F2, F2, I2, max_threads=THREADS)
def _greedy(logits, maxima, sums, out):
    """A block for each row: the first segment with the row's maximum, and the first token with it there."""
    floats = cuda.shared.array(32, np.float32)
    best = cuda.shared.array(2, np.int32)
    t = cuda.blockIdx.x
    if cuda.threadIdx.x == 0:
        best[0] = maxima.shape[1]
        best[1] = logits.shape[1]
    most = _row_maximum(maxima, t, floats)
    normaliser = _row_normaliser(maxima, sums, t, most, floats)
    for s in range(cuda.threadIdx.x, maxima.shape[1], THREADS):
        if maxima[t, s] == most:
            cuda.atomic.min(best, 0, s)
            break
    cuda.syncthreads()
    first = best[0] * SEGMENT
    for i in range(first + cuda.threadIdx.x, min(first + SEGMENT, logits.shape[1]), THREADS):
        if logits[t, i] == most:
            cuda.atomic.min(best, 1, i)
            break
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        number = most > -_INFINITY and most < _INFINITY
        out[t, 0] = best[1] if number else -1
        out[t, 1] = ptx.as_word(most - normaliser)


@device
def _key(x):
    """An integer for a float32, in the same order; 0 and −0 are equal."""
    word = ptx.as_word(x + _ZERO)
    return word if word >= 0 else word ^ 0x7FFFFFFF


@device
def _mass(x, most, scale):
    """2 ** ((x − most) * scale) in units of 2 ** −40; of −inf 0."""
    return int(ptx.exp2((x - most) * scale) * _ONE) if x > -_INFINITY else 0


@device
def _before(key, token, last):
    """Whether a token comes no later in the order than another, each given by its logit's key and its number."""
    return key > last[0] or (key == last[0] and token <= last[1])


@device
def _mass_up_to(row, values, tokens, count, weighing, kept, last, parts):
    """The mass of what was kept and comes no later than `last`, and is at most `weighing[2]` below the maximum."""
    most, scale, floor = weighing
    total = 0
    for i in range(cuda.threadIdx.x, abs(count), THREADS):
        x = values[i] if count > 0 else row[i]
        token = tokens[i] if count > 0 else i
        key = _key(x)
        if _before(key, token, last) and _before(key, token, kept) and x - most >= floor:
            total += _mass(x, most, scale)
    return _block_sum(total, parts)


@device
def _share(total, part):
    """``total * part / 2 ** 32``, rounded down, of integers below 2 ** 60 and up to 2 ** 32."""
    high, low = (total >> 30) * part, (total & (1 << 30) - 1) * part
    return (high >> 2) + (((high & 3) << 30) + low >> 32)


@device
def _philox(seed, draw, row):
    """A random number below 2 ** 32: the first word of Philox4x32-10."""
    key0, key1 = seed & _WORD, seed >> 32 & _WORD
    c0, c1, c2, c3 = draw & _WORD, draw >> 32 & _WORD, row & _WORD, 0
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32 ^ c1 ^ key0) & _WORD,
            product1 & _WORD,
            (product0 >> 32 ^ c3 ^ key1) & _WORD,
            product0 & _WORD,
        )
        key0, key1 = key0 + 0x9E3779B9 & _WORD, key1 + 0xBB67AE85 & _WORD
    return c0


@device
def _bound(maxima, t, top_k, most, parts):
    """The `top_k`-th largest of a row's maxima, as a key: as many logits are as large."""
    low, high = _key(-_INFINITY), _key(most)
    while low < high:
        middle = (low + high + 1) >> 1
        number = 0
        for s in range(cuda.threadIdx.x, maxima.shape[1], THREADS):
            number += 1 if _key(maxima[t, s]) >= middle else 0
        if _block_sum(number, parts) >= top_k:
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
    if _block_sum(number, parts) > 1:
        return 0, min(len(row) - 1, kept[1])
    return found[1], found[1]


@kernel(F2, F2, F2, types.int64, types.int64, types.float32, types.float32, L2, I2, max_threads=THREADS)
def _sample(logits, maxima, sums, top_k, top_p, floor, sharpness, state, out):
    """A block for each row. `top_p` in units of 2 ** −32; `floor` is the logarithm of min-p, `sharpness` log2(e) by the
    temperature."""
    floats = cuda.shared.array(32, np.float32)
    parts = cuda.shared.array(32, np.int64)
    found = cuda.shared.array(2, np.int32)
    values = cuda.shared.array(CANDIDATES, np.float32)
    tokens = cuda.shared.array(CANDIDATES, np.int32)
    t = cuda.blockIdx.x
    row = logits[t]
    most = _row_maximum(maxima, t, floats)
    if most == -_INFINITY or most == _INFINITY:
        if cuda.threadIdx.x == 0:
            out[t, 0] = -1
            out[t, 1] = ptx.as_word(most)
            state[t, 1] += 1
        return
    normaliser = _row_normaliser(maxima, sums, t, most, floats)
    count = -len(row)  # of the row; positive where candidates stand for it
    lowest = _key(-_INFINITY)
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
        scale = _ZERO if stage == 0 else _LOG2E if stage == 1 else sharpness
        weighing = most, scale, floor if stage == 2 else -_INFINITY
        if (stage == 0 and top_k == 0) or (stage == 1 and top_p >> 32):
            continue
        total = _mass_up_to(row, values, tokens, count, weighing, kept, kept, parts)
        if stage == 0:
            target = min(total, top_k << _UNIT)
        elif stage == 1:
            target = max(1, _share(total, top_p))
        else:
            target = _share(total, _philox(state[t, 0], state[t, 1], t)) + 1
        # The largest key, then the first token with it, up to which the mass reaches the target.
        low, high = kept[0], _key(most)
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
        kept = key, low
    if cuda.threadIdx.x == 0:
        x = logits[t, kept[1]]
        out[t, 0] = kept[1]
        out[t, 1] = ptx.as_word(x - normaliser)
        state[t, 1] += 1
