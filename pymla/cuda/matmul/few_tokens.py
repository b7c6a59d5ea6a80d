"""Four rows and four tokens of a warp: the stores of products with a few tokens."""

from pymla.cuda.machine.ptx import lane, warp_sum
from pymla.cuda.runtime.jit import device

#: Rows, and tokens, that a warp takes at a time.
WARP_ROWS, WARP_TOKENS = 4, 4


@device
def store_few(out, t, column, left, sums):
    """A row's products with four tokens, the lanes' parts of which are `sums`, if the row is there."""
    s0, s1, s2, s3 = sums
    s0, s1, s2, s3 = warp_sum(s0), warp_sum(s1), warp_sum(s2), warp_sum(s3)
    me = lane()
    if me < WARP_TOKENS and left > 0 and t + me < len(out):
        out[t + me, column] = s0 if me == 0 else s1 if me == 1 else s2 if me == 2 else s3


@device
def store_few_rows(out, t, column, left, sums):
    """`store_few` of four rows, of which `left` are there."""
    store_few(out, t, column, left, sums[0])
    store_few(out, t, column + 1, left - 1, sums[1])
    store_few(out, t, column + 2, left - 2, sums[2])
    store_few(out, t, column + 3, left - 3, sums[3])
