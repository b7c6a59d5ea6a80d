"""Arrays in the device's memory, as the host sees them: shapes, strides and addresses, but no elements."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Types of the indices of a device array.
_INDICES = slice, int, np.integer, type(None), type(Ellipsis)


class DeviceArray:
    """An array in the device's memory, or a view of one.

    It has NumPy's `shape`, `strides` (bytes), `dtype`, `ndim`, `size`, `nbytes` and `len`. Indices are integers,
    slices, None and Ellipsis; the result is always a view. `pymla.cuda.memory` makes it.

    Attributes
    ----------
    address : int
        Of the first element.
    """

    __slots__ = ("_view", "address")

    def __init__(self, view: np.ndarray, address: int | None = None) -> None:
        # A NumPy array at the device's addresses: NumPy computes shapes, strides and addresses of views, and keeps the
        # memory alive. Its elements are never touched.
        self._view = view
        self.address = view.__array_interface__["data"][0] if address is None else address

    @property
    def shape(self) -> tuple[int, ...]:
        return self._view.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self._view.strides

    @property
    def dtype(self) -> np.dtype:
        return self._view.dtype

    @property
    def ndim(self) -> int:
        return self._view.ndim

    @property
    def size(self) -> int:
        return self._view.size

    @property
    def nbytes(self) -> int:
        return self._view.nbytes

    @property
    def contiguous(self) -> bool:
        """Whether elements follow each other in C's order."""
        return self._view.flags.c_contiguous

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, index: Any) -> DeviceArray:
        index = index if isinstance(index, tuple) else (index,)
        for each in index:
            if not isinstance(each, _INDICES):
                raise TypeError(f"device arrays have no index of type {type(each).__name__}")
        # With an ellipsis NumPy makes a view even of a single element, where it would read the value otherwise.
        return DeviceArray(self._view[index if Ellipsis in index else (*index, Ellipsis)])

    def reshape(self, *shape: Any) -> DeviceArray:
        """The same elements in another shape; of a contiguous array."""
        if not self.contiguous:
            raise ValueError(f"a device array of strides {self.strides} cannot be reshaped")
        return DeviceArray(self._view.reshape(*shape))

    def swapaxes(self, first: int, second: int) -> DeviceArray:
        """The same elements with two dimensions in each other's place."""
        return DeviceArray(self._view.swapaxes(first, second))

    def view(self, dtype: Any) -> DeviceArray:
        """The same bytes as another type."""
        return DeviceArray(self._view.view(dtype))

    def __array__(self, *arguments: Any, **options: Any) -> np.ndarray:
        raise TypeError("NumPy cannot read a device array; use pymla.cuda.memory.to_host")

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, strides={self.strides})"
