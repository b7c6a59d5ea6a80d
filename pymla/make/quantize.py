"""Writing a GGUF file in other types, as a plan says (`pymla.make.quantize_plan`)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile, TensorInfo
from pymla.make.importance import Importance
from pymla.make.quantize_metadata import architecture, new_metadata
from pymla.make.quantize_plan import Plan
from pymla.make.writing import Source, write_model
from pymla.reference.quant import dequantise

#: Weights of a tensor that are made float32 at a time.
PIECE_WEIGHTS = 2 << 20


def write(
    plan: Plan,
    path: Path,
    *,
    keep_split: bool = False,
    progress: Callable[[int, int, str], object] | None = None,
) -> list[Path]:
    """Write the file of a plan. It appears under its name when it is complete.

    Parameters
    ----------
    keep_split : write as many files as there are, with the same tensors in each; `path` is the name without numbers
    progress : called with (bytes written, bytes in all, tensor)

    Returns
    -------
    list of Path
        All files that were written.

    Raises
    ------
    PymlaError
        The plan has refusals, a weight is NaN or infinite, or a file cannot be read or written.
    """
    if plan.refusals:
        raise PymlaError(plan.refusals[0])
    file = plan.file
    sources = [Source(each.name, each.shape, _float_rows(file, each)) for each in file.tensors.values()]
    types = {row.name: row.qtype for row in plan.rows}
    metadata = new_metadata(file, plan.file_type, plan.importance)
    return write_model(path, architecture(file), metadata, sources, types, importance=plan.importance)


def selected(importance: Importance, include: Sequence[str], exclude: Sequence[str]) -> Importance:
    """An importance matrix for some tensors only: those whose name has a text of `include` in it, if there is any, and
    none of `exclude`."""
    return _Selected(importance, include, exclude) if include or exclude else importance


class _Selected(Importance):
    """An importance matrix for some tensors only."""

    def __init__(self, whole: Importance, include: Sequence[str], exclude: Sequence[str]):
        self._include, self._exclude = include, exclude
        entries = {name: entry for name, entry in whole.entries.items() if self._has(name)}
        super().__init__(entries, whole.datasets, whole.chunk_size, whole.source)

    def columns(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        return super().columns(name, shape) if self._has(name) else None

    def _has(self, name: str) -> bool:
        if self._include and not any(text in name for text in self._include):
            return False
        return not any(text in name for text in self._exclude)


def _float_rows(file: ModelFile, tensor: TensorInfo) -> Callable[[], Iterator[np.ndarray]]:
    """Makes the rows of a tensor as float32 (r, columns), in order, each piece of one matrix."""

    def rows() -> Iterator[np.ndarray]:
        in_matrix, columns = tensor.shape[-2:]
        together = ggml.ROWS_TOGETHER[tensor.qtype]
        step = max(1, PIECE_WEIGHTS // (columns * together)) * together
        done = 0
        for data in file.read(tensor):
            blocks = data.reshape(-1, ggml.row_bytes(tensor.qtype, columns))
            while len(blocks):
                count = min(step, in_matrix - done % in_matrix, len(blocks))
                yield dequantise(blocks[:count], tensor.qtype)
                done, blocks = done + count, blocks[count:]

    return rows
