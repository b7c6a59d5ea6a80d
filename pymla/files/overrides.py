"""Metadata that a caller gives in place of a file's own."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pymla import checks

#: A value of one of GGUF's types but arrays.
Value = int | float | bool | str


def checked(overrides: Any) -> dict[str, Value]:
    """A caller's argument `overrides`: values by their keys, as Python's own; NumPy's numbers will do.

    Raises
    ------
    PymlaError
        It is no dict, a key is no text, or a value has none of the types.
    """
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        checks.refuse("overrides", overrides, "a dict of metadata keys and values is expected")
    return {_key(key): _value(key, value) for key, value in overrides.items()}


def _key(key: Any) -> str:
    if not isinstance(key, str) or not key:
        checks.refuse("overrides", key, "a key of the metadata is expected, as general.name")
    return key


def _value(key: str, value: Any) -> Value:
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, Value):
        checks.refuse(f"overrides[{key}]", value, "a whole number, a number, True or False, or a text is expected")
    return value
