"""The metadata of a model, under its architecture's prefix, with limits for each value."""

from typing import Any, NoReturn

from pymla.errors import PymlaError
from pymla.files.gguf_reader import REQUIRED, ModelFile
from pymla.models.families import FAMILIES

# A value above these is no model's: it is refused before anything is computed from it.
MAX_LAYERS = 4096
MAX_SIZE = 1 << 24
MAX_CONTEXT = 1 << 31


class Metadata:
    """Reads keys ``<architecture>.<key>`` of a file; `REQUIRED` as a default means that the key must be there.

    Raises
    ------
    PymlaError
        The architecture is none of `FAMILIES`. Every method raises one that names the file, the key and the value.
    """

    def __init__(self, file: ModelFile):
        self.file = file
        self.architecture: str = file.get("general.architecture", str)
        if self.architecture not in FAMILIES:
            raise PymlaError(
                f"{file.path}: metadata general.architecture is {self.architecture!r}, which pymla does not run; "
                f"it runs {', '.join(FAMILIES)} (DeepSeek V2, V3, V3.2, R1, GLM-5 and their relatives)"
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
