"""The chain of steps that parameters ask for."""

from collections.abc import Callable
from typing import Protocol

from pymla.errors import PymlaError
from pymla.text.sampling.adaptive import AdaptiveP
from pymla.text.sampling.dry import Breakers, Dry
from pymla.text.sampling.filters import MinP, TopK, TopNSigma, TopP, Typical, Xtc
from pymla.text.sampling.mirostat import Mirostat, MirostatV2
from pymla.text.sampling.params import SamplingParams
from pymla.text.sampling.penalties import Penalties
from pymla.text.sampling.pool import Pool
from pymla.text.sampling.state import State
from pymla.text.sampling.temperature import DynamicTemperature, Greedy, Temperature


class Step(Protocol):
    """One sampler. It holds parameters alone; what changes from token to token is in `State`."""

    @property
    def keeps_likeliest(self) -> bool:
        """Whether the likeliest of the tokens that it takes is the likeliest of those that it gives."""

    def __call__(self, pool: Pool, state: State) -> Pool:
        """The tokens that are left, with their logits."""


def chain(params: SamplingParams) -> list[Step]:
    """The steps that change anything, in their order, without the bias. llama.cpp: ``common_sampler_init``."""
    if params.mirostat:
        mirostat = MirostatV2 if params.mirostat == 2 else Mirostat
        return _shortened([_plain_temperature(params), mirostat(params.mirostat_tau, params.mirostat_eta)])
    steps: list[Step] = []
    for name in params.samplers:
        step = _STEPS[name](params)
        if step is not None:
            steps.append(step)
    if "adaptive_p" in params.samplers and params.adaptive_target >= 0:
        steps.append(AdaptiveP(params.adaptive_target, params.adaptive_decay))
    return _shortened(steps)


def _shortened(steps: list[Step]) -> list[Step]:
    """The steps up to the first that leaves the likeliest token alone, without those before it that it comes through
    anyway."""
    at = next((i for i, step in enumerate(steps) if step in (Greedy(), TopK(1))), None)
    if at is None:
        return steps
    before = steps[:at]
    while before and before[-1].keeps_likeliest:
        before.pop()
    return [*before, Greedy()]


def _penalties(p: SamplingParams) -> Step | None:
    if p.repetition_penalty == 1 and p.frequency_penalty == 0 and p.presence_penalty == 0:
        return None
    return Penalties(p.repetition_penalty, p.frequency_penalty, p.presence_penalty, p.penalty_window)


def _dry(p: SamplingParams) -> Step | None:
    if not p.is_dry:
        return None
    breakers = p.dry_sequence_breakers
    if not isinstance(breakers, Breakers):
        if breakers:
            raise PymlaError("`dry_sequence_breakers` are texts; `SamplingParams.for_tokenizer` makes tokens of them")
        breakers = Breakers({})
    return Dry(p.dry_multiplier, p.dry_base, p.dry_allowed_length, p.dry_window, breakers)


def _temperature(p: SamplingParams) -> Step:
    if p.dynatemp_range:
        return DynamicTemperature(p.temperature, p.dynatemp_range, p.dynatemp_exponent)
    return _plain_temperature(p)


def _plain_temperature(p: SamplingParams) -> Step:
    return Temperature(p.temperature) if p.temperature else Greedy()


#: What makes the step of each sampler: None where it is off. Adaptive-p is the last one wherever its name stands.
_STEPS: dict[str, Callable[[SamplingParams], Step | None]] = {
    "penalties": _penalties,
    "dry": _dry,
    "top_n_sigma": lambda p: TopNSigma(p.top_n_sigma) if p.top_n_sigma > 0 else None,
    "top_k": lambda p: TopK(p.top_k) if p.top_k else None,
    "typ_p": lambda p: Typical(p.typical_p, p.min_keep) if p.typical_p < 1 else None,
    "top_p": lambda p: TopP(p.top_p, p.min_keep) if p.top_p < 1 else None,
    "min_p": lambda p: MinP(p.min_p, p.min_keep) if p.min_p else None,
    "xtc": lambda p: (
        Xtc(p.xtc_probability, p.xtc_threshold, p.min_keep) if p.xtc_probability and p.xtc_threshold <= 0.5 else None
    ),
    "temperature": _temperature,
    "adaptive_p": lambda p: None,
}
