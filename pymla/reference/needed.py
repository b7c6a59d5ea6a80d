"""Twin of the other backends' `needed`: nothing is compiled here."""

from collections.abc import Callable
from typing import Any


def compile_for(
    model: Any, progress: Callable[[int, int, str], object] | None = None, warn: Callable[[str], object] | None = None
) -> None:
    """Return at once: NumPy is ready."""
