"""Types whose blocks are bit planes (`pymla.planes`) for kernels."""

from pymla import ggml
from pymla.cpu.formats.decoded import format_of
from pymla.cpu.formats.decoder import MOST_OF_INTEGERS, Decoder, Integers, offset_of
from pymla.cpu.formats.format import Format
from pymla.cpu.machine.orders import EIGHTS, FOURS
from pymla.cpu.machine.simd_planes import (
    load_codes_32_for,
    load_codes_for,
    load_half_for,
    load_integers_for,
    load_minima_for,
    load_minimum_for,
    load_scale_for,
    load_scales_for,
)
from pymla.cpu.runtime.isa import LANES
from pymla.planes import LAYOUTS


def format_of_planes(qtype: int) -> Format:
    """The row of `FORMATS` of a type of ``planes.LAYOUTS``."""
    layout = LAYOUTS[qtype]
    lowest, highest = layout.codes.lowest, layout.codes.highest
    offset = offset_of(lowest, highest, layout.each)
    return format_of(
        Decoder(
            qtype,
            layout.each,
            lowest,
            highest,
            offset,
            load_codes_for(qtype, layout, offset),
            load_codes_32_for(qtype, layout),
            load_scales_for(qtype, layout),
            load_scale_for(qtype, layout),
            load_minima_for(qtype, layout) if layout.minima else None,
            load_minimum_for(qtype, layout) if layout.minima else None,
            load_codes_for(qtype, layout, offset, EIGHTS) if LANES == 16 else None,
            load_codes_for(qtype, layout, offset, FOURS) if LANES == 16 and ggml.BLOCK_SIZE[qtype] < 256 else None,
            _integers(qtype, layout)
            if LANES == 16 and layout.each == 16 and highest - lowest <= MOST_OF_INTEGERS
            else None,
        )
    )


def _integers(qtype, layout):
    """Integer scales of a type whose blocks have them."""
    if layout.scales is None:
        return None
    minima = layout.minima and load_integers_for(qtype, layout.minima)
    unit = layout.minima and load_half_for(layout.minimum_at)
    return Integers(load_integers_for(qtype, layout.scales), load_half_for(layout.scale_at), minima, unit)
