"""Types whose codes come in vectors (`pymla.vectors`) for kernels."""

from pymla import ggml
from pymla.codebooks import codebook
from pymla.cpu.formats.decoded import format_of
from pymla.cpu.formats.decoder import Decoder, Together, offset_of
from pymla.cpu.formats.format import Format
from pymla.cpu.machine.orders import EIGHTS
from pymla.cpu.machine.simd_scales import load_scale_for, load_scales_for
from pymla.cpu.machine.simd_vectors import (
    load_codes_32_for,
    load_codes_for,
    load_found_for,
    load_scale_iq1_m,
    load_scales_iq1_m,
    look_up_four_for,
)
from pymla.cpu.machine.simd_vectors_512 import HAS_VBMI
from pymla.cpu.runtime.compiling import inlined
from pymla.cpu.runtime.isa import LANES
from pymla.vectors import VECTORS


def format_of_vectors(qtype: int) -> Format:
    """The row of `FORMATS` of a type of ``vectors.VECTORS``."""
    vectors = VECTORS[qtype]
    layout, highest = vectors.layout, vectors.highest
    has_eights = codebook(vectors.name).shape[1] == 8
    offset = offset_of(-highest, highest)
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
            together=_together(qtype, vectors, offset) if HAS_VBMI and has_eights else None,
        )
    )


def _together(qtype, vectors, offset):
    look_up_four = look_up_four_for(qtype, vectors)

    @inlined
    def look_up(a, b, c, d):
        high, low, other_high, other_low = look_up_four(a, b, c, d)
        return (high, low), (other_high, other_low)

    def load_for(load_eights):
        @inlined
        def load(found, address):
            high, low = found
            return (
                load_eights(high, low, address, 0),
                load_eights(high, low, address, 1),
                load_eights(high, low, address, 2),
                load_eights(high, low, address, 3),
            )

        return load

    first, second = map(load_for, load_found_for(qtype, vectors, offset))
    return Together(look_up, (first, second))
