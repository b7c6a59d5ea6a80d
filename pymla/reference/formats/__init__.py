"""Types of tensors in NumPy: a module for a family of types, and the table of all.

Block layouts follow ``ggml-common.h`` and ``ggml-quants.c`` of llama.cpp; gguf-py's ``quants.py`` is the oracle of the
tests: `Format.dequantise` is bit-exact against it, `Format.quantise` byte-exact.
"""

from pymla import ggml
from pymla.reference.formats import floats, k_quants, legacy
from pymla.reference.formats.format import Format

__all__ = ["FORMATS", "Format"]

FORMATS: dict[int, Format] = {
    ggml.F32: floats.F32,
    ggml.F16: floats.F16,
    ggml.BF16: floats.BF16,
    ggml.Q4_0: legacy.Q4_0,
    ggml.Q4_1: legacy.Q4_1,
    ggml.Q5_0: legacy.Q5_0,
    ggml.Q5_1: legacy.Q5_1,
    ggml.Q8_0: legacy.Q8_0,
    ggml.Q6_K: k_quants.Q6_K,
}
