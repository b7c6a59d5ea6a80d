"""The online softmax (Milakov and Gimelshein, 2018) of scores to base 2, in float32."""

import numpy as np

from pymla.cuda.machine import ptx
from pymla.cuda.runtime.jit import device

ZERO = np.float32(0)

INFINITY = np.float32(np.inf)


def online_softmax(pack):
    """A device function (scores, seen, state, lane): a step of the online softmax of 16 rows, for a tile.

    With ``g = lane >> 2``: `seen` are the numbers of positions of the tile that rows g and g + 8 see, `state` their
    maxima and this lane's shares of their sums. Returns the weights of 32 positions as two left factors of a tensor
    core, the factors that shrink the values accumulated so far, and the new state. Scores are to base 2.
    """

    @device
    def row_maximum(scores, first, column, seen, largest):
        """Scores of a row, −inf behind the first `seen`, and the maximum over the tile and `largest`."""
        a, b, c, d = scores
        a0, a1 = _masked(a[first], column, seen), _masked(a[first + 1], column + 1, seen)
        b0, b1 = _masked(b[first], column + 8, seen), _masked(b[first + 1], column + 9, seen)
        c0, c1 = _masked(c[first], column + 16, seen), _masked(c[first + 1], column + 17, seen)
        d0, d1 = _masked(d[first], column + 24, seen), _masked(d[first + 1], column + 25, seen)
        tile = ptx.fmax(ptx.fmax(ptx.fmax(a0, a1), ptx.fmax(b0, b1)), ptx.fmax(ptx.fmax(c0, c1), ptx.fmax(d0, d1)))
        return (a0, a1, b0, b1, c0, c1, d0, d1), ptx.group_max(ptx.fmax(tile, largest), 4)

    @device
    def row_weights(scores, largest):
        """The weights, packed by twos, and their sum."""
        a0, a1, b0, b1, c0, c1, d0, d1 = scores
        a0, a1, b0, b1 = _power(a0, largest), _power(a1, largest), _power(b0, largest), _power(b1, largest)
        c0, c1, d0, d1 = _power(c0, largest), _power(c1, largest), _power(d0, largest), _power(d1, largest)
        total = ((a0 + a1) + (b0 + b1)) + ((c0 + c1) + (d0 + d1))
        return (pack(a0, a1), pack(b0, b1), pack(c0, c1), pack(d0, d1)), total

    @device
    def softmax(scores, seen, state, lane):
        m0, m1, l0, l1 = state
        column = 2 * (lane & 3)
        upper, n0 = row_maximum(scores, 0, column, seen[0], m0)
        lower, n1 = row_maximum(scores, 2, column, seen[1], m1)
        (p0, p2, p4, p6), t0 = row_weights(upper, n0)
        (p1, p3, p5, p7), t1 = row_weights(lower, n1)
        f0, f1 = ptx.exp2(m0 - n0), ptx.exp2(m1 - n1)
        return (p0, p1, p2, p3, p4, p5, p6, p7), (f0, f1), (n0, n1, l0 * f0 + t0, l1 * f1 + t1)

    return softmax


@device
def _masked(score, column, seen):
    return score if column < seen else -INFINITY


@device
def _power(score, largest):
    return ptx.exp2(score - largest)
