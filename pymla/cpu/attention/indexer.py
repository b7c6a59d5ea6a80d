"""The lightning indexer of sparse attention: which positions a token attends to.

Scores of all positions that a token sees are int32 in memory, in the order of float32
(`pymla.cpu.attention.index_scores`); then the largest are taken (`pymla.cpu.attention.largest`).
"""

from __future__ import annotations

import numpy as np

from pymla import ggml
from pymla.cpu.attention import index_scores, index_scores_int8
from pymla.cpu.attention.index_scores import Scores
from pymla.cpu.attention.largest import take_largest
from pymla.cpu.cache_types import I8_PAGES, ROW_BYTES
from pymla.cpu.contract import check
from pymla.cpu.memory import empty
from pymla.cpu.runtime.jit import Kernel
from pymla.pages import PAGE, Step
from pymla.tensor import QTensor

#: Bytes of the scores that are in memory at a time, or those of one token.
_SCORE_BYTES = 16 << 20


def index_cache(qtype: int, width: int, slots: int) -> QTensor:
    """Memory for the indexer's keys of one layer, as `pymla.reference.attention.index_cache`.

    Keys of Q8_0 get `I8_PAGES`.
    """
    nbytes = ROW_BYTES[I8_PAGES](width) if qtype == ggml.Q8_0 else ggml.row_bytes(qtype, width)
    return QTensor(I8_PAGES if qtype == ggml.Q8_0 else qtype, empty((slots, nbytes), np.uint8))


def choose(q: np.ndarray, weights: np.ndarray, keys: QTensor, step: Step, out: np.ndarray) -> np.ndarray:
    """The positions that each token attends to, int32 (T, k); `q` float32 (T, H, D), `weights` float32 (T, H).

    As `pymla.reference.attention.choose`. Over keys of float types scores are float32; over those of 8 bits queries are
    rounded to 8 bits as well, so that scores change by less than 1 % of their spread.
    """
    check.choose(q, weights, keys, step, out)
    token_bytes = 4 * PAGE * step.block_tables.shape[1]
    at_once = max(1, _SCORE_BYTES // max(1, token_bytes))
    for begin in range(0, len(q), at_once):
        some = slice(begin, begin + at_once)
        _choose(q[some], weights[some], keys, step.part(begin, begin + at_once), out[some])
    return out


def _choose(q: np.ndarray, weights: np.ndarray, keys: QTensor, step: Step, out: np.ndarray) -> None:
    """`choose` for tokens whose scores are in memory at the same time."""
    scores = Scores.empty(len(q), step.block_tables.shape[1], out.shape[1])
    form = index_scores_int8 if keys.qtype == I8_PAGES else index_scores
    form.score(q, weights, keys, step, scores)
    take_largest[len(q), 1](scores.ordered, step.positions, out)


def kernels(keys: int) -> list[Kernel]:
    """The kernels of `choose` over keys of a type."""
    found = index_scores_int8.kernels() if keys == I8_PAGES else index_scores.kernels(keys)
    return [*found, take_largest]
