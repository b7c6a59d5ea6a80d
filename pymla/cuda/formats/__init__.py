"""Blocks of the ggml types, as kernels read them. Twin of `pymla.cpu.formats`.

A type is one set of functions (`Format`, `FloatFormat`). Kernels take the set from the table here when they are made,
and know nothing else of a type. Types whose blocks are bit planes are made from their layouts (`planes`). Other modules
hold a family each: types with codebooks (`iq_quants`), ternary digits (`ternary`) and generators (`ik_trellis`), two
more of ik_llama.cpp (`ik_quants`), and types whose planes are read by functions of their own (`legacy`, `k_quants`).
They share loads from both memories (`loads`), scales and minima (`numbers`), and tables of levels (`levels`).

Kernels of products copy a *run* of blocks to shared memory (`pymla.cuda.formats.runs`) and read whole blocks of 32
weights there. Kernels that read few blocks take *pieces* of them from global memory: four neighbouring lanes share 32
weights, and lane w of them has the eight weights 4w to 4w + 3 and 16 + 4w to 16 + 4w + 3, as two words of four int8
codes.

A weight is ``scale * code + minimum``. Signed codes of 3 to 6 bits stay in the high bits of their bytes, where it takes
one operation to make them signed: they are 32 to 4 times those of the file, and the scale is as much smaller, exactly.
Where rows begin with a scale of their own, products of a run's blocks are without it, and kernels multiply the sums of
rows with it (`Format.row_scale`).
"""

from pymla import ggml
from pymla.cuda.formats import floats, ik_quants, ik_trellis, iq_quants, k_quants, legacy, planes, ternary
from pymla.cuda.formats.format import FloatFormat, Format
from pymla.planes import LAYOUTS as PLANES

__all__ = ["FLOATS", "FORMATS", "FloatFormat", "Format"]

#: Quantised types.
FORMATS = {
    ggml.Q4_0: legacy.Q4_0,
    ggml.Q4_1: legacy.Q4_1,
    ggml.Q5_0: legacy.Q5_0,
    ggml.Q5_1: legacy.Q5_1,
    ggml.Q8_0: legacy.Q8_0,
    ggml.Q6_K: k_quants.Q6_K,
    ggml.IQ1_S: iq_quants.IQ1_S,
    ggml.IQ1_M: iq_quants.IQ1_M,
    ggml.IQ1_M_R1: iq_quants.IQ1_M_R1,
    ggml.IQ2_XXS: iq_quants.IQ2_XXS,
    ggml.IQ2_XS: iq_quants.IQ2_XS,
    ggml.IQ2_S: iq_quants.IQ2_S,
    ggml.IQ3_XXS: iq_quants.IQ3_XXS,
    ggml.IQ3_S: iq_quants.IQ3_S,
    ggml.TQ1_0: ternary.TQ1_0,
    ggml.IQ1_BN: ternary.IQ1_BN,
    ggml.IQ4_KSS: ik_quants.IQ4_KSS,
    ggml.IQ2_KL: ik_quants.IQ2_KL,
    ggml.IQ1_KT: ik_trellis.IQ1_KT,
    ggml.IQ2_KT: ik_trellis.IQ2_KT,
    ggml.IQ3_KT: ik_trellis.IQ3_KT,
    ggml.IQ4_KT: ik_trellis.IQ4_KT,
    **{qtype: planes.format_of(qtype) for qtype in PLANES},
}

#: Float types.
FLOATS = {
    ggml.F32: floats.F32,
    ggml.F16: floats.F16,
    ggml.BF16: floats.BF16,
}
