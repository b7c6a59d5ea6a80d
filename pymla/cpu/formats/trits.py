"""Types with five codes in a byte (`pymla.trits`) for kernels."""

from pymla import ggml
from pymla.cpu.formats.decoded import format_of
from pymla.cpu.formats.decoder import Decoder
from pymla.cpu.formats.format import Format
from pymla.cpu.machine.orders import EIGHTS, FOURS
from pymla.cpu.machine.simd_scales import load_scale_for, load_scales_for
from pymla.cpu.machine.simd_trits import load_codes_32_for, load_codes_for
from pymla.cpu.runtime.isa import LANES
from pymla.trits import TRITS


def format_of_trits(qtype: int) -> Format:
    """The row of `FORMATS` of a type of ``trits.TRITS``."""
    trits = TRITS[qtype]
    in_fours = LANES == 16 and ggml.BLOCK_SIZE[qtype] < 256
    return format_of(
        Decoder(
            qtype,
            trits.layout.each,
            lowest=-1,
            highest=1,
            offset=1,
            load_codes=load_codes_for(qtype, trits),
            load_codes_32=load_codes_32_for(qtype, trits),
            load_scales=load_scales_for(qtype, trits.layout),
            load_scale=load_scale_for(qtype, trits.layout),
            load_eights=load_codes_for(qtype, trits, EIGHTS) if LANES == 16 else None,
            load_fours=load_codes_for(qtype, trits, FOURS) if in_fours else None,
        )
    )
