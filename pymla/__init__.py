"""DeepSeek-family models from GGUF files, in Numba-compiled Python.

>>> import pymla
>>> model = pymla.load()                                          # doctest: +SKIP
>>> model.generate("def ", max_tokens=20, temperature=0)          # doctest: +SKIP
"""

from __future__ import annotations

import sys

from pymla.errors import CacheFull, PymlaError
from pymla.moved import Finder

TYPE_CHECKING = False  # as in `typing`, whose import takes milliseconds
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

__all__ = ["CacheFull", "Engine", "LanguageModel", "PymlaError", "__version__", "load"]

sys.meta_path.append(Finder())


def __getattr__(name: str) -> Any:
    # The engine imports NumPy and the tokenizers package; the command line's help does not need them.
    if name in ("load", "LanguageModel"):
        from pymla.engine import loading

        return getattr(loading, name)
    if name == "Engine":
        from pymla.engine.engine import Engine

        return Engine
    raise AttributeError(f"module 'pymla' has no attribute {name!r}")
