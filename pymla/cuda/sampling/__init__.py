"""Choosing the next token on the device, so that a generated token costs the host a copy of eight bytes. Twin of
`pymla.text.sampling`.

The order is the same: top-k, top-p of the rest, min-p, temperature, a draw; of equal logits the lower token comes
first. The distribution is the same, the random stream is not: a draw takes one number of Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011), whose key is the seed and whose counter is the number of the draw.
Same parameters, seed and logits: same tokens. Logit bias, repetition, frequency and presence penalties, and the
log-probabilities of alternatives (``logprobs``) stay with the host, which then gets all logits (`on_device`).

Each filter keeps the first tokens of the order by logit, up to some *last token*, which the kernel finds by halving the
range of logits, then that of tokens, and adding up the tokens before. Probabilities are integers there, in units of
``2 ** -40`` of the likeliest one, so that sums do not depend on their order; less likely tokens are never drawn. Under
top-k a lower bound of the k-th largest logit, from the maxima of segments, leaves a few candidates of the vocabulary.
"""

import copy
import math
from collections.abc import Sequence

import numpy as np

from pymla.cuda.memory import DeviceArray, empty, to_device, to_host
from pymla.cuda.runtime.jit import Kernel
from pymla.cuda.sampling import draw, likeliest
from pymla.cuda.sampling.rows import SEGMENT, SUMMARY_THREADS, SUMMARY_WARPS, THREADS
from pymla.cuda.sampling.rows import segments as segments_kernel
from pymla.errors import PymlaError
from pymla.text.sampling import Candidates, Sampled, SamplingParams
from pymla.text.sampling import Sampler as OnHost

__all__ = ["SEGMENT", "Sampler", "greedy", "new_state", "on_device", "sample", "sample_batch"]

_LARGEST = float(np.finfo(np.float32).max)


def on_device(params: SamplingParams) -> bool:
    """Whether `sample` does all that a `pymla.text.sampling.SamplingParams` asks for."""
    penalties = params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty
    return not (penalties or params.logit_bias or params.logprobs)


def new_state(seeds: list[int | None]) -> DeviceArray:
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
    for more than the device does.

    Parameters
    ----------
    params : SamplingParams
    history : list of int
        Tokens so far, which the penalties look back on.
    """

    def __init__(self, params: SamplingParams, history: Sequence[int] = ()) -> None:
        self.params = params
        self._on_host = OnHost(params, history)
        if on_device(params):
            self._state, self._out = new_state([params.seed]), empty((1, 2), np.int32)

    def sample(self, logits: DeviceArray, mask: np.ndarray | None = None) -> Sampled:
        """The next token after logits, float32 (V,) on the device. With a mask, the host chooses it.

        Raises
        ------
        PymlaError
            A logit is NaN or infinite; on the device, one of −inf is only never drawn.
        """
        if mask is not None or not on_device(self.params):
            return self._on_host.sample(to_host(logits), mask)
        chosen = to_host(sample(logits[None], self.params, self._state, self._out))[0]
        if chosen[0] < 0:
            # The host finds out which one, and says so.
            return self._on_host.sample(to_host(logits))
        self.accept(int(chosen[0]))
        return Sampled(int(chosen[0]), float(chosen[1:].view(np.float32)[0]), [])

    def distribution(self, logits: DeviceArray, mask: np.ndarray | None = None) -> Candidates:
        """The distribution that `sample` draws from, computed by the host."""
        return self._on_host.distribution(to_host(logits), mask)

    def random(self) -> float:
        """A number in [0, 1) of the host's stream."""
        return self._on_host.random()

    def accept(self, token: int) -> None:
        """Make a token part of the history, where another one than `sample` has chosen it."""
        self._on_host.accept(token)

    def choose(self, token: int, logits: DeviceArray) -> Sampled:
        """Accept a token that another one than `sample` has chosen, and report it."""
        return self._on_host.choose(token, to_host(logits))

    def copy(self) -> "Sampler":
        """A sampler with the same history that draws the same numbers, and leaves this one as it is."""
        other = copy.copy(self)
        other._on_host = self._on_host.copy()
        if on_device(self.params):
            other._state, other._out = to_device(to_host(self._state)), empty((1, 2), np.int32)
        return other


def sample_batch(
    samplers: Sequence[Sampler], logits: DeviceArray, masks: Sequence[np.ndarray | None] | None = None
) -> list[Sampled]:
    """The next token of every sequence: what `Sampler.sample` gives for each row, logits (B, V) on the device."""
    masks = [None] * len(samplers) if masks is None else masks
    return [sampler.sample(logits[i], mask) for i, (sampler, mask) in enumerate(zip(samplers, masks, strict=True))]


def greedy(logits: DeviceArray, out: DeviceArray) -> DeviceArray:
    """The likeliest token of every row; of equal ones the lower.

    Parameters
    ----------
    logits : float32 array (T, V)
    out : int32 array (T, 2)
        Out: the token, and the bits of its log probability, a float32. Where a logit is NaN or +inf, or all are −inf,
        the token is −1.
    """
    _check("greedy", logits, out)
    maxima, sums = _summarise(logits)
    likeliest.greedy[len(logits), THREADS](logits, maxima, sums, out)
    return out


def sample(logits: DeviceArray, params: SamplingParams, state: DeviceArray, out: DeviceArray) -> DeviceArray:
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
        The parameters ask for more than the device does.
    """
    if not on_device(params):
        raise PymlaError("logit bias, penalties and logprobs are not sampled on the device")
    if params.temperature == 0 or params.top_k == 1:
        return greedy(logits, out)
    _check("sample", logits, out, state)
    maxima, sums = _summarise(logits)
    top_k = min(params.top_k, logits.shape[1])
    draw.sample[len(logits), THREADS](
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


def kernels() -> list[Kernel]:
    """The kernels of this package."""
    return [segments_kernel, likeliest.greedy, draw.sample]


def _check(operation: str, logits: DeviceArray, out: DeviceArray, state: DeviceArray | None = None) -> None:
    """Refuse arrays that do not have two numbers for each row of logits."""
    for name, array in (("out", out), ("state", state)):
        if array is not None and array.shape != (len(logits), 2):
            raise PymlaError(f"{operation}: {name} is of shape {array.shape}; ({len(logits)}, 2) is expected")
    if logits.shape[1] == 0:
        raise PymlaError(f"{operation}: logits are of shape {logits.shape}; at least one a row is expected")


def _summarise(logits: DeviceArray) -> tuple[DeviceArray, DeviceArray]:
    """Maxima of segments, and sums of exponentials relative to them: float32 (T, segments) each."""
    tokens, segments = len(logits), -(-logits.shape[1] // SEGMENT)
    maxima, sums = empty((tokens, segments), np.float32), empty((tokens, segments), np.float32)
    segments_kernel[(-(-segments // SUMMARY_WARPS), tokens), SUMMARY_THREADS](logits, maxima, sums)
    return maxima, sums
