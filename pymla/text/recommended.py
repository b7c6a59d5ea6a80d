"""Sampling parameters that a model file recommends, by its keys ``general.sampling.*``.

The keys and their meaning are llama.cpp's (``common_init_sampler_from_model`` in ``common/common.cpp``).
"""

from typing import Any, NamedTuple

from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.printable import shown
from pymla.text.sampling import SamplingParams

_PREFIX = "general.sampling."

#: Keys without the prefix, and the parameters that they set.
_PARAMETERS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_last_n": "penalty_window",
    "penalty_repeat": "repetition_penalty",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
    "sequence": "samplers",
}
#: Parameters that a file may recommend.
FIELDS = frozenset(_PARAMETERS.values())

#: The window of penalties over all tokens, before it is written as 0.
_ALL = 1 << 31


class Recommended(NamedTuple):
    """Recommendations of a file."""

    values: dict[str, float | str]  # fields of `SamplingParams`
    warnings: list[str]  # recommendations that are not followed, by name


def recommended_sampling(file: ModelFile) -> Recommended:
    """The sampling parameters that a file recommends, and a warning for each key that cannot be followed."""
    values: dict[str, float | str] = {}
    warnings = []
    for key, value in file.metadata.items():
        if not key.startswith(_PREFIX):
            continue
        name = key.removeprefix(_PREFIX)
        try:
            if name not in _PARAMETERS:
                raise PymlaError("pymla does not know this key")
            values |= _parameter(name, value)
        except PymlaError as error:
            warnings.append(f"{file.path}: metadata {key} is {shown(value)}, and is not used: {error}")
    if values.get("penalty_window") == 0:
        # A penalty over no token is none; 0 stands for all tokens here.
        values.pop("penalty_window")
        values.pop("repetition_penalty", None)
    elif values.get("penalty_window") == _ALL:
        values["penalty_window"] = 0
    return Recommended(values, warnings)


def _parameter(name: str, value: Any) -> dict[str, float | str]:
    """A parameter as llama.cpp takes it: negative temperatures and top-k are 0, a negative window is all tokens."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
        value = {"temp": 0, "top_k": 0, "penalty_last_n": _ALL}.get(name, value)
    field = _PARAMETERS[name]
    checked = getattr(SamplingParams(**{field: value}), field)
    return {field: ";".join(checked) if isinstance(checked, tuple) else checked}
