"""Where arrays of a backend lie: here in the host's memory, so that nothing is ever copied to get there."""

import numpy as np


def empty(shape, dtype):
    """An array whose elements are not set."""
    return np.empty(shape, dtype)


def release():
    """Give memory that no array uses back to the system, which a GPU's memory needs."""


def to_device(array, progress=None):
    """A NumPy array in the backend's memory: itself here, a copy on a GPU.

    Parameters
    ----------
    array : NumPy array
    progress : callable(done, total), optional
        Bytes that are copied.
    """
    return array


def to_host(array):
    """An array of the backend as a NumPy array: itself here, a copy on a GPU, which waits for all work."""
    return array


def write(target, array):
    """Copy a NumPy array into an array of the backend of its shape and type."""
    target[...] = array


def take(array, rows):
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
