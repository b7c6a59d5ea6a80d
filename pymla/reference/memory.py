"""Where arrays of this backend lie: in the host's memory."""

from typing import Any

import numpy as np

from pymla.host.arrays import copy, release, take, to_device, to_host, write

__all__ = ["copy", "empty", "release", "take", "to_device", "to_host", "write"]


def empty(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array whose elements are not set."""
    return np.empty(shape, dtype)
