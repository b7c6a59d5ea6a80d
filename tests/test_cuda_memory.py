"""The device's memory, graphs and faults, with a driver that only takes notes: neither a GPU nor the simulator."""

import importlib.util
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip('needs numba-cuda: pip install ".[test,cuda]"', allow_module_level=True)
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("the simulator has memory of its own", allow_module_level=True)

from cuda.bindings import driver as api

from pymla.cuda import graph, memory
from pymla.cuda.matmul import activations
from pymla.cuda.runtime import driver
from pymla.errors import PymlaError

SUCCESS = api.CUresult.CUDA_SUCCESS


class Driver:
    """Allocates addresses that nothing lies at, and remembers what it was asked for."""

    def __init__(self, room):
        self.room, self.allocated, self.next = room, {}, 1 << 40
        self.calls, self.device, self.host = [], {}, []

    def __getattr__(self, name):
        if not name.startswith("cu"):
            return getattr(api, name)

        def noted(*arguments):
            self.calls.append((name, *arguments))
            return SUCCESS, SimpleNamespace(name=name)

        return noted

    def cuMemAlloc(self, nbytes):
        if sum(self.allocated.values()) + nbytes > self.room:
            return api.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        self.next += 1 << 30
        self.allocated[self.next] = nbytes
        return SUCCESS, self.next

    def cuMemFree(self, address):
        del self.allocated[address]
        return (SUCCESS,)

    def cuMemGetInfo(self):
        return SUCCESS, self.room - sum(self.allocated.values()), self.room

    def cuMemHostAlloc(self, nbytes, flags):
        self.host.append(np.zeros(nbytes, np.uint8))
        return SUCCESS, self.host[-1].ctypes.data

    def cuMemcpyHtoDAsync(self, target, source, nbytes, stream):
        at = next(each for each in self.host if each.ctypes.data == source)
        self.device |= {target + i: int(byte) for i, byte in enumerate(at[:nbytes])}
        return (SUCCESS,)

    def cuMemcpyDtoDAsync(self, target, source, nbytes, stream):
        self.calls.append(("copied", target, source, nbytes))
        return (SUCCESS,)

    def cuStreamSynchronize(self, stream):
        return (SUCCESS,)

    def cuGetErrorName(self, error):
        return SUCCESS, error.name.encode()

    def cuGetErrorString(self, error):
        return SUCCESS, b"in words"

    def read(self, array):
        """The bytes of a contiguous device array."""
        return bytes(self.device[array.address + i] for i in range(array.nbytes))

    def count(self, name):
        return sum(call[0] == name for call in self.calls)


@pytest.fixture
def device(monkeypatch):
    made = Driver(room=1 << 20)
    for module in (driver, memory, graph):
        monkeypatch.setattr(module, "api", made)
    for module in (driver, memory):
        monkeypatch.setattr(module, "device", lambda: 0)
        monkeypatch.setattr(module, "stream", lambda: 1)
    monkeypatch.setattr(memory, "_pool", memory.Pool())
    monkeypatch.setattr(memory, "STAGING", 16)
    memory._stagings.cache_clear()
    yield made
    memory._stagings.cache_clear()


def test_freed_memory_serves_an_array_of_about_its_size(device):
    first = memory.empty((1000,), np.float32)
    address = first.address
    part = first[10:]
    del first
    assert memory.empty((1000,), np.float32).address != address  # a view is still there
    del part
    assert memory.empty((990,), np.float32).address == address
    assert device.allocated == {address: 4096, address + (1 << 30): 4096}

    large = memory.empty((100_000,), np.uint8)
    address = large.address
    del large
    assert memory.empty((50_000,), np.uint8).address != address
    assert memory.empty((95_000,), np.uint8).address == address


def test_a_full_device_gives_freed_memory_back_first(device):
    kept = memory.empty((500_000,), np.uint8)
    freed = memory.empty((400_000,), np.uint8)
    del freed
    assert memory.free_memory() == device.room - 500_224  # 512 divides what is allocated
    memory.empty((520_000,), np.uint8)
    with pytest.raises(
        PymlaError, match=r"no 585\.94 KiB for another array; [\d.]+ KiB of [\d.]+ .iB are free; lower `ctx`"
    ):
        memory.empty((600_000,), np.uint8)
    del kept
    memory.release()
    assert device.allocated == {}


def test_copies_from_the_host_are_read_at_once(device):
    host = np.arange(10, dtype=np.int32)
    seen = []
    first = memory.to_device(host, lambda done, total: seen.append((done, total)))
    second = memory.to_device(host[::2])
    expected = host.tobytes(), host[::2].tobytes()
    host[:] = 0
    assert (device.read(first), device.read(second)) == expected
    assert seen == [(0, 40), (16, 40), (32, 40), (40, 40)]
    memory.write(second, np.array([7, 6, 5, 4, 3], np.int32))
    assert device.read(second) == np.array([7, 6, 5, 4, 3], np.int32).tobytes()
    with pytest.raises(ValueError, match="does not fit"):
        memory.write(second, np.zeros(4, np.int32))


