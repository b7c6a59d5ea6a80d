"""How many processor cores this process may use."""

import os
from collections.abc import Iterator
from pathlib import Path

from pymla.host.cgroups import groups, lines


def usable_cores(root: str | Path = "/") -> int:
    """Cores that this process may run on, and no more than the CPU quotas of its control groups pay for.

    A quota of two and a half cores (``docker run --cpus 2.5``) counts as three; one below a core as one.

    Parameters
    ----------
    root : where ``proc`` and ``sys`` are, for tests
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_quotas(Path(root))]))


def _quotas(root: Path) -> Iterator[int]:
    """Cores, rounded up, that each control group with a quota gives its processes."""
    for version, group in groups("cpu", root):
        if version == 2:
            words = " ".join(lines(group / "cpu.max")).split()
        else:
            words = [*lines(group / "cpu.cfs_quota_us"), *lines(group / "cpu.cfs_period_us")]
        # Without a quota, version 2 says "max" and version 1 says -1.
        if len(words) == 2 and all(word.isdecimal() and int(word) > 0 for word in words):
            quota, period = map(int, words)
            yield -(-quota // period)
