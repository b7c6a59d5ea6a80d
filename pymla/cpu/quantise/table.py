"""The quantisers of all families of types."""

from pymla.cpu.quantise import floats, ik_quants, iq4, k_quants, legacy, ternary
from pymla.cpu.quantise.quantiser import Quantiser

#: By the number of a type in `pymla.ggml`.
QUANTISERS: dict[int, Quantiser] = {
    **floats.QUANTISERS,
    **legacy.QUANTISERS,
    **k_quants.QUANTISERS,
    **iq4.QUANTISERS,
    **ternary.QUANTISERS,
    **ik_quants.QUANTISERS,
}
