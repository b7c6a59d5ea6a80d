"""The quantisers of llama.cpp and of ik_llama.cpp, called in their built library."""

import ctypes
from pathlib import Path

import numpy as np

from pymla import ggml


class _Settings(ctypes.Structure):
    """``ggml_init_params``: memory for tensors, of which none are made here."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class GgmlLibrary:
    """``libggml-base`` of llama.cpp, or ``libggml`` of ik_llama.cpp.

    Parameters
    ----------
    path : Path
        The shared library.
    is_ik : bool
        Whether it is that of ik_llama.cpp, whose functions take one argument more.
    """

    def __init__(self, path: Path, is_ik: bool = False):
        library = ctypes.CDLL(str(path))
        library.ggml_init.argtypes, library.ggml_init.restype = [_Settings], ctypes.c_void_p
        library.ggml_init(_Settings(1 << 20, None, True))  # fills tables that quantisers read
        library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        library.ggml_quantize_init.argtypes = [ctypes.c_int]
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        arguments = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
        library.ggml_quantize_chunk.argtypes = [*arguments, pointer] if is_ik else arguments
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._library, self._last = library, (None,) if is_ik else ()

    def needs_importance(self, qtype: int) -> bool:
        """Whether the type's quantiser ends the process where there is no importance."""
        return self._library.ggml_quantize_requires_imatrix(qtype)

    def prepare(self, qtype: int) -> None:
        """Fill the tables of a type, which takes seconds for some: otherwise the first call does."""
        self._library.ggml_quantize_init(qtype)

    def quantise(self, rows: np.ndarray, qtype: int, importance: np.ndarray | None, out: np.ndarray) -> np.ndarray:
        """Rows, float32 (n, K), as blocks, in `out`: uint8 (n, row_bytes). The interpreter's lock is free meanwhile."""
        n, columns = rows.shape
        if out.shape != (n, ggml.row_bytes(qtype, columns)) or not (rows.flags.c_contiguous and out.flags.c_contiguous):
            raise ValueError(f"{ggml.NAME[qtype]}: {out.shape} bytes do not hold {rows.shape} weights")
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32).ctypes.data
        source, target = rows.ctypes.data, out.ctypes.data
        written = self._library.ggml_quantize_chunk(qtype, source, target, 0, n, columns, weights, *self._last)
        if written != out.nbytes:
            raise ValueError(f"{ggml.NAME[qtype]}: {written} bytes written, not {out.nbytes}")
        return out
