"""Choosing the next token by its logit.

In the order of llama.cpp's default chain: logit bias, penalties, top-k, top-p, min-p, temperature, then a draw.
"""

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from pymla import checks
from pymla.errors import PymlaError

#: Least and largest value of each number.
_LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, 1 << 31),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "frequency_penalty": (-100, 100),
    "presence_penalty": (-100, 100),
    "penalty_window": (0, 1 << 31),
    "logprobs": (0, 1000),
}
_WHOLE = ("top_k", "penalty_window", "logprobs")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; the defaults are llama.cpp's.

    Raises
    ------
    PymlaError
        A value is out of range, or not of the kind that is expected.
    """

    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 40  # 0: off
    top_p: float = 0.95  # 1: off
    min_p: float = 0.05  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int = 64  # tokens that the penalties look back on; 0: all
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int = 0  # alternatives to report for each token

    @classmethod
    def of(cls, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> "SamplingParams":
        """The parameters that a caller gave by name; None stands for the default: that of `defaults`, or else the
        field's.

        Raises
        ------
        PymlaError
            A name is not known, or a value is refused.
        """
        names = [each.name for each in fields(cls)]
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean `{close[0]}`?" if close else f"there are {', '.join(names)}"
                raise PymlaError(f"there is no option `{name}`; {hint}")
        given = {name: value for name, value in options.items() if value is not None}
        return cls(**(dict(defaults or {}) | given))

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if name in _WHOLE:
                self._set(name, checks.integer(name, value, int(low), int(high)))
            else:
                self._set(name, checks.number(name, value, low, high))
        if self.seed is not None:
            self._set("seed", checks.integer("seed", self.seed, 0))
        if not isinstance(self.logit_bias, Mapping):
            checks.refuse("logit_bias", self.logit_bias, "a dict of token ids and numbers is expected")
        self._set("logit_bias", dict(map(_bias, self.logit_bias.items())))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _bias(item: tuple[Any, Any]) -> tuple[int, float]:
    """A token id and the number that is added to its logit."""
    token, bias = item
    token = checks.integer("logit_bias", token, 0)
    if isinstance(bias, float | np.floating) and bias == -np.inf:
        return token, -np.inf
    return token, checks.number(f"logit_bias[{token}]", bias, -1e9, 1e9)


class Sampled(NamedTuple):
    """A chosen token."""

    token: int
    logprob: float  # of the model's own distribution, before bias, penalties and temperature
    alternatives: list[tuple[int, float]]  # the likeliest tokens and their log probabilities, if asked for


class Candidates(NamedTuple):
    """A distribution over the tokens that may come next, the likeliest one first."""

    ids: np.ndarray  # int64 (n,)
    probabilities: np.ndarray  # float64 (n,)

    def probability(self, token: int) -> float:
        """The probability of a token, 0 where it is none of the candidates."""
        at = np.flatnonzero(self.ids == token)
        return float(self.probabilities[at[0]]) if len(at) else 0.0


class Sampler:
    """Draws tokens for one sequence. Same parameters, seed and logits: same tokens.

    Parameters
    ----------
    params : SamplingParams
    history : list of int
        Tokens so far, which the penalties look back on.
    """

    def __init__(self, params: SamplingParams, history: Iterable[int] = ()):
        self.params = params
        self.history = list(history)
        self._generator = np.random.Generator(np.random.PCG64(params.seed))
        self._is_greedy = params.temperature == 0 or params.top_k == 1

    def sample(self, logits: np.ndarray, mask: np.ndarray | None = None) -> Sampled:
        """The next token after float32 logits (V,), which becomes part of the history.

        Parameters
        ----------
        logits : float array (V,)
        mask : uint32 array (ceil(V / 32),), optional
            Bit i % 32 of word i // 32 tells whether token i is allowed. None: all are.

        Raises
        ------
        PymlaError
            A logit is not a number, a biased token is outside the vocabulary, or no token is allowed.
        """
        found = self.distribution(logits, mask)
        token = int(found.ids[0]) if self._is_greedy else draw(found, self.random())
        return self.choose(token, logits)

    def choose(self, token: int, logits: np.ndarray) -> Sampled:
        """Accept a token that another one than `sample` has chosen, after float32 logits (V,), and report it."""
        self.accept(token)
        raw = logits.astype(np.float64)
        highest = raw.max()
        # In float32, which is eight times faster and leaves an error of about 1e-7.
        normaliser = highest + np.log(np.exp((raw - highest).astype(np.float32)).sum(dtype=np.float64))
        best = _likeliest(raw, self.params.logprobs).tolist() if self.params.logprobs else []
        return Sampled(token, float(raw[token] - normaliser), [(i, float(raw[i] - normaliser)) for i in best])

    def distribution(self, logits: np.ndarray, mask: np.ndarray | None = None) -> Candidates:
        """The distribution that `sample` draws from. Arguments and errors are those of `sample`."""
        logits = logits.astype(np.float64)
        if not np.isfinite(logits).all():
            bad = int(np.flatnonzero(~np.isfinite(logits))[0])
            raise PymlaError(f"the model's logit of token {bad} is {logits[bad]}: its weights are damaged, or overflow")
        logits = self._penalised(self._biased(logits))
        if mask is not None:
            logits = np.where(_allowed(mask, len(logits)), logits, -np.inf)
        if logits.max() == -np.inf:
            by = "`logit_bias` bans" if mask is None else "`logit_bias` and the mask ban"
            raise PymlaError(f"{by} every token of the vocabulary; leave one")
        if self._is_greedy:
            return Candidates(np.array([logits.argmax()]), np.ones(1))
        return self._filtered(logits)

    def random(self) -> float:
        """A number in [0, 1) of the sampler's own stream."""
        return self._generator.random()

    def accept(self, token: int) -> None:
        """Make a token part of the history, where another one than `sample` has chosen it."""
        self.history.append(token)

    def copy(self) -> "Sampler":
        """A sampler with the same history that draws the same numbers, and leaves this one as it is."""
        other = copy.copy(self)
        other.history = self.history.copy()
        other._generator = copy.deepcopy(self._generator)
        return other

    def _biased(self, logits: np.ndarray) -> np.ndarray:
        if self.params.logit_bias:
            logits = logits.copy()
            for token, bias in self.params.logit_bias.items():
                if token >= len(logits):
                    raise PymlaError(f"`logit_bias` for token {token}: the vocabulary has {len(logits)} tokens")
                logits[token] += bias
        return logits

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        p = self.params
        if p.repetition_penalty == 1 and p.frequency_penalty == 0 and p.presence_penalty == 0:
            return logits
        tokens, counts = np.unique(self.history[-p.penalty_window :], return_counts=True)  # from -0: all of it
        tokens = tokens.astype(int)
        logits = logits.copy()
        seen = logits[tokens]
        seen = np.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
        logits[tokens] = seen - counts * p.frequency_penalty - p.presence_penalty
        return logits

    def _filtered(self, logits: np.ndarray) -> Candidates:
        p = self.params
        highest = logits.max()
        if p.top_k:
            kept = _likeliest(logits, p.top_k)
            total = np.exp(logits[kept] - highest).sum()
        else:
            # Tokens that min-p will drop need not be sorted. The bound is a bit lower, because it is rounded.
            lowest = highest + np.log(p.min_p) - 1e-6 if p.min_p else -np.inf
            kept = _descending(logits, np.flatnonzero(logits >= lowest))
            total = np.exp(logits - highest).sum()
        probabilities = np.exp(logits[kept] - highest) / total
        if p.top_p < 1:
            # The fewest tokens that reach top_p together, at least one.
            count = int(np.searchsorted(np.cumsum(probabilities), p.top_p)) + 1
            kept, probabilities = kept[:count], probabilities[:count]
        kept = kept[probabilities >= p.min_p * probabilities[0]]
        with np.errstate(over="ignore"):  # next to temperature 0 all but the likeliest become -inf
            weights = np.exp((logits[kept] - highest) / p.temperature)
        return Candidates(kept, weights / weights.sum())


