"""Types of tensors for kernels: a module for a family of types, and the table of all.

Kernels are made for a type by a factory that takes its functions from the table, so that a program compiles those of
the types that its file has.

Weights of a block are ``w = d * code + m`` with codes of at most 8 bits. Activations are ``x = scale * a``. So
``w · x = Σ_blocks scale * (d * Σ code * a + m * Σ a)``.
"""

from pymla import ggml
from pymla.cpu.formats import floats, ik_quants, k_quants, legacy
from pymla.cpu.formats.format import Format
from pymla.cpu.formats.planes import format_of_planes
from pymla.cpu.formats.trellis import format_of_trellis
from pymla.cpu.formats.trits import format_of_trits
from pymla.cpu.formats.vectors import format_of_vectors
from pymla.planes import LAYOUTS
from pymla.trellis import TRELLISES
from pymla.trits import TRITS
from pymla.vectors import VECTORS

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
    **{qtype: format_of_planes(qtype) for qtype in LAYOUTS},
    **{qtype: format_of_vectors(qtype) for qtype in VECTORS},
    **{qtype: format_of_trits(qtype) for qtype in TRITS},
    **{qtype: format_of_trellis(qtype) for qtype in TRELLISES},
    ggml.IQ4_KSS: ik_quants.IQ4_KSS,
    ggml.IQ2_KL: ik_quants.IQ2_KL,
}
