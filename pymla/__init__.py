"""DeepSeek-family models from GGUF files, in Numba-compiled Python.

>>> import pymla
>>> model = pymla.load()                                          # doctest: +SKIP
>>> model.generate("def ", max_tokens=20, temperature=0)          # doctest: +SKIP
"""

import sys

from pymla.errors import CacheFull, PymlaError
from pymla.moved import Finder

__version__ = "0.1.0"

__all__ = ["CacheFull", "LanguageModel", "PymlaError", "__version__", "load"]

sys.meta_path.append(Finder())


def __getattr__(name):
    # The engine imports NumPy and the tokenizers package; the command line's help does not need them.
    if name in ("load", "LanguageModel"):
        from pymla.engine import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'pymla' has no attribute {name!r}")
