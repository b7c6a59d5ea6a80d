"""The quantisers of all families of types."""

from pymla.cpu.quantise import floats, k_quants, legacy
from pymla.cpu.quantise.quantiser import Quantiser

#: By the number of a type in `pymla.ggml`.
QUANTISERS: dict[int, Quantiser] = {
    **floats.QUANTISERS,
    **legacy.QUANTISERS,
    **k_quants.QUANTISERS,
}
