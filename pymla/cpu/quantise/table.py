"""The quantisers of all families of types."""

from pymla.cpu.quantise import codebooks, floats, iq1, k_quants, legacy
from pymla.cpu.quantise.quantiser import Quantiser

#: By the number of a type in `pymla.ggml`.
QUANTISERS: dict[int, Quantiser] = {
    **floats.QUANTISERS,
    **legacy.QUANTISERS,
    **k_quants.QUANTISERS,
    **codebooks.QUANTISERS,
    **iq1.QUANTISERS,
}
