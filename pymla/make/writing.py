"""Tensors on their way into a GGUF file."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """A tensor of the file, before it has a type."""

    name: str
    shape: tuple[int, ...]  # NumPy order, columns last
    #: Its rows in order, float32 (rows, columns), a few at a time, each piece within one matrix of the last two
    #: dimensions.
    rows: Callable[[], Iterator[np.ndarray]]
