"""Codebooks of types whose codes are indices of vectors: facts that the kernels of all fast backends are made from.

Those of llama.cpp, IQ1 to IQ3, come from the gguf package.
"""

import functools

import numpy as np

from pymla.planes import IQ3_LEVELS


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


_PLACES = "02 05 10 13 15 17 21 22 24 25 26 30 34 35 37 42 43 44 45 46 51 52 53 54 55 60 62 64 66 67 72 75"
#: Two neighbouring weights of ik_llama.cpp's IQ2_KL, by their code.
PAIRS = tuple((IQ3_LEVELS[int(pair[0])], IQ3_LEVELS[int(pair[1])]) for pair in _PLACES.split())
