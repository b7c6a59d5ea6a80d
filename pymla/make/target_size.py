"""The best types for a file of a given size.

Of every matrix a sample of rows is quantised to every candidate type, and the *relative error* taken: the squared error
of what the matrix gives, as a share of what it gives. For inputs x whose mean squares are w (the importance matrix) and
which are not correlated, a row W that became Q has an output W x with the mean square Σ w[j] W[j]², and an error of
Σ w[j] (W[j] - Q[j])². Both are summed over the sampled rows; experts count as often as the text of the importance
matrix chose them.

The relative error makes matrices comparable, because that is what the next step of a layer sees: norms, and weights of
attention and of experts, keep shares and not magnitudes. Relative errors of matrices one behind the other add up. A
layer adds its result to the residual stream, of which it makes up about one part in as many as there are layers, while
the output matrix makes all of the logits: its relative error counts as often as there are layers, that of every other
matrix once. So small matrices get more bits than large ones, as a byte brings more there.

`pymla.make.knapsack` finds the types with the least sum of errors within the size.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT

from pymla import ggml
from pymla.cpu.quantise import quantise
from pymla.errors import PymlaError
from pymla.files import gguf_writer
from pymla.files.gguf_reader import TensorInfo
from pymla.host.memory import size_text
from pymla.make.fallbacks import fitting_type
from pymla.make.importance import Importance
from pymla.make.knapsack import Option, solve
from pymla.make.mixes import Choice, bits
from pymla.make.recipe import NEED_IMPORTANCE, OUTER
from pymla.reference.quant import dequantise

#: Types that are tried, of llama.cpp, so that all programs load the file; others where rows do not fit.
CANDIDATES = (
    *(ggml.IQ1_S, ggml.IQ1_M, ggml.IQ2_XXS, ggml.IQ2_XS, ggml.IQ2_S, ggml.Q2_K, ggml.IQ3_XXS, ggml.IQ3_S, ggml.Q3_K),
    *(ggml.IQ4_XS, ggml.IQ4_NL, ggml.Q4_0, ggml.Q4_K, ggml.Q5_0, ggml.Q5_1, ggml.Q5_K, ggml.Q6_K, ggml.Q8_0),
)

#: Weights of a tensor that are quantised to every candidate.
SAMPLE_WEIGHTS = 1 << 18
#: Matrices of a tensor, such as experts, that the sample has rows of.
SAMPLE_MATRICES = 16


class Measured(NamedTuple):
    """A tensor, and what it costs to give it a type."""

    name: str
    options: dict[int, Option]  # by ggml type


class Found(NamedTuple):
    """The types that were found."""

    choices: dict[str, Choice]
    nbytes: int  # of the tensors that were chosen for, as they lie in a file
    cost: float  # sum of relative errors
    least_cost: float  # no choice within the size has less


def measure(
    tensors: Sequence[TensorInfo],
    layers: int,
    output: str,
    importance: Importance | None = None,
    candidates: Sequence[int] = CANDIDATES,
    prepare: Callable[[set[int]], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[Measured]:
    """What each candidate type costs each tensor.

    Parameters
    ----------
    tensors : of a file, whose types are to be found
    layers : ``block_count``
    output : name of the tensor that makes the logits
    candidates : ggml types; a type that does not fit is taken as the one that it falls back to, and those that need an
        importance matrix are left out where there is none for a tensor
    prepare : called with the types that will be tried, before the first is
    progress : called with (tensors done, tensors in all)

    Raises
    ------
    PymlaError
        A weight is NaN or infinite, or the importance matrix is that of another model.
    """
    columns = [importance.columns(each.name, each.shape) if importance else None for each in tensors]
    types = [_types(each, of is not None, candidates) for each, of in zip(tensors, columns, strict=True)]
    if prepare is not None:
        prepare(set().union(*types))
    found = []
    for done, tensor in enumerate(tensors):
        if progress is not None:
            progress(done, len(tensors))
        sample = _Sample(tensor, columns[done], _uses(importance, tensor))
        weight = max(1, layers) if tensor.name == output else 1
        options = {
            qtype: Option(_bytes_in_file(qtype, tensor.shape), weight * sample.relative_error(qtype))
            for qtype in types[done]
        }
        if tensor.qtype in ggml.FLOATS:
            options[tensor.qtype] = Option(_bytes_in_file(tensor.qtype, tensor.shape), 0.0)
        found.append(Measured(tensor.name, options))
    if progress is not None:
        progress(len(tensors), len(tensors))
    return found


def choose(measured: Sequence[Measured], limit: int) -> Found:
    """The types with the least sum of errors.

    Parameters
    ----------
    limit : bytes of all these tensors as they lie in a file

    Raises
    ------
    PymlaError
        Even the smallest types take more.
    """
    solution = solve([list(each.options.values()) for each in measured], limit)
    if solution is None:
        least = sum(min(option.nbytes for option in each.options.values()) for each in measured)
        raise PymlaError(
            f"`target_size`: the smallest types take {size_text(least)}, and {size_text(max(0, limit))} are left for "
            "them; give more, or an importance matrix, with which smaller types can be made"
        )
    choices = {}
    for each, at in zip(measured, solution.chosen, strict=True):
        qtype, option = list(each.options.items())[at]
        choices[each.name] = Choice(qtype, f"target size, error {option.cost:.2g}")
    return Found(choices, solution.nbytes, solution.cost, solution.least_cost)


def recipe_text(choices: Mapping[str, Choice], title: str) -> str:
    """Choices as a recipe file (`pymla.make.recipe.read_rules`). Layers whose tensors of one kind have one type share a
    line."""
    lines: dict[tuple[bool, str, int], list[str]] = {}
    for name, choice in choices.items():
        layer = re.match(r"blk\.(\d+)\.", name, re.ASCII)
        stem = name[layer.end() :] if layer else name
        lines.setdefault((layer is not None, stem, choice.qtype), []).append(layer[1] if layer else "")
    rules = []
    for (in_layers, stem, qtype), layers in lines.items():
        prefix = rf"blk\.({'|'.join(layers)})\." if in_layers else ""
        # A "#" begins a comment.
        rules.append(f"^{prefix}{re.escape(stem)}$ = {ggml.NAME[qtype]}".replace(r"\#", r"\x23"))
    return "\n".join([f"# {title}", *rules]) + "\n"


def _types(tensor: TensorInfo, has_importance: bool, candidates: Sequence[int]) -> list[int]:
    """The candidates for a tensor, each once, from few bits to many."""
    fitting = {fitting_type(qtype, tensor.shape) for qtype in candidates}
    if not has_importance and tensor.name not in OUTER:
        fitting -= set(NEED_IMPORTANCE)
    return sorted(fitting, key=bits)


def _bytes_in_file(qtype: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor, up to where the next one begins."""
    return gguf_writer.padded(ggml.tensor_bytes(qtype, shape), GGUF_DEFAULT_ALIGNMENT)


