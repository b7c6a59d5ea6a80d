"""The scores of the lightning indexer: ``Σ_h weights[t, h] * max(0, q[t, h] · keys[s])`` for the positions that a token
sees, and their maxima over groups of neighbours.

Keys of 16 bits and fewer are multiplied on tensor cores (`pymla.cuda.attention.index_tensor_cores`), those of float32
in float32 (`pymla.cuda.attention.index_float32`). Nothing is computed for a token that sees no more positions than are
chosen. The grid depends on the shapes of arrays alone.
"""

from typing import NamedTuple

from pymla import ggml
from pymla.cuda.attention.index_float32 import float32_kernel
from pymla.cuda.attention.index_input import POSITIONS, Input
from pymla.cuda.attention.index_tensor_cores import tensor_core_kernel
from pymla.cuda.attention.tiles import THREADS, WARPS
from pymla.cuda.runtime.driver import multiprocessors
from pymla.cuda.runtime.jit import Kernel
from pymla.errors import PymlaError
from pymla.pages import PAGE

__all__ = ["index_scores", "plan_of"]

#: Heads of a warp, and words of a lane's fragments of their queries, at most.
WARP_HEADS, QUERY_WORDS = 32, 64
#: Numbers of a key for which two portions of keys fit shared memory.
LARGEST_KEY = 256


class Plan(NamedTuple):
    """A kernel and how it is launched."""

    kernel: Kernel
    heads: int  # that it takes at a time
    window: int  # tokens of a prompt that a block takes
    shared_bytes: int


def index_scores(q, weights, keys, step, most, scores, maxima):
    """Scores of tokens that see more than `most` positions.

    Parameters
    ----------
    q, weights, keys
        As for `pymla.cuda.attention.indexer.choose`.
    step : StepArrays
    most : int
    scores : float32 DeviceArray (T, 64 * pages)
        Out: a score that is not a number is −inf, and so is that of a position which a token does not see, up to the
        next multiple of `GROUP`. What is behind is not written.
    maxima : float32 DeviceArray (T, 64 * pages // GROUP)
        Out: the largest score of each group.
    """
    tokens, heads, width = q.shape
    sequences, plan = len(step.tables), plan_of(keys.qtype, width, heads)
    window = 1 if tokens <= sequences else plan.window
    windows, runs = -(-tokens // window), min(window, sequences)
    splits = max(1, min(-(-step.longest // POSITIONS), 2 * multiprocessors() // max(1, windows * runs)))
    inputs = q.address, weights.address, keys.data.address, len(keys.data) // PAGE
    outputs = scores.address, maxima.address, step.longest
    for head in range(0, heads, plan.heads):
        given = Input(*inputs, heads, head, most, window, splits, *outputs)
        plan.kernel[(splits, windows, runs), THREADS, plan.shared_bytes](given, step)


def plan_of(qtype, width, heads):
    """The `Plan` for keys of a cache type and `width` numbers, and so many heads."""
    if qtype == ggml.F32:
        return Plan(float32_kernel(width), heads, WARPS, 0)
    if width > LARGEST_KEY:
        raise PymlaError(f"keys of an indexer have at most {LARGEST_KEY} numbers on the CUDA backend, not {width}")
    tiles = min(-(-heads // 16), WARP_HEADS // 16, QUERY_WORDS // (width // 4))
    parts = next((parts for parts in (1, 2) if heads <= 16 * tiles * parts), WARPS)
    launched, shared_bytes = tensor_core_kernel(qtype, width, tiles, parts)
    return Plan(launched, 16 * tiles * parts, WARPS // parts, shared_bytes)
