"""How much memory there is to use, and sizes for people."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from pymla.host.cgroups import groups, lines
from pymla.host.cores import usable_cores

# Names of: the limit, the usage, the part of memory.stat that is page cache. Version 1 of cgroups counts it per group
# and, as total_*, with its children, to which the limit applies.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))

# Bytes of addresses of a thread: its stack and, of glibc's allocator, its arena.
_THREAD = 72 << 20


def size_text(nbytes: float) -> str:
    """Bytes in the largest binary unit that they fill.

    >>> size_text(3 << 19)
    '1.50 MiB'
    """
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes >= 1024**power:
            return f"{nbytes / 1024**power:.2f} {unit}"
    return f"{nbytes:.0f} B"


def available_memory(root: str | Path = "/") -> int:
    """Bytes that can be allocated without pushing anything else out of memory.

    On Linux ``MemAvailable``, and no more than any control group of this process, or its address space (``ulimit -v``),
    has left. The page cache counts as free: that of a mapped model is dropped when memory runs short. Elsewhere the
    machine's free or, where that is unknown, whole memory; ``sys.maxsize`` where neither is known.

    Parameters
    ----------
    root : where ``proc`` and ``sys`` are, for tests
    """
    root = Path(root)
    meminfo = _numbers(root / "proc/meminfo")
    if "MemAvailable:" not in meminfo:
        return _sysconf()
    return max(0, min([meminfo["MemAvailable:"] * 1024, *_left_in_groups(root), *_left_in_address_space(root)]))


def address_space() -> int:
    """Bytes of addresses that this process may have (``ulimit -v``); ``sys.maxsize`` where there is no limit."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return sys.maxsize
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def _left_in_address_space(root: Path) -> Iterator[int]:
    """Addresses for memory, besides those that threads of kernels take."""
    limit, status = address_space(), _numbers(root / "proc/self/status")
    if limit < sys.maxsize and "VmSize:" in status:
        yield limit - status["VmSize:"] * 1024 - usable_cores() * _THREAD


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes that each limited control group of this process has left."""
    for version, group in groups("memory", root):
        yield from _left(group, *(_V1 if version == 1 else _V2))


def _left(group: Path, limit: str, usage: str, cache: tuple[str, ...]) -> Iterator[int]:
    limits, usages = lines(group / limit), lines(group / usage)
    if limits and usages and limits[0] != "max":
        stat = _numbers(group / "memory.stat")
        yield int(limits[0]) - int(usages[0]) + sum(stat.get(name, 0) for name in cache)


def _numbers(path: Path) -> dict[str, int]:
    """First and second word of each line."""
    words = (line.split() for line in lines(path))
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _sysconf() -> int:
    names = getattr(os, "sysconf_names", {})
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if pages in names:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return sys.maxsize


def streaming_read() -> float:
    """Bytes per second that this machine reads from memory, all usable cores together. It bounds generation.

    Two passes over 256 MiB, which no cache holds, in about 30 ms; the better counts.
    """
    import threading
    import time

    import numpy as np

    parts = np.array_split(np.ones(32 << 20, np.int64), usable_cores())
    best = 0.0
    for _ in range(2):
        began, others, own = time.perf_counter(), [], parts[:1]
        for part in parts[1:]:
            # A bitwise sum keeps up with the memory and lets the interpreter's lock go.
            thread = threading.Thread(target=np.bitwise_or.reduce, args=(part,), daemon=True)
            try:
                thread.start()
                others.append(thread)
            except RuntimeError:  # a limit on threads: this one takes the share
                own.append(part)
        for part in own:
            np.bitwise_or.reduce(part)
        for thread in others:
            thread.join()
        best = max(best, (256 << 20) / (time.perf_counter() - began))
    return best
