"""Quantisation: float weights as rows of blocks, with the smallest error that a search over scales and codes finds.

`quantise` takes weights and the importance of their columns; a family of types is a module with functions of one block
(`Quantiser`), which `table.py` collects. `search.py` has the searches that families share. Kernels are made for a type
when it is first used: they serve the making of files, and no model needs them.

>>> import numpy as np
>>> from pymla import ggml
>>> from pymla.cpu.quantise import quantise
>>> from pymla.reference.quant import dequantise
>>> x = np.random.default_rng(0).standard_normal((2, 64), np.float32)
>>> np.round(np.abs(x - dequantise(quantise(x, ggml.Q8_0), ggml.Q8_0)).max(), 2)
np.float32(0.01)
"""

from pymla.cpu.quantise.frame import quantise, quantise_kernels
from pymla.cpu.quantise.quantiser import Quantiser
from pymla.cpu.quantise.table import QUANTISERS

__all__ = ["QUANTISERS", "Quantiser", "quantise", "quantise_kernels"]
