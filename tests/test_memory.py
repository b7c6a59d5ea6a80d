"""Available memory, by imitations of the files in which Linux says it."""

import os
import sys

import pytest

from pymla.host import memory
from pymla.host.cores import usable_cores
from pymla.host.memory import available_memory

GIB = 1 << 30
UNLIMITED = 0x7FFFFFFFFFFFF000  # what version 1 says where no limit is set


@pytest.fixture
def root(tmp_path):
    put(tmp_path, "proc/meminfo", f"MemTotal: 99 kB\nMemAvailable:   {8 * GIB // 1024} kB\nHugePages_Total:  0\n")
    return tmp_path


def put(root, name, contents):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(contents))


def group_v1(root, path, limit, usage, cache=0):
    folder = f"sys/fs/cgroup/memory/{path}"
    put(root, f"{folder}/memory.limit_in_bytes", f"{limit}\n")
    put(root, f"{folder}/memory.usage_in_bytes", f"{usage}\n")
    put(root, f"{folder}/memory.stat", f"cache 1\ntotal_inactive_file {cache}\ntotal_active_file {cache}\n")


def group_v2(root, path, limit, usage, cache=0):
    folder = f"sys/fs/cgroup/{path}"
    put(root, f"{folder}/memory.max", f"{limit}\n")
    put(root, f"{folder}/memory.current", f"{usage}\n")
    put(root, f"{folder}/memory.stat", f"anon 1\ninactive_file {cache}\nactive_file {cache}\n")


def test_no_groups(root):
    assert available_memory(root) == 8 * GIB


@pytest.mark.parametrize("limit", [UNLIMITED, 16 * GIB])
def test_group_above_the_machine(root, limit):
    put(root, "proc/self/cgroup", "4:cpu,memory:/a\n1:name=systemd:/a\n")
    group_v1(root, "a", limit, GIB)
    assert available_memory(root) == 8 * GIB


def test_version_1(root):
    put(root, "proc/self/cgroup", "5:cpu:/x\n4:memory:/a/b\n")
    group_v1(root, "a/b", 4 * GIB, 3 * GIB, cache=GIB // 2)
    assert available_memory(root) == 2 * GIB


def test_version_2(root):
    put(root, "proc/self/cgroup", "0::/a/b\n")
    group_v2(root, "a/b", 4 * GIB, 3 * GIB, cache=GIB // 2)
    assert available_memory(root) == 2 * GIB


def test_limit_of_a_parent(root):
    put(root, "proc/self/cgroup", "0::/a/b\n")
    group_v2(root, "a/b", "max", GIB)
    group_v2(root, "a", 3 * GIB, 2 * GIB)
    assert available_memory(root) == GIB


def test_path_of_the_host(root):
    put(root, "proc/self/cgroup", "4:memory:/docker/0123\n")
    group_v1(root, "", 3 * GIB, 2 * GIB)
    assert available_memory(root) == GIB


def test_nothing_left(root):
    put(root, "proc/self/cgroup", "0::/a\n")
    group_v2(root, "a", GIB, GIB + 4096)
    assert available_memory(root) == 0


def test_this_machine():
    assert 0 < available_memory() < 1 << 50


def test_elsewhere(tmp_path, monkeypatch):
    """Without /proc: free pages, all pages, or nothing known."""
    values = {"SC_AVPHYS_PAGES": 3, "SC_PHYS_PAGES": 5, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", values.get)
    assert available_memory(tmp_path) == 3 * 4096
    monkeypatch.setattr(os, "sysconf_names", {"SC_PHYS_PAGES": 1})
    assert available_memory(tmp_path) == 5 * 4096
    monkeypatch.delattr(os, "sysconf_names")
    assert available_memory(tmp_path) == sys.maxsize


def test_limited_address_space(root, monkeypatch):
    """``ulimit -v``: less than the memory, what is taken already, and what threads need of it."""
    resource = pytest.importorskip("resource")
    put(root, "proc/self/status", f"Name:\tpython\nVmSize:\t{GIB // 1024} kB\n")
    for limit, left in ((resource.RLIM_INFINITY, 8 * GIB), (1 << 50, 8 * GIB), (4 * GIB, 3 * GIB), (GIB, 0)):
        monkeypatch.setattr(resource, "getrlimit", lambda what, limit=limit: (limit, limit))
        threads = 0 if left in (0, 8 * GIB) else usable_cores() * memory._THREAD
        assert available_memory(root) == left - threads
