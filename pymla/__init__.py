"""DeepSeek-family models from GGUF files, in Numba-compiled Python.

>>> import pymla
>>> model = pymla.load()                                          # doctest: +SKIP
>>> model.generate("def ", max_tokens=20, temperature=0)          # doctest: +SKIP
"""

from pymla.errors import CacheFull, PymlaError

__version__ = "0.1.0"

__all__ = ["CacheFull", "LanguageModel", "PymlaError", "__version__", "load"]


def __getattr__(name):
    # The engine imports NumPy and the tokenizers package; the command line's help does not need them.
    if name in ("load", "LanguageModel"):
        from pymla.engine import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'pymla' has no attribute {name!r}")