def _uses(importance: Importance | None, tensor: TensorInfo) -> np.ndarray:
    """How often each matrix of a tensor was used: float64 (matrices,). One that never was counts as used once."""
    matrices = math.prod(tensor.shape[:-2])
    entry = importance.entries.get(tensor.name) if importance else None
    if entry is None or entry.counts.size != matrices:
        return np.ones(matrices)
    return np.maximum(entry.counts, 1).astype(np.float64)


class _Sample:
    """Rows of a tensor, of some of its matrices, with the importance of their columns and the uses of their matrix."""

    def __init__(self, tensor: TensorInfo, importance: np.ndarray | None, uses: np.ndarray):
        matrices, (rows, columns) = len(uses), tensor.shape[-2:]
        wanted, together = max(1, SAMPLE_WEIGHTS // columns), ggml.ROWS_TOGETHER[tensor.qtype]
        of_matrices = _spread(matrices, min(SAMPLE_MATRICES, wanted))
        of_rows = _spread(rows // together, max(1, wanted // (len(of_matrices) * together)))
        data = tensor.data.reshape(matrices, rows // together, -1)
        self._pieces = []
        for matrix in of_matrices.tolist():
            taken = np.ascontiguousarray(data[matrix, of_rows]).reshape(len(of_rows) * together, -1)
            weights = np.ones(columns, np.float32) if importance is None else importance[matrix]
            self._pieces.append((dequantise(taken, tensor.qtype), weights, float(uses[matrix])))
        if not all(np.isfinite(piece[0]).all() for piece in self._pieces):
            raise PymlaError(f"{tensor.path}: {tensor.name} holds weights that are NaN or infinite")

    def relative_error(self, qtype: int) -> float:
        """The squared error of what the rows give in a type, as a share of what they give; 0 where that is nothing."""
        error = signal = 0.0
        for rows, weights, uses in self._pieces:
            blocks = quantise(rows, qtype, weights)
            error += uses * _energy(rows - dequantise(blocks, qtype), weights)
            signal += uses * _energy(rows, weights)
        return error / signal if signal > 0 else 0.0


def _energy(rows: np.ndarray, weights: np.ndarray) -> float:
    """``Σ weights[j] * rows[i, j]²`` in float64."""
    return float((np.square(rows, dtype=np.float64) @ weights.astype(np.float64)).sum())


def _spread(count: int, wanted: int) -> np.ndarray:
    """Up to `wanted` of `count` numbers, evenly spread: int64 (n,)."""
    wanted = min(count, wanted)
    return (2 * np.arange(wanted) + 1) * count // (2 * wanted)
