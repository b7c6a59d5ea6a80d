"""The signatures that kernels show: their function's, with the types of its arguments."""

import inspect
from collections.abc import Callable, Sequence

from numba import types


class _Kind:
    """A type of arguments, as signatures show it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def kernel_signature(function: Callable, kinds: Sequence[types.Type], name: str) -> inspect.Signature:
    """A function's signature with the Numba types of its arguments.

    Raises
    ------
    TypeError
        The function does not take so many arguments.
    """
    plain = inspect.signature(function)
    parameters = list(plain.parameters.values())
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return plain
    if len(parameters) != len(kinds):
        raise TypeError(f"kernel {name} takes {len(parameters)} arguments, and its signature has {len(kinds)}")
    described = [_described(kind) for kind in kinds]
    return plain.replace(
        parameters=[each.replace(annotation=kind) for each, kind in zip(parameters, described, strict=True)]
    )


def _described(kind: types.Type) -> object:
    """A Numba type as a person writes it: ``float32 (n, m)``, int, float, bool, or the class of a NamedTuple."""
    if isinstance(kind, types.Array):
        sizes = ", ".join("nmkl"[: kind.ndim]) + ("," if kind.ndim == 1 else "")
        return _Kind(f"{kind.dtype} ({sizes}){'' if kind.layout == 'C' else ' with any strides'}")
    if isinstance(kind, (types.NamedTuple, types.NamedUniTuple)):
        return kind.instance_class
    if isinstance(kind, types.BaseTuple):
        return _Kind(f"tuple of {len(kind)}")
    if isinstance(kind, types.Boolean):
        return bool
    return float if isinstance(kind, types.Float) else int
