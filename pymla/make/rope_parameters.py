"""How a model turns its queries and keys, from the JSON of its configuration: RoPE, YaRN and LongRoPE.

Keys are those of transformers 5 (``rope_parameters``) and of older files (``rope_theta``, ``rope_scaling``).
"""

import math
from typing import Any, NamedTuple

from pymla.errors import PymlaError
from pymla.make.json_values import Values, json_text
from pymla.models.metadata import MAX_CONTEXT


class Yarn(NamedTuple):
    """YaRN's parameters. `beta_fast` and `beta_slow` are None where the file leaves them to its reader."""

    factor: float
    original: int  # context length before it was extended
    mscale_all_dim: float
    beta_fast: float | None
    beta_slow: float | None
    temperature: float  # attention temperature (Llama 4, Mistral); 0 is none


class LongRope(NamedTuple):
    """LongRoPE's parameters: divisors of the frequencies, one for each pair of dimensions."""

    long: tuple[float, ...]  # of sequences longer than `original`
    short: tuple[float, ...]
    original: int
    attention_factor: float  # on cos and sin


class Rope(NamedTuple):
    """The frequencies of a model."""

    theta: float
    scaling: Yarn | LongRope | None = None

    @property
    def yarn(self) -> Yarn | None:
        return self.scaling if isinstance(self.scaling, Yarn) else None

    @property
    def long(self) -> LongRope | None:
        return self.scaling if isinstance(self.scaling, LongRope) else None


def read_rope(values: Values, rope_dim: int, head_dim: int, context_length: int, long_rope: bool) -> Rope:
    """The parameters of a config.json.

    Parameters
    ----------
    rope_dim : dimensions of a head that are turned
    head_dim : those of which ``partial_rotary_factor`` is the share that is turned
    context_length : of the model; LongRoPE's default of the factor on cos and sin depends on it
    long_rope : whether the model's GGUF files can hold LongRoPE's factors

    Raises
    ------
    PymlaError
        A parameter is missing or damaged, or has a value that GGUF cannot hold.
    """
    rope = values.get("rope_parameters", dict) or values.get("rope_scaling", dict) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = values.number("rope_theta", values.number("rope_theta", 10000.0), among=rope)
    for place in (rope, None):
        share = values.number("partial_rotary_factor", among=place)
        if share is not None and round(head_dim * share) != rope_dim:
            values.refuse("partial_rotary_factor", share, f"{rope_dim / head_dim:g} is expected by the sizes of a head")
    if kind == "default":
        return Rope(theta)
    if kind == "yarn":
        return Rope(theta, _yarn(values, rope))
    if kind != "longrope" or not long_rope:
        values.refuse("rope_type", kind, f"yarn{', longrope' if long_rope else ''} and default are converted")
    return Rope(theta, _long_rope(values, rope, rope_dim, context_length))


def _yarn(values: Values, rope: dict[str, Any]) -> Yarn:
    factor, original = values.number("factor", among=rope), _original(values, rope)
    for key, value in (("factor", factor), ("original_max_position_embeddings", original)):
        if value is None:
            raise PymlaError(f"{values.path}: {key} of the rope parameters is missing, which yarn needs")
    assert factor is not None
    assert original is not None
    mscale, all_dim = (values.number(key, among=rope) for key in ("mscale", "mscale_all_dim"))
    if mscale != all_dim or not mscale:
        equal = json_text(all_dim)
        values.refuse("mscale", mscale, f"it must equal mscale_all_dim, which is {equal}, and not be 0")
    values.require("truncate", bool, True, among=rope)
    if rope.get("attention_factor") is not None:
        values.refuse("attention_factor", rope["attention_factor"], "GGUF cannot hold it for this architecture")
    fast, slow = (values.number(key, among=rope) for key in ("beta_fast", "beta_slow"))
    temperature = values.number("llama_4_scaling_beta", 0.0, among=rope)
    # transformers takes 0 for its default, which is GGUF's, too.
    return Yarn(factor, original, mscale, fast or None, slow or None, temperature)


def _long_rope(values: Values, rope: dict[str, Any], rope_dim: int, context_length: int) -> LongRope:
    long, short = (_factors(values, key, rope, rope_dim // 2) for key in ("long_factor", "short_factor"))
    original = _original(values, rope) or context_length
    attention_factor = values.number("attention_factor", among=rope)
    if attention_factor is None:
        attention_factor = _long_rope_attention_factor(values, rope, original, context_length)
    return LongRope(long, short, original, float(attention_factor))


def _original(values: Values, rope: dict[str, Any]) -> int | None:
    """The context length before it was extended: among the parameters, or beside them in older files."""
    key = "original_max_position_embeddings"
    original = values.get(key, int, values.get(key, int), among=rope)
    if original is not None and not 1 <= original <= MAX_CONTEXT:
        values.refuse(key, original, f"1 to {MAX_CONTEXT} is expected")
    return original


def _factors(values: Values, key: str, rope: dict[str, Any], count: int) -> tuple[float, ...]:
    factors = values.get(key, list, among=rope)
    if factors is None:
        raise PymlaError(f"{values.path}: {key} of the rope parameters is missing, which longrope needs")
    numbers = tuple(values.number(key, among={key: factor}) for factor in factors)
    positive = tuple(float(number) for number in numbers if number is not None and number > 0)
    if len(numbers) != count or len(positive) != count:
        values.refuse(key, factors, f"{count} numbers above 0 are expected, one for each pair of dimensions")
    return positive


def _long_rope_attention_factor(values: Values, rope: dict[str, Any], original: int, context_length: int) -> float:
    """The factor on cos and sin where the file has none, as in transformers' ``_compute_longrope_parameters``."""
    factor = values.number("factor", context_length / original, among=rope)
    return 1.0 if factor <= 1 or original == 1 else math.sqrt(1 + math.log(factor) / math.log(original))
