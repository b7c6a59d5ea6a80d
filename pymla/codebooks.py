"""Codebooks of types whose codes are indices of vectors, IQ1 to IQ3: facts that the kernels of all fast backends are made
from. They come from the gguf package."""

import functools

import numpy as np


@functools.cache
def codebook(name: str) -> np.ndarray:
    """The vectors of a type.

    Parameters
    ----------
    name : str
        Of a type whose name begins with IQ1, IQ2 or IQ3, and which llama.cpp has. IQ1_M's vectors are IQ1_S's.

    Returns
    -------
    int8 array (entries, 8), or of IQ3 (entries, 4)
        Magnitudes, whose signs stand elsewhere; of IQ1 the numbers -1, 0 and 1.
    """
    from gguf import quants  # a third of a second, and not every file has such types

    source = getattr(quants, name)
    source.init_grid()
    vectors: np.ndarray = source.grid.reshape(source.grid_shape).astype(np.int8)
    return vectors
