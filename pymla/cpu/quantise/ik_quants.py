"""Types of ik_llama.cpp whose codes are a table's levels, all of which a small block may move up: IQ2_K to IQ6_K, with
scales for 16 weights and a half for 256; IQ2_KS to IQ5_KS, with scales for 32 weights and a half or a float for a row.
"""

from pymla import ggml
from pymla.cpu.quantise.level_search import Numbers, Spread, level_quantiser

_SIX_BITS, _FIVE_BITS, _ODD_BYTES = Numbers(-32, 1, 64), Numbers(-16, 1, 32), Numbers(-127, 2, 128)
#: The more levels there are, the less the farthest weight is clipped.
_OF_2_BITS, _OF_3_BITS, _OF_4_BITS = Spread(0.6, 0.1), Spread(0.65, 0.09), Spread(0.7, 0.075)
_OF_5_BITS, _OF_6_BITS = Spread(0.75, 0.06), Spread(0.8, 0.05)

QUANTISERS = {
    ggml.IQ2_K: level_quantiser(ggml.IQ2_K, Numbers(-8, 1, 16), _OF_2_BITS),
    ggml.IQ3_K: level_quantiser(ggml.IQ3_K, Numbers(-31, 2, 32), _OF_3_BITS),
    ggml.IQ4_K: level_quantiser(ggml.IQ4_K, _SIX_BITS, _OF_4_BITS),
    ggml.IQ5_K: level_quantiser(ggml.IQ5_K, _SIX_BITS, _OF_5_BITS),
    ggml.IQ6_K: level_quantiser(ggml.IQ6_K, Numbers(-128, 1, 256), _OF_6_BITS),
    ggml.IQ2_KS: level_quantiser(ggml.IQ2_KS, _FIVE_BITS, _OF_2_BITS),
    ggml.IQ3_KS: level_quantiser(ggml.IQ3_KS, _FIVE_BITS, _OF_3_BITS),
    ggml.IQ4_KS: level_quantiser(ggml.IQ4_KS, _ODD_BYTES, _OF_4_BITS),
    ggml.IQ5_KS: level_quantiser(ggml.IQ5_KS, _ODD_BYTES, _OF_5_BITS),
}
