"""Types whose codes of 4 bits are levels of a table: IQ4_NL and IQ4_XS; and MXFP4 and NVFP4, whose levels are floats of
4 bits and whose scales are floats of 8 bits. `pymla.cpu.quantise.level_search` has the search of IQ4_XS.
"""

import numpy as np

from pymla import ggml
from pymla.cpu.machine.simd import address, fma, mul, sub, total
from pymla.cpu.machine.simd_levels import nearest_of
from pymla.cpu.machine.simd_memory import load_f32, store_f16, store_f32
from pymla.cpu.machine.simd_quantise import (
    first_lane,
    lane_value,
    load_f32x16,
    ramp,
    ramp_of_halves,
    smallest,
    splat_f32x16,
)
from pymla.cpu.quantise.level_search import (
    Numbers,
    Spread,
    best_fit,
    costs,
    fit_for,
    halves,
    inverses,
    level_quantiser,
    record_of,
    scaled,
    sums_for,
    take,
)
from pymla.cpu.quantise.packing import code_packer
from pymla.cpu.quantise.quantiser import Quantiser
from pymla.cpu.quantise.search import extremes, inverse_of
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.planes import LAYOUTS

_ZERO = np.float32(0)
#: Floats of the work memory: weights and importance of 32 weights, codes, a record of `level_search`.
_CODES_AT, _SCRATCH = 64, 144
_SPREAD = Spread(0.7, 0.075)


@inlined
def store_codes_of(block, store_codes, each, inverse, to):
    """The codes of a small block in the work memory, as bytes."""
    factor = splat_f32x16(inverse)
    for at in range(0, each, 16):
        store_codes(to + at, mul(load_f32x16(block.work + 4 * at), factor))


# IQ4_NL

_NL = LAYOUTS[ggml.IQ4_NL]
_nl_level, _nl_store_codes = nearest_of(_NL.codes.levels, range(16))
_nl_sums = sums_for(_nl_level, 0, 32)
_nl_fit = fit_for(_nl_sums, _NL.codes.levels, 0, 32, _SPREAD)
_nl_pack = code_packer(_NL.codes.planes, 32)
#: Between neighbouring candidates, as parts of a scale: when either sign's best fit is refined, and at the end.
_REFINED, _LAST = np.float32(0.01), np.float32(0.002)
_MIDDLE_OF_8, _MIDDLE_OF_16, _ONE = np.float32(3.5), np.float32(7.5), np.float32(1)


@inlined
def refined_scale(block):
    """The best of eight scales about each of two fits, one of either sign."""
    above = inverse_of(load_f32(record_of(block, 0)))
    below = inverse_of(load_f32(record_of(block, 0) + 12))
    first = _ONE - _MIDDLE_OF_8 * _REFINED
    inverse = ramp_of_halves(above * first, above * _REFINED, below * first, below * _REFINED)
    _, _, scale, _ = best_fit(*_nl_sums(block.work, inverse, splat_f32x16(_ZERO)))
    return scale


@helper
def iq4_nl(x, w, block, scratch):
    """32 weights with a scale of either sign: sixteen candidates of either sign, eight about the best of each, and
    sixteen halves about the best."""
    weights = scaled(x, w, scratch, 1)
    _nl_fit(weights, 0)
    near = refined_scale(weights)
    scale = halves(ramp(near * (_ONE - _MIDDLE_OF_16 * _LAST), near * _LAST), weights)
    cost = costs(scale, *_nl_sums(weights.work, inverses(scale), splat_f32x16(_ZERO)))
    best = lane_value(scale, first_lane(cost, smallest(cost)))
    store_codes_of(weights, _nl_store_codes, 32, inverse_of(best), weights.work + 4 * _CODES_AT)
    _nl_pack(scratch[_CODES_AT : _CODES_AT + 8].view(np.uint8), block)
    store_f16(address(block), best * weights.unit)


# MXFP4 and NVFP4

