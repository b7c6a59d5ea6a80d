"""Copies from global to shared memory that go on while the thread computes (``cp.async``), and waiting for them."""

from numba.cuda import types

from pymla.cuda.machine.ptx.instruction import I32, I64, inline_ptx, instruction, intrinsic_like
from pymla.cuda.machine.ptx.shared_memory import write_shared
from pymla.cuda.runtime.driver import SIMULATED

if SIMULATED:
    from pymla.cuda.runtime import simulated_memory, simulator


@instruction(types.void, I32, I64, I32, asm="cp.async.cg.shared.global [$0], [$1], 16, $2;", effects="memory")
def cp_async_16(shared, address, nbytes):
    """Begin to copy 16 bytes from global to shared memory: `nbytes` of them, 0 to 16, and zeros behind. With 0 the
    address is not read, but must be aligned. All 16 may reach beyond an array, whose memory is a multiple of 16 bytes.
    In the simulator the target is poisoned until the copy is waited for, and bytes outside the array stay poisoned."""
    _begin_copy(16, shared, address, nbytes)


@instruction(types.void, I32, I64, I32, asm="cp.async.ca.shared.global [$0], [$1], 4, $2;", effects="memory")
def cp_async_4(shared, address, nbytes):
    """`cp_async_16` of 4 bytes."""
    _begin_copy(4, shared, address, nbytes)


def _begin_copy(size, shared, address, nbytes):
    if not 0 <= nbytes <= size:
        raise ValueError(f"cp_async_{size} of {nbytes} bytes")
    if address % size:
        raise IndexError(f"cp_async_{size} from address {address}, which {size} does not divide")
    write_shared(f"{size}s", shared, b"\xff" * size)
    simulator.running().copies.append((size, shared, address, nbytes))


@instruction(types.void, asm="cp.async.commit_group;", effects="memory")
def cp_async_commit():
    """Make a group of the copies that this thread began since the last call; the group may be empty."""
    thread = simulator.running()
    thread.groups.append(thread.copies)
    thread.copies = []


def _cp_async_wait_typer(typingctx, groups):
    if not isinstance(groups, types.IntegerLiteral):
        return None  # Numba then tries again with the literal, if it is one
    write = inline_ptx(types.void, (), f"cp.async.wait_group {groups.literal_value};", "memory")

    def codegen(context, builder, signature, values):
        write(builder, ())
        return context.get_dummy_value()

    return types.void(groups), codegen


def cp_async_wait(groups):
    """Wait until at most so many of this thread's latest groups, a literal, are under way. Other threads' copies are
    there behind `cuda.syncthreads`."""
    thread = simulator.running()
    while len(thread.groups) > groups:
        for size, shared, address, nbytes in thread.groups.pop(0):
            data = simulated_memory.GLOBAL.around(address, size)[:nbytes] if nbytes else b""
            write_shared(f"{size}s", shared, data.ljust(size, b"\0"))


if not SIMULATED:
    cp_async_wait = intrinsic_like(cp_async_wait, _cp_async_wait_typer)
