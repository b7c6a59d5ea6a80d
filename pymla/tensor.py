"""A tensor as kernels take it: the number of its type, and its blocks."""

from typing import NamedTuple

import numpy as np

from pymla import ggml


class QTensor(NamedTuple):
    """A matrix, or several of one shape, in ggml blocks. A NamedTuple, so that Numba kernels take it as it is."""

    qtype: int  # ggml type id
    data: np.ndarray  # uint8 (rows, row_bytes), or (matrices, rows, row_bytes); on a GPU a DeviceArray

    def rows(self, start: int, stop: int) -> "QTensor":
        """Some rows of a matrix, or some of several matrices, without a copy."""
        return QTensor(self.qtype, self.data[start:stop])

    def by_rows(self, count: int) -> "QTensor":
        """A matrix as several of `count` rows, without a copy."""
        return QTensor(self.qtype, self.data.reshape(-1, count, self.data.shape[1]))

    def by_columns(self, count: int) -> "QTensor":
        """A matrix as several of `count` columns, whole blocks, without a copy; of a type whose rows have no header."""
        parts = self.data.reshape(len(self.data), -1, ggml.row_bytes(self.qtype, count))
        return QTensor(self.qtype, parts.swapaxes(0, 1))
