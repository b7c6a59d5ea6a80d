"""Values in the JSON files of a Hugging Face folder, with the type and the range of each checked."""

import json
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np

from pymla.errors import PymlaError
from pymla.files.checkpoint import read_json
from pymla.models.metadata import MAX_SIZE
from pymla.printable import shown

_F32_MAX = float(np.finfo(np.float32).max)


class Values:
    """The object in a JSON file; of a file that is `optional` and absent, an empty one."""

    def __init__(self, path: Path, optional: bool = False):
        self.path = path
        self._values = {} if optional and not path.exists() else read_json(path)

    def refuse(self, key: str, value: Any, reason: str) -> NoReturn:
        raise PymlaError(f"{self.path}: {key} is {json_text(value)}; {reason}")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None, among: dict | None = None) -> Any:
        """A value of one of some types, or the default where the key is absent or null."""
        value = (self._values if among is None else among).get(key)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:
            self.refuse(key, value, f"a value of type {' or '.join(each.__name__ for each in kinds)} is expected")
        return value

    def size(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        """An integer. Without a default the key must be there."""
        value = self.get(key, int, default)
        if value is None:
            raise PymlaError(f"{self.path}: {key} is missing")
        if not minimum <= value <= maximum:
            self.refuse(key, value, f"a number from {minimum} to {maximum} is expected")
        return value

    @overload
    def number(self, key: str, default: float, among: dict | None = None) -> float: ...

    @overload
    def number(self, key: str, default: None = None, among: dict | None = None) -> float | None: ...

    def number(self, key: str, default: float | None = None, among: dict | None = None) -> float | None:
        """A number that float32 holds, as GGUF has them; an integer will do."""
        value = self.get(key, (float, int), default, among)
        if value is not None and not -_F32_MAX <= value <= _F32_MAX:
            self.refuse(key, value, "a number that float32 holds is expected")
        return value

    def require(self, key: str, kind: type | tuple[type, ...], only: Any, among: dict | None = None) -> None:
        """Raise PymlaError unless a key is absent or has its only value that can be converted."""
        value = self.get(key, kind, only, among)
        if value != only:
            self.refuse(key, value, f"only {json.dumps(only)} is converted")


def json_text(value: Any) -> str:
    """A JSON value for a message, as the file writes it."""
    return "an object" if isinstance(value, dict) else shown(value, write=json.dumps)
