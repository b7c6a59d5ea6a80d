"""IQ4_KSS and IQ2_KL of ik_llama.cpp for kernels."""

import numpy as np

from pymla import ggml
from pymla.codebooks import PAIRS
from pymla.cpu.formats.decoded import format_of
from pymla.cpu.formats.decoder import Decoder, offset_of
from pymla.cpu.machine import simd_ik
from pymla.cpu.machine.orders import EIGHTS
from pymla.cpu.machine.simd_scales import load_scale_for, load_scales_for
from pymla.cpu.runtime.isa import LANES
from pymla.planes import IQ4_LEVELS, ROW_HALF, Codes, Layout, Plane, Scales


def _format(qtype, lowest, highest, codes_for, codes_32, scales, scale):
    offset = offset_of(lowest, highest)
    eights = codes_for(offset, EIGHTS) if LANES == 16 else None
    decoder = Decoder(qtype, 32, lowest, highest, offset, codes_for(offset), codes_32, scales, scale)
    return format_of(decoder._replace(load_eights=eights))


IQ4_KSS = _format(
    ggml.IQ4_KSS,
    IQ4_LEVELS[0],
    IQ4_LEVELS[-1] + 4,
    simd_ik.load_codes_iq4_kss,
    simd_ik.load_codes_32_iq4_kss,
    simd_ik.load_scales_iq4_kss,
    simd_ik.load_scale_iq4_kss,
)

_KL_SCALES = Layout(Codes(()), 32, ROW_HALF, scales=Scales((Plane(2, 4, 4), Plane(0, 2, 1, 4)), minus=32))

IQ2_KL = _format(
    ggml.IQ2_KL,
    int(np.min(PAIRS)),
    int(np.max(PAIRS)),
    simd_ik.load_codes_iq2_kl,
    simd_ik.load_codes_32_iq2_kl,
    load_scales_for(ggml.IQ2_KL, _KL_SCALES),
    load_scale_for(ggml.IQ2_KL, _KL_SCALES),
)
