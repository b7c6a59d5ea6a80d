"""The CUDA driver: the device's context, the stream of all work, and errors in words.

All work runs on one stream of the first device (``CUDA_VISIBLE_DEVICES`` chooses). Errors of kernels come late: they
are raised where the host waits for the device, with the names of the kernels that ran since it last did.
``PYMLA_CUDA_SYNC=1`` waits for every kernel, so that the name is certain. The simulator never waits.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cuda.bindings import driver as api
from numba.cuda import config

from pymla.errors import PymlaError

if TYPE_CHECKING:
    from pymla.cuda.graph import Graph

#: Whether kernels run in Python (`pymla.cuda.runtime.simulator`), as ``NUMBA_ENABLE_CUDASIM=1`` says.
SIMULATED = bool(config.ENABLE_CUDASIM)
#: Wait for every kernel.
SYNC = os.environ.get("PYMLA_CUDA_SYNC", "0") not in ("", "0")

_current = threading.local()
_started: dict[str, Any] = {}
_lock = threading.Lock()
_since: deque[str] = deque(maxlen=64)  # names of kernels that ran since the host last waited


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the driver; returns its results without the error code.

    Raises
    ------
    PymlaError
    """
    try:
        error, *values = function(*arguments)
    except RuntimeError:  # the bindings find no library
        raise PymlaError("there is no NVIDIA driver on this machine") from None
    if error != api.CUresult.CUDA_SUCCESS:
        raise PymlaError(f"{function.__name__}: {describe(error)}")
    return values[0] if len(values) == 1 else tuple(values) or None


def describe(error: Any) -> str:
    """An error code in words."""
    code, name = api.cuGetErrorName(error)
    _, text = api.cuGetErrorString(error)
    known = code == api.CUresult.CUDA_SUCCESS
    return f"{name.decode()} ({text.decode()})" if known else f"CUDA error {int(error)}"


def device() -> Any:
    """The device's number for the driver, with its context made the calling thread's."""
    if not hasattr(_current, "device"):
        with _lock:
            if not _started:
                call(api.cuInit, 0)
                number = call(api.cuDeviceGet, 0)
                context = call(api.cuDevicePrimaryCtxRetain, number)
                call(api.cuCtxSetCurrent, context)
                stream = call(api.cuStreamCreate, api.CUstream_flags.CU_STREAM_NON_BLOCKING)
                _started.update(device=number, context=context, stream=stream, process=os.getpid())
        if _started["process"] != os.getpid():
            raise PymlaError(
                "a forked process cannot use the GPU that its parent uses; start it with multiprocessing's spawn, and "
                "load the model there"
            )
        call(api.cuCtxSetCurrent, _started["context"])
        _current.device = _started["device"]
    return _current.device


def _forget_device() -> None:
    """A forked child has none of its parent's connection to the device."""
    global _lock
    _lock = threading.Lock()
    vars(_current).clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_device)


def stream() -> Any:
    """The stream that all work runs on."""
    device()
    return _started["stream"]


def compute_capability() -> tuple[int, int]:
    """Of the device: (major, minor)."""
    names = api.CUdevice_attribute
    major = call(api.cuDeviceGetAttribute, names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device())
    minor = call(api.cuDeviceGetAttribute, names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device())
    return major, minor


def multiprocessors() -> int:
    """Streaming multiprocessors of the device; in the simulator 2."""
    if SIMULATED:
        return 2
    return call(api.cuDeviceGetAttribute, api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device())


def launched(name: str) -> None:
    """Take note of a kernel that was launched, and wait for it if `SYNC` says so."""
    _since.append(name)
    if SYNC:
        synchronise()


def recording() -> Graph | None:
    """The `Graph` that the calling thread records, or None."""
    return getattr(_current, "graph", None)


def record(graph: Graph | None) -> None:
    """Say which `Graph` the calling thread records."""
    _current.graph = graph


def synchronise() -> None:
    """Wait until the device has done all work.

    Raises
    ------
    PymlaError
        One of the kernels since the last call failed.
    """
    if SIMULATED:
        return
    refuse_while_recording("waited for the device")
    (error,) = api.cuStreamSynchronize(stream())
    names = list(dict.fromkeys(_since))
    _since.clear()
    if error == api.CUresult.CUDA_SUCCESS:
        return
    if len(names) < 2:
        what = f"kernel {names[0]}" if names else "a copy"
        raise PymlaError(f"{what} failed: {describe(error)}")
    hint = "; PYMLA_CUDA_SYNC=1 tells which one"
    raise PymlaError(f"one of the kernels {', '.join(names)} failed: {describe(error)}{hint}")


def refuse_while_recording(what: str) -> None:
    """Raise where the calling thread records a graph, of which this cannot be a part: "copied to the host"."""
    if recording():
        raise PymlaError(f"a function that is recorded as a graph {what}")
