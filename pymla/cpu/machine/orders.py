"""Orders of a token's activations: where the codes of a block of 32 lie, so that they meet the codes of weights as a
file has them.

A block of activations is written as two runs of eight codes, and two more runs `apart` bytes behind these.
"""

from pymla.cpu.runtime.compiling import helper
from pymla.cpu.runtime.isa import LANES

#: For panels: the order of the columns; that of the tiles of AMX, block after block, and in a block token after token.
#: For rows: four blocks of weights in a register, or eight.
COLUMNS, TILES, FOURS, EIGHTS = range(4)
#: The run of eight columns of a block of 32 that the r-th register of `EIGHTS` has, of every block.
RUNS = 0, 2, 1, 3


def columns_of(order, r):
    """The columns whose codes are in the r-th register of an order. Other orders than `COLUMNS` are those of registers
    of 64 bytes."""
    if order == EIGHTS:
        return [32 * (i // 8) + 8 * RUNS[r] + i % 8 for i in range(64)]
    if order == FOURS:
        return [32 * (i // 16) + 16 * r + i % 16 for i in range(64)]
    return [4 * LANES * r + i for i in range(4 * LANES)]


@helper
def place(order, block, blocks):
    """Where the activations of a block are written: their first eight codes, and the bytes from there to the next eight
    and to the last sixteen. Blocks at the end of a row that make no whole four keep the order of the columns."""
    if order <= TILES or block >= blocks // 4 * 4:
        return 32 * block, 8, 16
    if order == EIGHTS and block < blocks // 8 * 8:
        return block // 8 * 256 + block % 8 * 8, 128, 64
    low, apart = _place_in_fours(block, blocks // 4 * 4)
    return low, 8, apart


if LANES == 16:

    @helper
    def _place_in_fours(block, blocks):
        """The first sixteen codes of four blocks lie side by side, then their last sixteen codes."""
        return block // 4 * 128 + block % 4 * 16, 64

else:

    @helper
    def _place_in_fours(block, blocks):
        """The first sixteen codes of blocks i and i + 4 of eight lie side by side, then their last sixteen codes. Four
        blocks behind the last eight keep the order of the columns."""
        if block >= blocks // 8 * 8:
            return 32 * block, 16
        return block // 8 * 256 + block % 4 * 64 + block // 4 % 2 * 16, 32
