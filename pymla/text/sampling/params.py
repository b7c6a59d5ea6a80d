"""The parameters of sampling, and their checks."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pymla import checks
from pymla.errors import PymlaError
from pymla.text.sampling.dry import LONGEST_BREAKER, Breakers

if TYPE_CHECKING:
    from pymla.text.tokenizer import Tokenizer

#: The samplers that are on unless they are left out, in their order: llama.cpp's names and order.
DEFAULT_SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")

#: Samplers that a chain may have.
SAMPLERS = (*DEFAULT_SAMPLERS, "adaptive_p")

#: Other names of samplers, as in llama.cpp; all may be written with "-", or without "_", too.
_ALIASES = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p"}

#: Least and largest value of each number.
_LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "dynatemp_range": (0, 100),
    "dynatemp_exponent": (0, 100),
    "top_k": (0, 1 << 31),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "top_n_sigma": (-1, 1000),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "min_keep": (0, 1 << 31),
    "repetition_penalty": (0.01, 100),
    "frequency_penalty": (-100, 100),
    "presence_penalty": (-100, 100),
    "penalty_window": (0, 1 << 31),
    "dry_multiplier": (0, 100),
    "dry_base": (1, 100),
    "dry_allowed_length": (0, 1 << 31),
    "dry_window": (0, 1 << 31),
    "mirostat": (0, 2),
    "mirostat_tau": (0, 100),
    "mirostat_eta": (0, 100),
    "adaptive_target": (-1, 1),
    "adaptive_decay": (0, 0.99),
    "logprobs": (0, 1000),
}
_WHOLE = (
    *("top_k", "min_keep", "penalty_window", "dry_allowed_length", "dry_window"),
    *("mirostat", "logprobs"),
)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; the defaults are llama.cpp's. docs/sampling.md has the formulas.

    Raises
    ------
    PymlaError
        A value is out of range, or not of the kind that is expected.
    """

    temperature: float = 0.8  # 0: always the likeliest token that the other samplers leave
    dynatemp_range: float = 0.0  # the temperature follows the entropy, by so much up and down; 0: off
    dynatemp_exponent: float = 1.0
    top_k: int = 40  # 0: off
    top_p: float = 0.95  # 1: off
    min_p: float = 0.05  # 0: off
    typical_p: float = 1.0  # 1: off
    top_n_sigma: float = -1.0  # 0 and below: off
    xtc_probability: float = 0.0  # 0: off
    xtc_threshold: float = 0.1  # above 0.5: off
    min_keep: int = 0  # tokens that top-p, min-p, typical and XTC leave at least
    repetition_penalty: float = 1.0  # 1: off
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int = 64  # tokens that the penalties look back on; 0: all
    dry_multiplier: float = 0.0  # 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int = 64  # tokens that DRY looks back on; 0: all
    dry_sequence_breakers: tuple[str, ...] | Breakers = ("\n", ":", '"', "*")
    mirostat: int = 0  # 1, 2: the version, which takes the place of all samplers but bias and temperature; 0: off
    mirostat_tau: float = 5.0  # bits of surprise per token that are aimed at
    mirostat_eta: float = 0.1  # learning rate
    adaptive_target: float = -1.0  # probability of chosen tokens that `adaptive_p` aims at; below 0: off
    adaptive_decay: float = 0.9
    samplers: tuple[str, ...] = DEFAULT_SAMPLERS  # in this order; those that are left out are off
    logit_bias: dict[int, float] = field(default_factory=dict)  # added before anything else; -inf bans a token
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
        self._set("samplers", _sampler_names(self.samplers))
        if not isinstance(self.dry_sequence_breakers, Breakers):
            self._set("dry_sequence_breakers", _breaker_texts(self.dry_sequence_breakers))

    @property
    def is_dry(self) -> bool:
        """Whether DRY is on."""
        return self.dry_multiplier > 0 and "dry" in self.samplers and not self.mirostat

    def for_tokenizer(self, tokenizer: "Tokenizer") -> "SamplingParams":
        """These parameters with DRY's sequence breakers as tokens, which a `Sampler` with DRY needs."""
        if not self.is_dry or isinstance(self.dry_sequence_breakers, Breakers):
            return self
        return replace(self, dry_sequence_breakers=Breakers.of(tokenizer, self.dry_sequence_breakers))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _bias(item: tuple[Any, Any]) -> tuple[int, float]:
    """A token id and the number that is added to its logit."""
    token, bias = item
    token = checks.integer("logit_bias", token, 0)
    if isinstance(bias, float | np.floating) and bias == -np.inf:
        return token, -np.inf
    return token, checks.number(f"logit_bias[{token}]", bias, -1e9, 1e9)


def _sampler_names(given: Any) -> tuple[str, ...]:
    """Samplers by llama.cpp's names, given as texts or as one text with semicolons."""
    known = {name: name for name in SAMPLERS} | _ALIASES
    known |= {name.replace("_", instead): of for name, of in known.items() for instead in ("-", "")}
    names = []
    for name in _texts("samplers", given.split(";") if isinstance(given, str) and given else given):
        if name.lower() not in known:
            checks.refuse("samplers", name, f"choose {', '.join(SAMPLERS)}, separated by semicolons")
        names.append(known[name.lower()])
    return tuple(names)


def _breaker_texts(given: Any) -> tuple[str, ...]:
    texts = _texts("dry_sequence_breakers", given)
    for text in texts:
        if not 0 < len(text.encode(errors="surrogatepass")) <= LONGEST_BREAKER:
            checks.refuse("dry_sequence_breakers", text, f"texts of 1 to {LONGEST_BREAKER} bytes are expected")
    return texts


def _texts(name: str, given: Any) -> tuple[str, ...]:
    """Several texts as a tuple; an empty text stands for none."""
    if isinstance(given, str):
        texts: tuple[Any, ...] = (given,) if given else ()
    elif isinstance(given, Iterable) and not isinstance(given, bytes | Mapping) and getattr(given, "ndim", 1) > 0:
        texts = tuple(given)
    else:
        checks.refuse(name, given, "a list of texts is expected")
    for text in texts:
        if not isinstance(text, str):
            checks.refuse(name, text, "a list of texts is expected")
    return texts
