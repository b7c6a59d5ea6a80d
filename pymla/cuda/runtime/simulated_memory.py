"""Memory in the simulator: ranges of the host's memory that addresses may lie in, and arrays as kernels see them.

Fresh memory holds bytes of 255 (NaN, −1), and an address must lie in an array of the device or of the block's shared
memory.
"""

import bisect
import ctypes
import struct
import weakref

import numpy as np


class Array(np.ndarray):
    """An array inside a kernel: integers leave it as Python's, which hold as much as Numba's int64, and are wrapped to
    the array's type when they enter it. A negative index is refused: no kernel counts from the end."""

    def __getitem__(self, index):
        _refuse_negative(index)
        value = super().__getitem__(index)
        return int(value) if isinstance(value, np.integer) else value

    def __setitem__(self, index, value):
        _refuse_negative(index)
        if isinstance(value, int) and self.dtype.kind in "iu":
            value = np.array(value & ((1 << 64) - 1), np.uint64).astype(self.dtype)
        super().__setitem__(index, value)


def _refuse_negative(index):
    for each in index if isinstance(index, tuple) else (index,):
        if isinstance(each, (int, np.integer)) and each < 0:
            raise IndexError(f"index {each} of an array in a kernel")


def inside(array):
    """An array as kernels see it."""
    return array.view(Array)


class Memory:
    """Ranges of host memory that addresses may lie in."""

    def __init__(self, name):
        self._name, self._starts, self._bytes = name, [], {}

    def add(self, start, nbytes):
        """Memory that the caller keeps until `remove`."""
        if nbytes:
            bisect.insort(self._starts, start)
            self._bytes[start] = (ctypes.c_uint8 * nbytes).from_address(start)

    def remove(self, start):
        """The range that begins at an address."""
        if self._bytes.pop(start, None) is not None:
            del self._starts[bisect.bisect_left(self._starts, start)]

    def find(self, address, size, alignment=None):
        """The memory around an address and the position in it.

        Raises
        ------
        IndexError
            The `size` bytes do not lie in one array, or the address is no multiple of `alignment`, by default `size`.
        """
        address = int(address)
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0:
            start = self._starts[at]
            if address + size <= start + len(self._bytes[start]):
                if address % (alignment or size):
                    raise IndexError(f"{self._name} address of {size} bytes is not aligned: byte {address - start}")
                return self._bytes[start], address - start
            near = f"byte {address - start} of an array of {len(self._bytes[start])}"
        else:
            near = "before every array"
        raise IndexError(f"access of {size} bytes outside {self._name} memory: {near}")

    def around(self, address, size):
        """The `size` bytes at a multiple of it, some of which lie in an array; poison for the others.

        Memory of the device is allocated in multiples of 512 bytes, so that aligned bytes around an array can be read.
        """
        at = bisect.bisect_right(self._starts, address + size - 1) - 1
        start = self._starts[at] if at >= 0 else 0
        memory = self._bytes.get(start, b"")
        if address % size or address >= start + len(memory):
            self.find(address, size)  # says what is wrong
        before = max(start - address, 0)
        return (b"\xff" * before + bytes(memory[address + before - start : address + size - start])).ljust(
            size, b"\xff"
        )

    def read(self, form, address):
        """Values of a `struct` format at an address."""
        memory, at = self.find(address, struct.calcsize(form))
        return struct.unpack_from(form, memory, at)

    def write(self, form, address, *values):
        """Write values in a `struct` format."""
        memory, at = self.find(address, struct.calcsize(form))
        struct.pack_into(form, memory, at, *values)


#: Arrays of `pymla.cuda.memory`.
GLOBAL = Memory("device")


def buffer(nbytes, alignment=256, memory=GLOBAL):
    """Poisoned bytes, aligned to `alignment` and to nothing above it, so that a wrong assumption shows."""
    room = np.full(nbytes + 2 * alignment, 255, np.uint8)
    skip = (alignment - room.ctypes.data) % (2 * alignment)
    start = room.ctypes.data + skip
    memory.add(start, nbytes)
    weakref.finalize(room, memory.remove, start)
    return room[skip : skip + nbytes]
