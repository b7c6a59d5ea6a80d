"""Writing a GGUF file in other types, as a plan says (`pymla.make.quantize_plan`)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pymla import ggml
from pymla.cpu.checkpoint_types import from_bf16
from pymla.cpu.quantise import quantise_kernels
from pymla.cpu.runtime.compiling import compile_all
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile, TensorInfo
from pymla.make.importance import Importance
from pymla.make.quantize_metadata import architecture, new_metadata
from pymla.make.quantize_plan import Plan
from pymla.make.writing import Progress, Resume, Source, write_model
from pymla.reference.quant import dequantise

#: Weights of a tensor that are made float32 at a time.
PIECE_WEIGHTS = 2 << 20


def compile_kernels(
    qtypes: Iterable[int], progress: Callable[[int, int, str], object], warn: Callable[[str], object]
) -> None:
    """Have the quantisers of some types ready; other arguments as for `pymla.backend.Backend.compile_for`."""
    compile_all([each.compiled for qtype in sorted(set(qtypes)) for each in quantise_kernels(qtype)], progress, warn)


def write(
    plan: Plan,
    path: Path,
    *,
    keep_split: bool = False,
    inputs: Sequence[Path] = (),
    note: Callable[[str], object] = lambda text: None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the file of a plan. It appears under its name when it is complete.

    Parameters
    ----------
    keep_split : write as many files as there are, with the same tensors in each; `path` is then the name without
        numbers
    inputs : files that the plan was made of beside the model: an interrupted run goes on only where they are the same
    note : told, in one line each, what becomes of an interrupted run
    progress : called with (bytes written, bytes in all, the tensor that is being written)

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
    parts = Counter(tensor.path for tensor in file.tensors.values())
    return write_model(
        path,
        architecture(file),
        new_metadata(file, plan.file_type, plan.importance),
        [Source(each.name, each.shape, partial(_float_rows, file, each)) for each in file.tensors.values()],
        {row.name: row.qtype for row in plan.rows},
        importance=plan.importance,
        copies={row.name: partial(file.read, file.tensors[row.name]) for row in plan.rows if row.qtype == row.source},
        split=[parts[part] for part in file.parts] if keep_split else None,
        resume=Resume([*file.parts, *inputs], note),
        progress=progress,
    )


def _float_rows(file: ModelFile, tensor: TensorInfo) -> Iterator[np.ndarray]:
    """The rows of a tensor as float32 (r, columns), in order."""
    width, together = ggml.row_bytes(tensor.qtype, tensor.shape[-1]), ggml.ROWS_TOGETHER[tensor.qtype]
    step = max(1, PIECE_WEIGHTS // (tensor.shape[-1] * together)) * together
    for data in file.read(tensor):
        blocks = data.reshape(-1, width)
        for start in range(0, len(blocks), step):
            piece = np.ascontiguousarray(blocks[start : start + step])
            # Most models are published in BF16.
            yield from_bf16(piece.view(np.uint16)) if tensor.qtype == ggml.BF16 else dequantise(piece, tensor.qtype)


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
