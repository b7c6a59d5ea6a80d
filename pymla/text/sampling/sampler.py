"""Drawing tokens for sequences."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pymla.errors import PymlaError
from pymla.text.sampling.adaptive import AdaptiveP
from pymla.text.sampling.chain import chain
from pymla.text.sampling.filters import Xtc
from pymla.text.sampling.mirostat import Mirostat, MirostatV2
from pymla.text.sampling.params import SamplingParams
from pymla.text.sampling.penalties import biased
from pymla.text.sampling.pool import Candidates, Pool
from pymla.text.sampling.selection import likeliest
from pymla.text.sampling.state import History, State
from pymla.text.sampling.temperature import Greedy


class Sampled(NamedTuple):
    """A chosen token."""

    token: int
    logprob: float  # of the model's own distribution, before bias, penalties and temperature
    alternatives: list[tuple[int, float]]  # the likeliest tokens and their log probabilities, if asked for


class Sampler:
    """Draws tokens for one sequence. Same parameters, seed and logits: same tokens.

    Parameters
    ----------
    params : SamplingParams
        With DRY, sequence breakers are tokens (`SamplingParams.for_tokenizer`).
    history : iterable of int
        Tokens so far, which the penalties look back on.
    """

    def __init__(self, params: SamplingParams, history: Iterable[int] = ()):
        self.params = params
        self._chain = chain(params)
        self._state = State(History(history))
        self._generator = np.random.Generator(np.random.PCG64(params.seed))
        last = self._chain[-1] if self._chain else None
        self._is_greedy = isinstance(last, Greedy)
        self._learner = last if isinstance(last, Mirostat | MirostatV2 | AdaptiveP) else None
        self._has_coin = any(isinstance(step, Xtc) for step in self._chain)
        if self._learner is not None:
            self._learner.begin(self._state)
        if self._has_coin:
            self._state.coin = self.random()

    def sample(self, logits: np.ndarray, mask: np.ndarray | None = None) -> Sampled:
        """The next token, which becomes part of the history.

        Parameters
        ----------
        logits : float array (V,)
        mask : uint32 array (ceil(V / 32),), optional
            Bit i % 32 of word i // 32 tells whether token i is allowed; tokens beyond its end are not. None: all are.

        Raises
        ------
        PymlaError
            A logit is not a number, a biased token is outside the vocabulary, or no token is allowed.
        """
        pool = self._pool(logits, mask)
        token = pool.token_at(0.0 if self._is_greedy else self.random())
        return self.choose(token, logits)

    def choose(self, token: int, logits: np.ndarray) -> Sampled:
        """Accept a token that may be another one than `sample` would have chosen, after logits (V,), and report it."""
        self.accept(token)
        normaliser = _normaliser(logits)
        best = likeliest(logits, self.params.logprobs).tolist() if self.params.logprobs else []
        return Sampled(token, float(logits[token]) - normaliser, [(i, float(logits[i]) - normaliser) for i in best])

    def distribution(self, logits: np.ndarray, mask: np.ndarray | None = None) -> Candidates:
        """The distribution that `sample` draws from, which asking for does not change; `accept` learns from the last
        one. Arguments and errors are those of `sample`."""
        return self._pool(logits, mask).candidates()

    def random(self) -> float:
        """A number in [0, 1) of the sampler's own stream."""
        return self._generator.random()

    def accept(self, token: int) -> None:
        """Go on to the next token after this one, which need not be what `sample` would have chosen."""
        state = self._state
        state.history.append(token)
        if self._learner is not None and state.observed is not None:
            probability = state.observed.probability(token)
            if probability > 0:
                self._learner.accept(state, probability)
            state.observed = None
        if self._has_coin:
            state.coin = self.random()

    def copy(self) -> "Sampler":
        """A sampler in the same state, that draws the same numbers; neither changes the other."""
        other = copy.copy(self)
        other._state = self._state.copy()
        other._generator = copy.deepcopy(self._generator)
        return other

    def _pool(self, logits: np.ndarray, mask: np.ndarray | None) -> Pool:
        """What the chain leaves."""
        if not (math.isfinite(logits.max()) and math.isfinite(logits.min())):
            bad = int(np.flatnonzero(~np.isfinite(logits))[0])
            raise PymlaError(f"the model's logit of token {bad} is {logits[bad]}: its weights are damaged, or overflow")
        pool = biased(Pool(logits), self.params.logit_bias)
        if mask is not None:
            pool = _masked(pool, mask)
        for step in self._chain:
            pool = step(pool, self._state)
        return pool


def sample_batch(
    samplers: Sequence[Sampler], logits: np.ndarray, masks: Sequence[np.ndarray | None] | None = None
) -> list[Sampled | PymlaError]:
    """The next token of every sequence: what `Sampler.sample` gives for each row, or the error that it raises.

    Row by row, because a row of 100,000 logits stays in the L2 cache while it is worked on.

    Parameters
    ----------
    samplers : sequence of Sampler
        B different ones.
    logits : float array (B, V)
    masks : sequence of (uint32 array (ceil(V / 32),) or None), optional
        B masks as for `Sampler.sample`. None: every token is allowed.
    """
    masks = [None] * len(samplers) if masks is None else masks
    return [sample_or_error(*each) for each in zip(samplers, logits, masks, strict=True)]


def sample_or_error(sampler: Sampler, logits: np.ndarray, mask: np.ndarray | None) -> Sampled | PymlaError:
    """What `Sampler.sample` gives, or the error that it raises."""
    try:
        return sampler.sample(logits, mask)
    except PymlaError as error:
        return error


def _masked(pool: Pool, mask: np.ndarray) -> Pool:
    """The tokens of a pool that a mask allows."""
    tokens = len(pool.logits) if pool.ids is None else int(pool.ids[-1]) + 1
    allowed = np.unpackbits(mask.view(np.uint8), bitorder="little", count=tokens).view(bool)
    left = np.flatnonzero(allowed if pool.ids is None else allowed[pool.ids])
    if not len(left):
        raise PymlaError("the grammar allows none of the tokens that `logit_bias` leaves")
    return pool.at(left)


def _normaliser(logits: np.ndarray) -> float:
    """The logarithm of the sum of exponentials. In float32, which is faster and leaves an error of about 1e-7."""
    highest = logits.max()
    weights = np.exp((logits - highest).astype(np.float32, copy=False))
    return float(highest) + math.log(weights.sum(dtype=np.float64))
