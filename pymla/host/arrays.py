"""Arrays in the host's memory: the operations of `pymla.backend.Memory` where nothing has to be copied to get there.

The backends that compute on the processor share them.
"""

from typing import Any

import numpy as np

#: Bytes that a processor's caches take from memory at a time.
CACHE_LINE = 64


def empty_aligned(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """An array whose elements are not set, and that begins at a cache line: a vector that reaches over two lines takes
    twice as long to load."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + CACHE_LINE, np.uint8)
    skip = -memory.__array_interface__["data"][0] % CACHE_LINE
    return memory[skip : skip + nbytes].view(dtype).reshape(shape)


def release() -> None:
    """Give memory that no array uses back to the system: nothing to do here, as NumPy does it."""


def to_device(array: np.ndarray, progress: Any = None) -> np.ndarray:
    """A NumPy array in the backend's memory: itself. Nothing is copied, so `progress` is not called."""
    return array


def to_host(array: np.ndarray) -> np.ndarray:
    """An array of the backend as a NumPy array: itself."""
    return array


def write(target: np.ndarray, array: np.ndarray) -> None:
    """Copy a NumPy array into an array of the backend of its shape and type."""
    target[...] = array


def copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy an array into another one of its shape and type."""
    target[...] = source


def take(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows of an array, copied.

    Parameters
    ----------
    array : array (T, ...)
    rows : NumPy array of int (n,)

    Returns
    -------
    array (n, ...)
    """
    return array[rows]
