"""Cores that a process may use, by imitations of the files in which Linux tells its quotas."""

import os

import pytest
from test_memory import put

from pymla.cpu.runtime import compiling_workers
from pymla.host import memory
from pymla.host.cores import usable_cores


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    return tmp_path


def quota_v1(root, path, quota, period=100_000):
    put(root, f"sys/fs/cgroup/cpu/{path}/cpu.cfs_quota_us", f"{quota}\n")
    put(root, f"sys/fs/cgroup/cpu/{path}/cpu.cfs_period_us", f"{period}\n")


def quota_v2(root, path, text):
    put(root, f"sys/fs/cgroup/{path}/cpu.max", f"{text}\n")


def test_no_groups(root):
    assert usable_cores(root) == 16


@pytest.mark.parametrize(
    ("quota", "cores"),
    [(-1, 16), (0, 16), (1_000, 1), (50_000, 1), (100_000, 1), (100_001, 2), (250_000, 3), (9**9, 16)],
)
@pytest.mark.parametrize("version", [1, 2])
def test_quotas(root, version, quota, cores):
    """Fractions of a core are rounded up; a quota above the affinity changes nothing."""
    if version == 1:
        put(root, "proc/self/cgroup", "4:cpu,cpuacct:/a\n1:name=systemd:/b\n")
        quota_v1(root, "a", quota)
    else:
        put(root, "proc/self/cgroup", "0::/a\n")
        quota_v2(root, "a", f"{'max' if quota < 0 else quota} 100000")
    assert usable_cores(root) == cores


def test_quota_of_a_parent(root):
    put(root, "proc/self/cgroup", "0::/a/b/c\n")
    quota_v2(root, "a/b/c", "max 100000")
    quota_v2(root, "a/b", "300000 50000")
    quota_v2(root, "a", "40000 10000")
    assert usable_cores(root) == 4


@pytest.mark.parametrize("path", ["/docker/0123", "/../../docker/0123", "/"])
def test_path_of_the_host(root, path):
    """In a container the group's path may not be visible; the mount is the group then."""
    put(root, "proc/self/cgroup", f"5:cpu,cpuacct:{path}\n")
    quota_v1(root, "", 150_000)
    assert usable_cores(root) == 2
    put(root, "proc/self/cgroup", f"0::{path}\n")
    quota_v2(root, "", "450000 100000")
    assert usable_cores(root) == 5


@pytest.mark.parametrize("text", ["", "max", "word 100000", "100000 0", "-5 100000", "100000"])
def test_files_that_say_nothing(root, text):
    put(root, "proc/self/cgroup", f"0::/a\nnonsense\n:\n{text}\n")
    quota_v2(root, "a", text)
    assert usable_cores(root) == 16


def test_cores_of_the_affinity(root, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    put(root, "proc/self/cgroup", "0::/a\n")
    quota_v2(root, "a", "800000 100000")
    assert usable_cores(root) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(root) == 1


def test_one_number_for_all():
    assert memory.usable_cores is compiling_workers.usable_cores is usable_cores
    assert usable_cores() >= 1
