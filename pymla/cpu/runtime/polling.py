"""What threads do with posted operations, as machine code: take ranges of items, poll for others, and sleep.

All threads share a block of 64-bit words, the state, each in a cache line of its own as threads poll them; and a table
of operations, a cache line each. Words are read and written atomically.
"""

import ctypes
import sys

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pymla.cpu.runtime.compiling import function, helper

#: Times that a thread polls a barrier before it offers its core to others, some microseconds: if another program has
#: the other thread's core, waiting longer takes from both.
SPINS = 50
#: Such offers before an idle thread goes to sleep, some milliseconds.
YIELDS = 5000

#: Bytes of a cache line, and so of an operation and of a word of the state.
LINE = 64
#: Words of an operation: kernel, address of arguments, items, items of a range (or minus those of the smallest one),
#: and the first item that nobody has taken yet.
OPERATION_WORDS = 8
_KERNEL, _ARGUMENTS, _ITEMS, _GRAIN, _NEXT = range(0, 40, 8)
#: Words of the state, in bytes: operations posted so far; their table and number; threads; threads that have reached
#: the barrier, and the number of the barrier; whether no thread may fall asleep; whether threads shall end; from
#: `AWAKE` on, whether each thread is awake.
_TICKET, _OPERATIONS, _COUNT, THREADS, _ARRIVED, _PHASE, BUSY, STOP, AWAKE = (LINE * i for i in range(9))

_WORD = ir.IntType(64)


@intrinsic
def _get(typingctx, address):
    """The word at an address, as all threads see it."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], _WORD.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _set(typingctx, address, value):
    """Write a word for all threads."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], builder.inttoptr(args[0], _WORD.as_pointer()), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _add(typingctx, address, value):
    """Add to a word that others add to as well; returns what it was."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _WORD.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _replace(typingctx, address, old, new):
    """Write a word where it is still what it was; returns whether it was."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _WORD.as_pointer())
        result = builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx):
    """Tell the processor that the thread polls."""

    def codegen(context, builder, signature, args):
        if llvm.get_process_triple().startswith(("x86_64", "i686", "amd64")):
            name = "llvm.x86.sse2.pause"
            module = builder.module
            pause = module.globals.get(name) or ir.Function(module, ir.FunctionType(ir.VoidType(), []), name)
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.void(), codegen


if sys.platform == "win32":
    _yield_address = ctypes.cast(ctypes.windll.kernel32.SwitchToThread, ctypes.c_void_p).value
else:
    _yield_address = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
llvm.add_symbol("pymla_sched_yield", _yield_address)


@intrinsic
def _offer(typingctx):
    """Let another program have the core."""

    def codegen(context, builder, signature, args):
        module, name = builder.module, "pymla_sched_yield"
        function = module.globals.get(name) or ir.Function(module, ir.FunctionType(ir.IntType(32), []), name)
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call(typingctx, function, arguments, first, last):
    """Call a kernel at an address."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_WORD] * 3)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@helper
def _wait(spins):
    """Pause between two polls; returns how many pauses there have been."""
    if spins < SPINS:
        _pause()
    else:
        _offer()
    return spins + 1


@helper
def _range(grain, left, threads):
    """Items that a thread takes when `left` are left."""
    return grain if grain > 0 else max(-grain, 7 * left // (8 * threads))


@helper
def _run(state, operations, count):
    """A thread's part of all operations: ranges of each until none is left, then a barrier."""
    threads = _get(state + THREADS)
    for i in range(count):
        operation = operations + LINE * i
        items = _get(operation + _ITEMS)
        first = _get(operation + _NEXT)
        while first < items:
            end = min(first + _range(_get(operation + _GRAIN), items - first, threads), items)
            if _replace(operation + _NEXT, first, end):
                _call(_get(operation + _KERNEL), _get(operation + _ARGUMENTS), first, end)
            first = _get(operation + _NEXT)
        phase = _get(state + _PHASE)
        if _add(state + _ARRIVED, 1) == threads - 1:
            _set(state + _ARRIVED, 0)
            _set(operation + _NEXT, 0)
            _set(state + _PHASE, phase + 1)
        else:
            spins = 0
            while _get(state + _PHASE) == phase:
                spins = _wait(spins)


@function(types.void(types.int64, types.int64))
def run_alone(operations, count):
    """All operations, on one thread."""
    for i in range(count):
        operation = operations + LINE * i
        _call(_get(operation + _KERNEL), _get(operation + _ARGUMENTS), 0, _get(operation + _ITEMS))


@function(types.int64(types.int64))
def keep_awake(state):
    """Let no thread fall asleep. Returns a bit for each thread that sleeps already."""
    _set(state + BUSY, 1)
    sleeping = 0
    for thread in range(1, _get(state + THREADS)):
        if _get(state + AWAKE + LINE * thread) == 0:
            sleeping |= 1 << thread
    return sleeping


@function(types.void(types.int64, types.int64, types.int64))
def post_and_run(state, operations, count):
    """Run operations on all threads."""
    _set(state + _OPERATIONS, operations)
    _set(state + _COUNT, count)
    _add(state + _TICKET, 1)
    _run(state, operations, count)


@function(types.int64(types.int64, types.int64, types.int64))
def serve(state, thread, ticket):
    """Run operations that are posted after `ticket`, until none have come for a while. Returns the last ticket."""
    awake = state + AWAKE + LINE * thread
    _set(awake, 1)
    spins = 0
    while _get(state + STOP) == 0:
        if _get(state + _TICKET) != ticket:
            ticket += 1
            _run(state, _get(state + _OPERATIONS), _get(state + _COUNT))
            spins = 0
        elif spins < SPINS + YIELDS:
            spins = _wait(spins)
        else:
            # Either this thread sees that there is work, or the thread that posts it sees that this one sleeps.
            _set(awake, 0)
            if _get(state + BUSY) == 0:
                return ticket
            _set(awake, 1)
            spins = SPINS
    return ticket


#: The functions that Python calls here, for `needed`.
FUNCTIONS = [run_alone, keep_awake, post_and_run, serve]
