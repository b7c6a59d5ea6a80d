"""Choosing the next token on the device, so that a generated token costs the host a copy of eight bytes. Twin of
`pymla.text.sampling`.

The device has top-k, top-p of the rest, min-p, temperature and a draw, in this order; of equal logits the lower token
comes first. The distribution is the same, the random stream is not: a draw takes one number of Philox4x32-10 (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", 2011), whose key is the seed and whose counter is the number of the
draw. Same parameters, seed and logits: same tokens, alone or in a batch. All other samplers and orders, masks and the
log-probabilities of alternatives (``logprobs``) stay with the host, which gets all logits of such a row (`on_device`).

Each filter keeps the first tokens of the order by logit, up to some *last token*, which the kernel finds by halving the
range of logits, then that of tokens, and adding up the tokens before. Probabilities are integers there, in units of
``2 ** -40`` of the likeliest one, so that sums do not depend on their order; less likely tokens are never drawn. Under
top-k a lower bound of the k-th largest logit, from the maxima of segments, leaves a few candidates of the vocabulary.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pymla.cuda.memory import DeviceArray, empty, take, to_device, to_host
from pymla.cuda.runtime.jit import Kernel
from pymla.cuda.sampling import draw, likeliest
from pymla.cuda.sampling.rows import SEGMENT, SUMMARY_THREADS, SUMMARY_WARPS, THREADS
from pymla.cuda.sampling.rows import segments as segments_kernel
from pymla.errors import PymlaError
from pymla.text.sampling import Candidates, Sampled, SamplingParams, sample_or_error
from pymla.text.sampling import Sampler as OnHost
from pymla.text.sampling.chain import chain
from pymla.text.sampling.filters import MinP, TopK, TopP
from pymla.text.sampling.temperature import Greedy, Temperature

__all__ = ["SEGMENT", "Sampler", "greedy", "new_state", "on_device", "sample", "sample_batch"]

_LARGEST = float(np.finfo(np.float32).max)


class _Filters(NamedTuple):
    """What the device does with a row."""

    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    temperature: float = 1.0  # 0: the likeliest token

    @classmethod
    def of(cls, params: SamplingParams) -> "_Filters | None":
        """Those that parameters ask for; None where they ask for more, or for another order."""
        if params.logit_bias or params.logprobs or params.min_keep:
            return None
        found: dict[str, float] = {}
        order = [TopK, TopP, MinP, Temperature]
        for step in chain(params):
            if isinstance(step, Greedy):
                return cls(temperature=0)
            if type(step) not in order:
                return None
            order = order[order.index(type(step)) + 1 :]
            if isinstance(step, TopK):
                found["top_k"] = step.k
            elif isinstance(step, TopP):
                found["top_p"] = step.p
            elif isinstance(step, MinP):
                found["min_p"] = step.p
            elif isinstance(step, Temperature):
                found["temperature"] = step.value
        return cls(**found)


def on_device(params: SamplingParams) -> bool:
    """Whether `sample` does all that a `pymla.text.sampling.SamplingParams` asks for."""
    return _Filters.of(params) is not None


def new_state(seeds: list[int | None]) -> DeviceArray:
    """The random numbers of several sequences, on the device: int64 (T, 2), the seed and the number of the next draw.

    Parameters
    ----------
    seeds : list of int or None
        Of 63 bits; None is a seed from the system.
    """
    return to_device(np.array([[_key(seed), 0] for seed in seeds], np.int64).reshape(-1, 2))


def _key(seed: int | None) -> int:
    """The key of a random stream, of 63 bits."""
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0] if seed is None else seed) & (1 << 63) - 1


class Sampler:
    """Draws tokens for one sequence. Twin of `pymla.text.sampling.Sampler`, which takes over where the parameters or a
    mask ask for more than the device does.

    Parameters
    ----------
    params : SamplingParams
    history : list of int
        Tokens so far, which the penalties look back on.
    """

    def __init__(self, params: SamplingParams, history: Sequence[int] = ()) -> None:
        self.params = params
        self.filters = _Filters.of(params)
        self.stream = [_key(params.seed), 0]  # the key, and the number of the next draw
        self.on_host = OnHost(params, history)

    def sample(self, logits: DeviceArray, mask: np.ndarray | None = None) -> Sampled:
        """The next token after logits, float32 (V,) on the device.

        Raises
        ------
        PymlaError
            A logit is NaN or infinite; on the device, one of −inf is only never drawn.
        """
        (found,) = sample_batch([self], logits[None], [mask])
        if isinstance(found, PymlaError):
            raise found
        return found

    def distribution(self, logits: DeviceArray, mask: np.ndarray | None = None) -> Candidates:
        """The distribution that `sample` draws from, computed by the host."""
        return self.on_host.distribution(to_host(logits), mask)

    def random(self) -> float:
        """A number in [0, 1) of the host's stream."""
        return self.on_host.random()

    def accept(self, token: int) -> None:
        """Go on to the next token after this one, which need not be what `sample` would have chosen."""
        self.on_host.accept(token)

    def choose(self, token: int, logits: DeviceArray) -> Sampled:
        """Accept a token that may be another one than `sample` would have chosen, after logits (V,), and report it."""
        return self.on_host.choose(token, to_host(logits))

    def copy(self) -> "Sampler":
        """A sampler in the same state, that draws the same numbers; neither changes the other."""
        other = copy.copy(self)
        other.stream, other.on_host = self.stream.copy(), self.on_host.copy()
        return other


