"""The lightning indexer of sparse attention: which positions a token attends to. Twin of
`pymla.reference.attention.indexer`.

Scores of all positions that a token sees go to memory (`pymla.cuda.attention.index_scores`), for as many tokens at a
time as `pymla.scratch.CHOICE_SCRATCH` has room for; then a block for each token chooses the largest
(`pymla.cuda.attention.top_positions`). A token that sees no more positions than are chosen gets no scores.
"""

import numpy as np

from pymla.cuda import memory
from pymla.cuda.attention.index_input import GROUP
from pymla.cuda.attention.index_scores import index_scores, plan_of
from pymla.cuda.attention.steps import StepArrays
from pymla.cuda.attention.tiles import WARPS
from pymla.cuda.attention.top_positions import THREADS, choose_positions
from pymla.cuda.contract import check, need_pages
from pymla.errors import PymlaError
from pymla.pages import HADAMARD_TYPES, block_rows
from pymla.scratch import CHOICE_SCRATCH

__all__ = ["choose", "choosing_kernels", "index_cache"]


def index_cache(qtype, width, slots):
    """Memory for the indexer's keys of a layer, as rows of `width` numbers of F32, F16, BF16 or Q8_0."""
    (keys,) = block_rows(memory, [(qtype, width)], slots)
    return keys


def choose(q, weights, keys, step, out):
    """The positions of the k largest scores of each token: `q` float32 (T, H, D), `weights` float32 (T, H), `keys` of
    `index_cache`, `out` int32 (T, k), all contiguous.

    An index of the step that is out of range counts as the last one in range.
    """
    check.choose(q, weights, keys, step, out)
    need_pages("choose", step, keys)
    if keys.qtype in HADAMARD_TYPES:
        raise PymlaError(
            "choose: keys are mixed rows, which only a latent cache has; F32, F16, BF16 or Q8_0 is expected"
        )
    tokens, most, longest = len(q), out.shape[1], StepArrays.of(step).longest
    if longest <= most:
        longest = 0  # every token attends to all positions that it sees
    for_groups = most if longest else 0
    bytes_of_token = 4 * (longest + longest // GROUP + for_groups)
    at_once = max(WARPS, CHOICE_SCRATCH // max(1, bytes_of_token) // WARPS * WARPS)
    for start in range(0, tokens, at_once):
        part = slice(start, min(start + at_once, tokens))
        arrays, count = StepArrays.of(step.part(part.start, part.stop)), part.stop - part.start
        scores, maxima = memory.empty((count, longest), np.float32), memory.empty((count, longest // GROUP), np.float32)
        groups = memory.empty((count, for_groups), np.int32)
        if longest:
            index_scores(q[part], weights[part], keys, arrays, most, scores, maxima)
        values = scores.address, maxima.address
        choose_positions[count, THREADS](values, longest, arrays, groups, out[part])
    return out


def choosing_kernels(qtype, width, heads):
    """The kernels of `choose` for keys of a type and `width` numbers, and so many heads."""
    return [plan_of(qtype, width, heads).kernel, choose_positions]
