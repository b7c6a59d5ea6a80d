"""What files of importance matrices hold, whichever of the two formats they have."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pymla.errors import PymlaError
from pymla.printable import shown

#: The largest count and number of chunks: the .dat format has int32. A float32 count is exact up to 16,777,216.
MOST = 2**31 - 1
#: The largest size of a chunk, in tokens.
LONGEST_CHUNK = 2**24


class Entry(NamedTuple):
    """The inputs that a tensor's matrices read: for every column the sum of their squares.

    A tensor of routed experts has a row and a count for each expert. Any other tensor has one row and one count; those
    of `attn_k_b` and `attn_v_b`, a matrix for each head, have the columns of all heads in that row.
    """

    sums: np.ndarray  # float32 or float64 (n, columns), finite, at least 0
    counts: np.ndarray  # int64 (n,), at least 0


class ImatrixData(NamedTuple):
    """The contents of a file."""

    entries: dict[str, Entry]  # by the tensor's name in a model file
    datasets: tuple[str, ...]  # names of the texts that the model read
    chunks: int  # how many pieces of text it read
    chunk_size: int  # tokens of a piece; 0: counts are in pieces, and their size is unknown (the .dat format)


def checked(path: Path, name: str, sums: np.ndarray, counts: np.ndarray) -> Entry:
    """An entry of a file with the sums and counts of a tensor.

    Parameters
    ----------
    sums : float array (n * columns,)
    counts : int64 array (n,), from 0 to `MOST`

    Raises
    ------
    PymlaError
        The counts do not divide the sums, or a sum is none that a sum of squares can be.
    """
    if not counts.size or sums.size % counts.size:
        raise PymlaError(
            f"{path}: {shown(name)} has {sums.size} sums and {counts.size} counts, which do not divide them"
        )
    good = np.isfinite(sums) & (sums >= 0)
    if not good.all():
        at = int(np.flatnonzero(~good)[0])
        raise PymlaError(f"{path}: sum {at} of {shown(name)} is {sums[at]:g}; finite numbers from 0 on are expected")
    return Entry(sums.reshape(counts.size, -1), counts)
