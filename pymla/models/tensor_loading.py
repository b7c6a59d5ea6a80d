"""From the tensors of a file to arrays in the memory of a backend."""

from collections.abc import Callable

import numpy as np

from pymla import ggml
from pymla.backend import Array, Backend, Progress
from pymla.files.gguf_reader import ModelFile, TensorInfo
from pymla.models.tensors import TensorSpec, find
from pymla.tensor import QTensor


class TotalProgress:
    """Adds up the progress of one copy after the other.

    Parameters
    ----------
    report : callable(done), optional
        Told of the bytes of all copies so far.
    """

    def __init__(self, report: Callable[[int], object] | None):
        self._before, self._report = 0, report

    def __call__(self, done: int, total: int) -> None:
        if self._report:
            self._report(self._before + done)
        if done == total:
            self._before += total


class TensorLoader:
    """The tensors of a file, checked, in the memory of a backend.

    Parameters
    ----------
    file : ModelFile
    backend : Backend
    progress : callable(done, total)
        Told of the bytes of each tensor that is copied.
    """

    def __init__(self, file: ModelFile, backend: Backend, progress: Progress):
        self.file, self._backend, self._progress = file, backend, progress

    def to(self, backend: Backend) -> "TensorLoader":
        """A loader of the same file for another backend."""
        return TensorLoader(self.file, backend, self._progress)

    def find(self, spec: TensorSpec) -> TensorInfo:
        """A tensor in the file, which is about to be read.

        Raises
        ------
        PymlaError
            The file has changed since it was opened, or the tensor cannot be run (`pymla.models.tensors.find`).
        """
        self.file.check_unchanged()
        return find(self.file, spec)

    def mapped(self, spec: TensorSpec) -> QTensor:
        """A matrix in the mapped file; where its rows are interleaved, a copy with plain rows."""
        info = self.find(spec)
        rows = info.data.reshape(*info.shape[:-1], ggml.row_bytes(info.qtype, info.shape[-1]))
        if info.qtype in ggml.PLAIN:
            from pymla.models.interleaved import plain_rows  # Numba, which few files need so early

            self.file.fetch_ahead(info, [(0, info.data.nbytes)])
            rows = plain_rows(rows.reshape(-1, rows.shape[-1]), info.qtype).reshape(*info.shape[:-1], -1)
            rows.flags.writeable = False
        return QTensor(ggml.plain_type(info.qtype), rows)

    def put(self, w: QTensor) -> QTensor:
        """A matrix in the backend's memory."""
        return QTensor(w.qtype, self._to_device(w.data))

    def matrix(self, spec: TensorSpec) -> QTensor:
        """A matrix of the file in the backend's memory."""
        return self.put(self.mapped(spec))

    def vector(self, spec: TensorSpec, divisor: float = 1.0) -> Array:
        """A norm or a bias in the backend's memory, float32; divided by a number."""
        values = self.numbers(spec)
        return self._to_device(values if divisor == 1.0 else values / np.float32(divisor))

    def numbers(self, spec: TensorSpec) -> np.ndarray:
        """A float32 vector in the mapped file."""
        return self.find(spec).data.view(np.float32)

    def _to_device(self, array: np.ndarray) -> Array:
        return self._backend.memory.to_device(array, self._progress)
