"""Trellis types (`pymla.trellis`) for kernels."""

from pymla.cpu.formats.decoded import format_of
from pymla.cpu.formats.decoder import Decoder, offset_of
from pymla.cpu.formats.format import Format
from pymla.cpu.machine.orders import EIGHTS
from pymla.cpu.machine.simd_scales import load_scale_for, load_scales_for
from pymla.cpu.machine.simd_trellis import load_codes_32_for, load_codes_for
from pymla.cpu.runtime.isa import LANES, VNNI
from pymla.trellis import MIDDLE, TRELLISES


def format_of_trellis(qtype: int) -> Format:
    """The row of `FORMATS` of a type of ``trellis.TRELLISES``."""
    trellis = TRELLISES[qtype]
    # With VNNI codes in registers are the sums themselves.
    offset = MIDDLE if VNNI else offset_of(-MIDDLE, MIDDLE)
    return format_of(
        Decoder(
            qtype,
            trellis.layout.each,
            -MIDDLE,
            MIDDLE,
            offset,
            load_codes_for(qtype, trellis, offset),
            load_codes_32_for(qtype, trellis),
            load_scales_for(qtype, trellis.layout),
            load_scale_for(qtype, trellis.layout),
            load_eights=load_codes_for(qtype, trellis, offset, EIGHTS) if LANES == 16 else None,
        )
    )
