"""The quantisers of all families of types."""

from pymla.cpu.quantise import codebooks, floats, ik_quants, iq1, iq4, k_quants, legacy, ternary
from pymla.cpu.quantise.quantiser import Quantiser

#: By the number of a type in `pymla.ggml`.
QUANTISERS: dict[int, Quantiser] = {
    **floats.QUANTISERS,
    **legacy.QUANTISERS,
    **k_quants.QUANTISERS,
    **codebooks.QUANTISERS,
    **iq1.QUANTISERS,
    **iq4.QUANTISERS,
    **ternary.QUANTISERS,
    **ik_quants.QUANTISERS,
}
