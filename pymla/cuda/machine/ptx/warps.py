"""Operations that the 32 lanes of a warp do together: shuffles, sums, votes. All lanes must come to such a function."""

import operator

import numpy as np
from numba.cuda import types

from pymla.cuda.machine.ptx.instruction import (
    F32,
    I32,
    LLVM,
    WARP,
    float32,
    inline_ptx,
    instruction,
    intrinsic_like,
    word_of,
)
from pymla.cuda.runtime.driver import SIMULATED
from pymla.cuda.runtime.jit import device

if SIMULATED:
    from pymla.cuda.runtime import simulator


@instruction(I32, asm="mov.u32 $0, %laneid;")
def lane():
    """The thread's number in its warp, 0 to 31."""
    return simulator.running().lane


def _shuffle(form):
    """The typer of a ``shfl``, for float32 and for integers, of which it moves 32 bits."""

    def typer(typingctx, x, other):
        kind = F32 if x == F32 else I32
        if kind == I32 and not isinstance(x, (types.Integer, types.Boolean)):
            raise TypeError(f"lanes exchange float32 and integers, not {x}")
        write = inline_ptx(kind, (kind, I32), f"shfl.sync.{form}.b32 $0, $1, $2, 0x1f, 0xffffffff;", "lanes")
        return kind(kind, I32), lambda context, builder, signature, values: write(builder, values)

    return typer


def _value(x):
    """The 32 bits that a shuffle moves."""
    return word_of(x) if isinstance(x, (int, bool, np.bool_)) else float32(x)


def shfl_xor(x, mask):
    """The value of lane ``lane() ^ mask``: float32, or an integer of 32 bits."""
    me = simulator.running().lane
    return simulator.meet("shfl_xor", (_value(x), me ^ mask), lambda lanes: [lanes[source][0] for _, source in lanes])


def shfl_idx(x, source):
    """The value of lane ``source & 31``: float32, or an integer of 32 bits."""
    return simulator.meet("shfl_idx", (_value(x), source & 31), lambda lanes: [lanes[other][0] for _, other in lanes])


if not SIMULATED:
    shfl_xor = intrinsic_like(shfl_xor, _shuffle("bfly"))
    shfl_idx = intrinsic_like(shfl_idx, _shuffle("idx"))


@device
def group_sum(x, width):
    """The sum over the neighbouring `width` lanes, a power of two, for all of them. Integers wrap at 32 bits."""
    while width > 1:
        width >>= 1
        x = x + shfl_xor(x, width)
    return x


@device
def group_max(x, width):
    """The maximum over the neighbouring `width` lanes, a power of two, for all of them."""
    while width > 1:
        width >>= 1
        x = max(x, shfl_xor(x, width))
    return x


if SIMULATED:
    # Lanes meet once, where shuffles let them meet up to five times: half of the time that a simulated kernel takes.
    sum_by_shuffles, max_by_shuffles = group_sum, group_max

    def _reduction(operate):
        """The combination of lanes that gives what shuffles give."""

        def combine(lanes):
            values, width = [value for value, _ in lanes], lanes[0][1]
            while width > 1:
                width >>= 1
                values = [_value(operate(values[i], values[i ^ width])) for i in range(WARP)]
            return values

        return combine

    _summed, _largest = _reduction(operator.add), _reduction(max)

    def group_sum(x, width):
        return simulator.meet("group_sum", (_value(x), width), _summed)

    def group_max(x, width):
        return simulator.meet("group_max", (_value(x), width), _largest)


@device
def warp_sum(x):
    """The sum over the warp, for all lanes. Integers wrap at 32 bits."""
    return group_sum(x, 32)


@device
def warp_max(x):
    """The maximum over the warp, for all lanes."""
    return group_max(x, 32)


@instruction(
    I32,
    types.boolean,
    emit=lambda builder, values: inline_ptx(
        I32, (I32,), "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }", "lanes"
    )(builder, [builder.zext(values[0], LLVM[I32])]),
)
def ballot(condition):
    """A word with bit i set where the condition holds for lane i."""
    return simulator.meet(
        "ballot", bool(condition), lambda lanes: [word_of(sum(bit << i for i, bit in enumerate(lanes)))] * WARP
    )


@instruction(types.void, asm="bar.warp.sync 0xffffffff;", effects="memory")
def syncwarp():
    """Wait for the warp; afterwards every lane can read the writes that the others made before."""
    simulator.meet("syncwarp", None, lambda lanes: lanes)