def test_rows_are_taken(device):
    array = memory.empty((5, 3), np.float32)
    out = memory.take(array, np.array([4, 1]))
    assert out.shape == (2, 3)
    assert device.calls == [
        ("copied", out.address, array.address + 48, 12),
        ("copied", out.address + 12, array.address + 12, 12),
    ]


def test_a_graph_is_recorded_by_the_second_replay(device):
    calls, addresses = [], []

    def step():
        calls.append(driver.recording() is not None)
        scratch = memory.empty((100,), np.float32)
        addresses.append(scratch.address)
        del scratch
        result = memory.empty((100,), np.float32)
        addresses.append(result.address)
        return result

    made = graph.Graph(step)
    made.replay()
    outside = addresses[0]
    assert calls == [False]
    result = made.replay()
    assert calls == [False, True]
    # The graph's memory is used again within it, and by nobody else.
    assert addresses[2] == addresses[3] == result.address != outside
    assert made.replay() is result
    assert len(calls) == 2
    assert (device.count("cuGraphLaunch"), device.count("cuStreamBeginCapture")) == (2, 1)
    del result
    others = [memory.empty((100,), np.float32) for _ in range(3)]
    assert addresses[2] not in [each.address for each in others]

    made = None
    assert device.count("cuGraphExecDestroy") == 1
    assert memory.empty((100,), np.float32).address == addresses[2]


def test_graphs_can_be_switched_off(device, monkeypatch):
    calls = []
    made = graph.Graph(lambda: calls.append(1))
    monkeypatch.setattr(graph.Graph, "enabled", False)
    for _ in range(3):
        made.replay()
    assert (len(calls), device.count("cuGraphLaunch")) == (3, 0)


def test_a_graph_copies_nothing_from_the_host(device):
    made = graph.Graph(lambda: memory.to_device(np.zeros(3)) if driver.recording() else None)
    made.replay()
    with pytest.raises(PymlaError, match="recorded as a graph copied from the host"):
        made.replay()
    assert driver.recording() is None


@pytest.fixture
def kernel(device, monkeypatch):
    """A kernel that counts as loaded, the first one since the host last waited."""
    monkeypatch.setattr(activations.quantise_activations, "_function", 1)
    driver._since.clear()
    yield activations.quantise_activations
    driver._since.clear()


def test_a_launch_that_is_refused_names_its_kernel(device, kernel):
    def refuse(*arguments):
        return (api.CUresult.CUDA_ERROR_INVALID_VALUE,)

    device.cuLaunchKernel = refuse
    shape = r"\(3, 1, 1\) blocks of \(128, 1, 1\) threads, 0 bytes of shared memory"
    with pytest.raises(PymlaError, match=rf"^kernel quantise_activations, {shape}: refuse: CUDA_ERROR_INVALID_VALUE"):
        kernel[3, 128](0, 0, 0, 1)


def test_kernels_that_fail_are_named_where_the_host_waits(device, kernel, monkeypatch):
    device.cuStreamSynchronize = lambda stream: (api.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)
    kernel[1, 128](0, 0, 0, 1)
    with pytest.raises(PymlaError, match=r"^kernel quantise_activations failed: CUDA_ERROR_ILLEGAL_\w+ \(in words\)$"):
        memory.to_host(memory.empty((1,), np.float32))
    # What is told once is not told again.
    with pytest.raises(PymlaError, match=r"^a copy failed"):
        driver.synchronise()
    kernel[1, 128](0, 0, 0, 1)
    driver.launched("another")
    with pytest.raises(
        PymlaError, match=r"^one of the kernels quantise_activations, another failed: .*PYMLA_CUDA_SYNC=1"
    ):
        driver.synchronise()
    monkeypatch.setattr(driver, "SYNC", True)
    with pytest.raises(PymlaError, match=r"^kernel quantise_activations failed"):
        kernel[1, 128](0, 0, 0, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_is_refused(monkeypatch):
    made = Driver(room=1 << 20)
    monkeypatch.setattr(driver, "api", made)
    monkeypatch.setattr(driver, "_started", {})
    monkeypatch.setattr(driver, "_current", threading.local())
    driver.device()
    assert made.count("cuInit") == 1
    child = os.fork()
    if child == 0:
        try:
            driver.stream()
        except PymlaError as error:
            os._exit(0 if "spawn" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    driver.stream()
    assert made.count("cuInit") == 1
