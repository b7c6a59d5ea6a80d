"""What the kernels of the indexer's scores share: their input, the tokens and the positions of a block, and how scores
are written."""

from typing import NamedTuple

from numba import cuda, types

from pymla.cuda.attention.softmax import INFINITY, ZERO
from pymla.cuda.attention.splits import boundary
from pymla.cuda.attention.steps import seen_by, sequence_run
from pymla.cuda.attention.tiles import THREADS
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.array_types import I64
from pymla.cuda.runtime.jit import device

#: Positions of a group of neighbours, whose largest score is kept beside the scores.
GROUP_BITS = 3
GROUP = 1 << GROUP_BITS
#: Positions of which a block has the keys in shared memory at a time: one for each thread.
POSITIONS = THREADS


class Input(NamedTuple):
    """What scores are computed from."""

    q: int  # address of float32 (T, H, D)
    weights: int  # address of float32 (T, H)
    keys: int  # address of the cache's rows
    pages: int  # of the cache
    heads: int  # H
    head: int  # the first one that is computed; scores of those before are there
    most: int  # positions that are chosen: a token that sees no more has no scores
    window: int  # neighbouring tokens of a block
    splits: int  # blocks that share the positions
    scores: int  # address of float32 (T, longest)
    maxima: int  # address of float32 (T, longest // GROUP)
    longest: int  # positions that the tables have room for


INPUT = types.NamedUniTuple(I64, len(Input._fields), Input)


@device
def tokens_of_block(given, step):
    """The first of this block's tokens, neighbours of a sequence, the one behind the last, and how many positions they
    see at most. No token where the block has nothing to do."""
    begin = given.window * cuda.blockIdx.y
    start, stop = sequence_run(step.seq_of, begin, min(begin + given.window, step.positions.size), cuda.blockIdx.z)
    length = 0
    for t in range(start, stop):
        length = max(length, scored_by(given, step, t))
    return start, stop if length else start, length


@device
def scored_by(given, step, t):
    """Positions of which token t has scores: all that it sees, or none."""
    seen = seen_by(step, t)
    return seen if seen > given.most else 0


@device
def share_of_block(given, length):
    """The first of the block's portions of `POSITIONS`, and the one behind the last."""
    portions = (length + POSITIONS - 1) // POSITIONS
    shares, share = min(given.splits, portions), cuda.blockIdx.x
    if share >= shares:
        return 0, 0
    return boundary(portions, shares, share), boundary(portions, shares, share + 1)


@device
def store_score(given, t, position, seen, x):
    """Write the score of a lane's position, and the maximum of its group; lanes have neighbours."""
    i = t * given.longest + position
    if given.head:
        x += ptx.fresh_f32(given.scores + 4 * i)
    x = x if x == x and position < seen else -INFINITY
    ptx.store_f32(given.scores + 4 * i, x)
    top = ptx.group_max(x, GROUP)
    if position & GROUP - 1 == 0:
        ptx.store_f32(given.maxima + 4 * (i >> GROUP_BITS), top)


@device
def relu(x):
    """NaN stays NaN."""
    return ZERO if x < ZERO else x
