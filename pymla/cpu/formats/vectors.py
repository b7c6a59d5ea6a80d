"""Types whose codes come in vectors (`pymla.vectors`) for kernels."""

from pymla import ggml
from pymla.codebooks import codebook
from pymla.cpu.formats.decoded import format_of
from pymla.cpu.formats.decoder import Decoder, offset_of
from pymla.cpu.formats.format import Format
from pymla.cpu.machine.orders import EIGHTS
from pymla.cpu.machine.simd_planes import load_scale_for, load_scales_for
from pymla.cpu.machine.simd_vectors import (
    load_codes_32_for,
    load_codes_for,
    load_eights_of_two_for,
    load_scale_iq1_m,
    load_scales_iq1_m,
)
from pymla.cpu.machine.simd_vectors_512 import HAS_VBMI
from pymla.cpu.runtime.isa import LANES
from pymla.vectors import VECTORS


def format_of_vectors(qtype: int) -> Format:
    """The row of `FORMATS` of a type of ``vectors.VECTORS``."""
    vectors = VECTORS[qtype]
    layout, highest = vectors.layout, vectors.highest
    has_eights = codebook(vectors.name).shape[1] == 8
    offset = offset_of(-highest, highest, layout.each)
    return format_of(
        Decoder(
            qtype,
            layout.each,
            -highest,
            highest,
            offset,
            load_codes_for(qtype, vectors, offset),
            load_codes_32_for(qtype, vectors),
            load_scales_iq1_m if qtype == ggml.IQ1_M else load_scales_for(qtype, layout),
            load_scale_iq1_m if qtype == ggml.IQ1_M else load_scale_for(qtype, layout),
            load_eights=load_codes_for(qtype, vectors, offset, EIGHTS) if LANES == 16 else None,
            load_eights_of_two=load_eights_of_two_for(qtype, vectors, offset) if HAS_VBMI and has_eights else None,
        )
    )