def sample_batch(
    samplers: Sequence[Sampler], logits: DeviceArray, masks: Sequence[np.ndarray | None] | None = None
) -> list[Sampled | PymlaError]:
    """The next token of every sequence: what `Sampler.sample` gives for each row, or the error that it raises.

    Rows with the same filters are one launch, and one copy of eight bytes a row to the host. The host gets all logits
    of a row with a mask, or whose parameters `on_device` does not know.
    """
    masks = [None] * len(samplers) if masks is None else masks
    groups: dict[_Filters, list[int]] = {}
    for i, (sampler, mask) in enumerate(zip(samplers, masks, strict=True)):
        if mask is None and sampler.filters is not None:
            groups.setdefault(sampler.filters, []).append(i)
    found: dict[int, Sampled] = {}
    for filters, rows in groups.items():
        group = logits if len(rows) == len(samplers) else take(logits, np.array(rows))
        found |= zip(rows, _draw([samplers[i] for i in rows], group, filters), strict=True)
    return [
        found.get(i) or sample_or_error(sampler.on_host, to_host(logits[i]), mask)
        for i, (sampler, mask) in enumerate(zip(samplers, masks, strict=True))
    ]


def _draw(samplers: Sequence[Sampler], logits: DeviceArray, filters: _Filters) -> list[Sampled | None]:
    """Tokens of sequences that have the same filters. None where a logit is damaged: the host finds out which one."""
    out = empty((len(samplers), 2), np.int32)
    if filters.temperature == 0:
        greedy(logits, out)
    else:
        _launch(logits, filters, to_device(np.array([each.stream for each in samplers])), out)
    result: list[Sampled | None] = []
    for sampler, (token, bits) in zip(samplers, to_host(out), strict=True):
        sampler.stream[1] += filters.temperature != 0
        if token < 0:
            result.append(None)
            continue
        sampler.accept(int(token))
        result.append(Sampled(int(token), float(bits.view(np.float32)), []))
    return result


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
    filters = _Filters.of(params)
    if filters is None:
        raise PymlaError("these parameters are not sampled on the device: `on_device` tells which are")
    if filters.temperature == 0:
        return greedy(logits, out)
    return _launch(logits, filters, state, out)


def _launch(logits: DeviceArray, filters: _Filters, state: DeviceArray, out: DeviceArray) -> DeviceArray:
    _check("sample", logits, out, state)
    maxima, sums = _summarise(logits)
    top_k = min(filters.top_k, logits.shape[1])
    draw.sample[len(logits), THREADS](
        logits,
        maxima,
        sums,
        top_k if top_k < logits.shape[1] else 0,
        round(filters.top_p * 2**32),
        math.log(filters.min_p) if filters.min_p else -math.inf,
        min(math.log2(math.e) / filters.temperature, _LARGEST),
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
