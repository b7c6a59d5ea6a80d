"""The metadata of a model, under its architecture's prefix, with limits for each value."""

from typing import Any, NoReturn

import numpy as np

from pymla.errors import PymlaError
from pymla.files.gguf_reader import REQUIRED, ModelFile
from pymla.models.families import FAMILIES

#: Relatives of these models that do not run, by the name of their architecture, and the reason.
NOT_RUN = {
    "bailingmoe": "its attention is multi-head attention, not latent attention",
    "bailingmoe2": "its attention is grouped-query attention, not latent attention",
    "bailingmoe3": "it has linear attention (KDA) beside latent attention",
    "deepseek": "its attention is multi-head attention, not latent attention",
    "deepseek2-ocr": "its attention is multi-head attention, not latent attention",
    "deepseek4": "its attention compresses keys and values along the text, and its residual stream is several streams",
    "dots3note": "it has latent attention over a sliding window, with sizes of its own",
    "glm5-next": "it has linear attention (KDA) beside latent attention",
    "hy_v4": "its residual stream is several streams (hyper-connections)",
    "kimi-k3": "it has linear attention (KDA) beside latent attention",
    "kimi-linear": "it has linear attention (KDA) beside latent attention",
    "longcat": "its layers have two attentions and two networks, and some experts compute nothing",
    "longcat-flash": "its layers have two attentions and two networks, and some experts compute nothing",
    "openpangu": "its residual stream is several streams (hyper-connections)",
}

#: Contents that are no model which runs alone, by ``general.type``.
_PARTS = {
    "adapter": "a LoRA adapter, which changes another model; merge it into that model's file",
    "imatrix": "an importance matrix, with which other files are quantised",
    "mmproj": "an encoder of images or sound; take the file of the language model",
}

# A value above these is no model's: it is refused before anything is computed from it.
MAX_LAYERS = 4096
MAX_SIZE = 1 << 24
MAX_CONTEXT = 1 << 31


class Metadata:
    """Reads keys ``<architecture>.<key>`` of a file; `REQUIRED` as a default means that the key must be there.

    Raises
    ------
    PymlaError
        The file holds no language model, or the architecture is none of `FAMILIES`. Every method raises one that names
        the file, the key and the value.
    """

    def __init__(self, file: ModelFile):
        self.file = file
        kind = file.metadata.get("general.type")
        if isinstance(kind, str) and kind in _PARTS:
            raise PymlaError(f"{file.path}: metadata general.type is {kind!r}: the file holds {_PARTS[kind]}")
        self.architecture: str = file.get("general.architecture", str)
        if self.architecture not in FAMILIES:
            runs = f"pymla runs {', '.join(FAMILIES)} (DeepSeek V2, V3, V3.2, R1, GLM-5 and their relatives)"
            reason = NOT_RUN.get(self.architecture)
            raise PymlaError(
                f"{file.path}: metadata general.architecture is {self.architecture!r}, which pymla does not run"
                + (f", because {reason}" if reason else "")
                + f"; {runs}"
            )

    def refuse(self, key: str, value: Any, reason: str) -> NoReturn:
        """Raise the error for a value."""
        raise PymlaError(f"{self.file.path}: metadata {self._key(key)} is {value}; {reason}")

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """A value of a Python type."""
        return self.file.get(self._key(key), kind, default)

    def size(self, key: str, default: Any = REQUIRED, *, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        """A whole number between the limits, both included."""
        value: int = self.get(key, int, default)
        if not minimum <= value <= maximum:
            self.refuse(key, value, f"a number from {minimum} to {maximum} is expected")
        return value

    def layer_size(self, key: str, first: int, stop: int, default: Any = REQUIRED, *, minimum: int = 1) -> int:
        """A `size` that the layers from `first` to below `stop` share; the file gives it once, or as an array with a
        value for each of its layers."""
        values = self.file.metadata.get(self._key(key))
        if not isinstance(values, np.ndarray):
            return self.size(key, default, minimum=minimum)
        layers = self.size("block_count", maximum=MAX_LAYERS)
        if values.dtype.kind not in "iu" or len(values) != layers:
            self.refuse(key, "an array", f"one number is expected, or {layers}, one for each layer")
        found = sorted(set(values[first:stop].tolist()))
        if len(found) > 1:
            self.refuse(key, f"an array of {found[0]} to {found[-1]}", "pymla runs layers of one size")
        if not minimum <= found[0] <= MAX_SIZE:
            self.refuse(key, found[0], f"a number from {minimum} to {MAX_SIZE} is expected")
        return int(found[0])

    def number(self, key: str, default: Any = REQUIRED, *, minimum: float = 0.0, maximum: float = 1e9) -> float:
        """A number between the limits, both excluded unless it is the default."""
        value: float = self.get(key, float, default)
        if not minimum < value < maximum and value != default:
            self.refuse(key, value, f"a number between {minimum:g} and {maximum:g} is expected")
        return value

    def require(self, key: str, accepted: tuple[float, ...]) -> None:
        """Refuse a file where the key has another value than the accepted ones; a missing key has the first."""
        value = self.get(key, float, accepted[0])
        if value not in accepted:
            self.refuse(key, value, f"pymla does not implement other values than {accepted[-1]:g}")

    def _key(self, key: str) -> str:
        return f"{self.architecture}.{key}"