def sample_batch(
    samplers: Sequence[Sampler], logits: np.ndarray, masks: Sequence[np.ndarray | None] | None = None
) -> list[Sampled]:
    """The next token of every sequence: what `Sampler.sample` gives for each row.

    Parameters
    ----------
    samplers : sequence of Sampler
        B different ones.
    logits : float array (B, V)
    masks : sequence of (uint32 array (ceil(V / 32),) or None), optional
        B masks as for `Sampler.sample`. None: every token is allowed.
    """
    masks = [None] * len(samplers) if masks is None else masks
    return [sampler.sample(row, mask) for sampler, row, mask in zip(samplers, logits, masks, strict=True)]


def draw(candidates: Candidates, number: float) -> int:
    """The token at a number in [0, 1), where each candidate takes as much of it as its probability."""
    at = int(np.searchsorted(np.cumsum(candidates.probabilities), number, side="right"))
    return int(candidates.ids[min(at, len(candidates.ids) - 1)])


def _allowed(mask: np.ndarray, tokens: int) -> np.ndarray:
    """The bits of a mask, bool (tokens,)."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little", count=tokens).view(bool)


def _likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """The `count` likeliest tokens, in the order of `_descending`; sorting all 100,000 takes a quarter of a decode
    step."""
    width = max(1, len(logits) // (8 * count))
    # So many parts of the vocabulary have a token that is as likely as the count-th of their maxima, or likelier.
    maxima = logits[: len(logits) // width * width].reshape(-1, width).max(1)
    bound = np.partition(maxima, -count)[-count] if count < len(maxima) else -np.inf
    return _descending(logits, np.flatnonzero(logits >= bound))[:count]


def _descending(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Tokens, which ascend, from the likeliest on; of equally likely ones the first comes first."""
    return tokens[np.argsort(-logits[tokens], kind="stable")]