_E2M1 = LAYOUTS[ggml.MXFP4].codes.levels
_ascending = sorted(range(16), key=lambda code: _E2M1[code])
# The code of minus zero is not used: both zeros of the table have the same one.
_float_level, _float_store_codes = nearest_of(
    [_E2M1[code] for code in _ascending], [code if _E2M1[code] else 0 for code in _ascending]
)
_nvfp4_sums = sums_for(_float_level, 0, 16)
_mxfp4_pack = code_packer(LAYOUTS[ggml.MXFP4].codes.planes, 32)
_nvfp4_pack = code_packer(LAYOUTS[ggml.NVFP4].codes.planes, 64)
#: A scale of MXFP4, for levels that are twice those of E2M1, is 2 ** (byte - 128).
_BIAS = 128
#: Scales of NVFP4 for such levels, by their byte.
_E4M3 = np.array(
    [mantissa / 1024 for mantissa in range(8)]
    + [(1 + mantissa / 8) * 2.0 ** (exponent - 8) for exponent in range(1, 16) for mantissa in range(8)],
    np.float32,
)[:-1]


@inlined
def error_with(work, inverse, scale):
    """The weighted squared error of 32 weights under a scale of MXFP4."""
    errors, inverses_, scales = splat_f32x16(_ZERO), splat_f32x16(inverse), splat_f32x16(scale)
    for at in range(work, work + 128, 64):
        x = load_f32x16(at)
        off = sub(x, mul(_float_level(mul(x, inverses_)), scales))
        errors = fma(mul(load_f32x16(at + 128), off), off, errors)
    return total(errors)


@helper
def mxfp4(x, w, block, scratch):
    """32 weights with a scale that is a power of two, the best of those that make the farthest weight a multiple from 4
    to 8, 8 to 16, 16 to 32, and further on for as long as the error falls. The last level is 12: a larger scale than
    these has only levels that the first of them has, too."""
    weights = scaled(x, w, scratch, 1)
    take(weights, 0, 32)
    best, least = 2, np.float32(np.inf)
    for power in range(2, 16):
        error = error_with(weights.work, np.float32(1 << power), _ONE / np.float32(1 << power))
        if error < least:
            best, least = power, error
        elif power > 3:
            break
    codes = weights.work + 4 * _CODES_AT
    best = min(best, weights.exponent + _BIAS)
    store_codes_of(weights, _float_store_codes, 32, np.float32(1 << best), codes)
    _mxfp4_pack(scratch[_CODES_AT : _CODES_AT + 8].view(np.uint8), block)
    block[0] = weights.exponent + _BIAS - best


@inlined
def best_e4m3(weights, candidates):
    """Byte and scale of sixteen weights: the best of sixteen neighbouring scales, six of which are below the one that
    gives the farthest weight the last level."""
    low, high = extremes(weights.work, 16)
    nearest = np.searchsorted(_E4M3, max(high, -low) * weights.unit / np.float32(12))
    first = min(max(nearest - 6, 0), len(_E4M3) - 16)
    for i in range(16):
        store_f32(candidates + 4 * i, _E4M3[first + i] * weights.per_unit)
    scale = load_f32x16(candidates)
    cost = costs(scale, *_nvfp4_sums(weights.work, inverses(scale), splat_f32x16(_ZERO)))
    lane = first_lane(cost, smallest(cost))
    return first + lane, lane_value(scale, lane)


@helper
def nvfp4(x, w, block, scratch):
    """64 weights with a scale for each 16, a float of 8 bits that is not negative."""
    weights = scaled(x, w, scratch, 4)
    codes, candidates = weights.work + 4 * _CODES_AT, weights.work + 4 * _CODES_AT + 64
    for i in range(4):
        take(weights, i, 16)
        byte, scale = best_e4m3(weights, candidates)
        block[i] = byte
        store_codes_of(weights, _float_store_codes, 16, inverse_of(scale), codes + 16 * i)
    _nvfp4_pack(scratch[_CODES_AT : _CODES_AT + 16].view(np.uint8), block)


QUANTISERS = {
    ggml.IQ4_NL: Quantiser(iq4_nl, _SCRATCH),
    ggml.IQ4_XS: level_quantiser(ggml.IQ4_XS, Numbers(-32, 1, 64), _SPREAD),
    ggml.MXFP4: Quantiser(mxfp4, _SCRATCH),
    ggml.NVFP4: Quantiser(nvfp4, _SCRATCH),
}
