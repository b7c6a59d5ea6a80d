"""Types whose blocks are bit planes (`pymla.planes`) for kernels."""

from pymla.cpu.formats.decoded import format_of
from pymla.cpu.formats.decoder import MOST_OF_INTEGERS, Decoder, Integers, Multiples, offset_of
from pymla.cpu.formats.format import Format
from pymla.cpu.machine.orders import EIGHTS, FOURS
from pymla.cpu.machine.simd_planes import load_codes_32_for, load_codes_for, load_multiples_for
from pymla.cpu.machine.simd_scales import (
    load_half_for,
    load_integers_for,
    load_minima_for,
    load_minimum_for,
    load_scale_for,
    load_scales_for,
    moved_scales_for,
)
from pymla.cpu.runtime.isa import AMX, LANES, VNNI
from pymla.planes import LAYOUTS


def format_of_planes(qtype: int) -> Format:
    """The row of `FORMATS` of a type of ``planes.LAYOUTS``."""
    layout = LAYOUTS[qtype]
    lowest, highest = layout.codes.lowest, layout.codes.highest
    offset = offset_of(lowest, highest)
    decoder = Decoder(
        qtype,
        layout.each,
        lowest,
        highest,
        offset,
        load_codes_for(qtype, layout, offset),
        load_codes_32_for(qtype, layout),
        load_scales_for(qtype, layout),
        load_scale_for(qtype, layout),
    )
    if layout.minima:
        minima = load_minima_for(qtype, layout), load_minimum_for(qtype, layout)
        decoder = decoder._replace(load_minima=minima[0], load_minimum=minima[1])
    if VNNI and layout.each == 16 and layout.scales:
        decoder = decoder._replace(multiples=_multiples(qtype, layout))
    return format_of(_with_wide_registers(decoder, layout) if LANES == 16 else decoder)


def _multiples(qtype, layout):
    """Codes times integer scales, where a byte holds them; else None."""
    codes, scales = layout.codes, layout.scales
    if codes.levels or scales.times != 1 or scales.signed or scales.negative:
        return None
    largest = (1 << sum(plane.bits for plane in scales.planes)) - 1
    ends = [code * scale for code in (codes.lowest, codes.highest) for scale in (-scales.minus, largest - scales.minus)]
    lowest, highest = min(ends), max(ends)
    if highest - lowest > 255 or (AMX and highest > 127):
        return None
    load_codes = load_multiples_for(qtype, layout, 0 if AMX else -lowest)
    return Multiples(lowest, highest, load_codes, load_scales_for(qtype, layout._replace(each=32, scales=None)))


def _with_wide_registers(decoder, layout):
    """The decoder with what it has for registers of 64 bytes."""
    qtype, offset = decoder.qtype, decoder.offset
    decoder = decoder._replace(load_eights=load_codes_for(qtype, layout, offset, EIGHTS, moves=False))
    if decoder.has_rest:
        decoder = decoder._replace(load_fours=load_codes_for(qtype, layout, offset, FOURS))
    if layout.codes.variants:
        decoder = decoder._replace(moved_scales=moved_scales_for(qtype, layout, offset))
    elif layout.each == 16 and layout.scales and decoder.highest - decoder.lowest <= MOST_OF_INTEGERS:
        decoder = decoder._replace(integers=_integers(qtype, layout))
    return decoder


def _integers(qtype, layout):
    """Integer scales of a type whose blocks have them."""
    minima = layout.minima and load_integers_for(qtype, layout.minima)
    unit = layout.minima and load_half_for(layout.minimum_at)
    return Integers(load_integers_for(qtype, layout.scales), load_half_for(layout.scale_at), minima, unit)
