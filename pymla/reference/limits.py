"""What NumPy can do at best on this machine. Twin of `pymla.cpu.limits`."""

import time
from typing import NamedTuple

import numpy as np

from pymla.host.memory import streaming_read

__all__ = ["Limits", "measure"]

#: Rows and columns of the matrices that `product_rate` multiplies, and how often; the fastest product counts.
SIZE, RUNS = 1024, 3


class Limits(NamedTuple):
    """The limits of NumPy."""

    read: float  # bytes per second, streamed from memory by all cores
    int8: float  # multiply-adds per second of float32: NumPy has no product of int8 that sums in int32


def measure() -> Limits:
    """Measure both limits, in less than a second."""
    return Limits(streaming_read(), product_rate())


def product_rate() -> float:
    """Multiply-adds per second of a float32 product of matrices."""
    x, best = np.ones((SIZE, SIZE), np.float32), float("inf")
    for _ in range(RUNS):
        began = time.perf_counter()
        np.matmul(x, x)
        best = min(best, time.perf_counter() - began)
    return SIZE**3 / best
