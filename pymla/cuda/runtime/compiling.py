"""From a kernel to machine code, without a device: PTX by NVVM, machine code by nvJitLink, and a cache on disk.

Machine code runs on every driver of the toolkit's major version, where PTX needs one as new as the toolkit. The cache
(`pymla.host.kernel_cache`) is keyed by all sources of this package and by kernel names, so that a kernel's name must
tell what its factory built it for.
"""

import contextlib
import functools
import json
import re
import threading
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from numba import cuda, types

from pymla.errors import PymlaError
from pymla.host.kernel_cache import KernelCache
from pymla.host.source_key import is_part_of, source_key

_SOURCES = Path(__file__).resolve().parents[1]
_lock = threading.RLock()


class Figures(NamedTuple):
    """What the compiler says about a kernel."""

    registers: int  # per thread
    shared: int  # bytes of static shared memory per block, without the driver's own
    stack: int  # bytes per thread, in slow memory: local arrays that could not become registers
    spills: int  # bytes per thread that did not fit the registers, stored and loaded
    float64: int  # instructions that compute in float64
    divisions: int  # 64-bit integer divisions, some 100 instructions each
    calls: int  # calls of functions that were not inlined


class Code(NamedTuple):
    """A compiled kernel."""

    cubin: bytes
    entry: str  # the kernel's name in it
    figures: Figures


def compile_kernel(kernel, capability):
    """Machine code of a `pymla.cuda.runtime.jit.Kernel` for a compute capability, from the cache if it is there.

    Parameters
    ----------
    capability : (int, int)

    Returns
    -------
    Code
    """
    kept, name = is_part_of(_SOURCES, kernel.py_func), entry_name(kernel, capability)
    data = CACHE.read(name) if kept else None
    if data is None:
        code = link(to_ptx(kernel, capability), capability, kernel)
        if kept:
            CACHE.write(name, _packed(code))
        return code
    return _unpacked(data)


def entry_name(kernel, capability):
    """A kernel's name in the cache."""
    return f"{kernel.__name__}.sm_{capability[0]}{capability[1]}"


def _packed(code):
    """A line of JSON, then the machine code."""
    about = {"entry": code.entry, "figures": code.figures._asdict()}
    return json.dumps(about).encode() + b"\n" + code.cubin


def _unpacked(data):
    about, _, cubin = data.partition(b"\n")
    found = json.loads(about)
    return Code(cubin, found["entry"], Figures(**found["figures"]))


def to_ptx(kernel, capability):
    """A kernel as PTX.

    Raises
    ------
    PymlaError
        Its parameters are not those that `Kernel` passes.
    """
    with _lock, _target(capability):
        ptx, _ = cuda.compile(
            kernel.py_func,
            types.void(*kernel.signature),
            device=False,
            cc=capability,
            abi="numba",
            launch_bounds=kernel.launch_bounds,
        )
    # Tables of the mathematical functions may stand before the kernel.
    head = ptx.split(".entry", 1)[1].split("{", 1)[0]
    sizes = [int(size) // 8 for size in re.findall(r"^\s*\.param \.\w(\d+) ", head, re.MULTILINE)]
    if sizes != kernel.parameter_sizes:
        raise PymlaError(
            f"kernel {kernel.__name__}: numba-cuda {metadata.version('numba-cuda')} passes arguments in another way "
            "than pymla; install another version"
        )
    return ptx


@contextlib.contextmanager
def _target(capability):
    """Device functions ask the current device what to compile for; without one, and for others, they hear this."""
    from numba.cuda import dispatcher

    class Device:
        compute_capability = capability

    previous = dispatcher.get_current_device
    dispatcher.get_current_device = Device
    try:
        yield
    finally:
        dispatcher.get_current_device = previous


def link(ptx, capability, kernel):
    """PTX as machine code, with the compiler's figures."""
    from cuda.bindings import nvjitlink

    options = [f"-arch=sm_{capability[0]}{capability[1]}", "-O3", "-verbose"]
    if kernel.max_registers:
        options.append(f"-maxrregcount={kernel.max_registers}")
    handle = nvjitlink.create(len(options), options)
    try:
        data = ptx.encode()
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), kernel.__name__)
        nvjitlink.complete(handle)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    except nvjitlink.nvJitLinkError as error:
        log = bytearray(nvjitlink.get_error_log_size(handle))
        nvjitlink.get_error_log(handle, log)
        raise PymlaError(f"kernel {kernel.__name__}: {error}: {log.decode(errors='replace').strip()}") from None
    finally:
        nvjitlink.destroy(handle)
    entry = re.search(r"\.entry (\w+)\(", ptx)[1]
    return Code(bytes(cubin), entry, _figures(ptx, log.decode(errors="replace")))


def _figures(ptx, log):
    def largest(pattern):
        return max(map(int, re.findall(pattern, log)), default=0)

    return Figures(
        registers=int(re.findall(r"[uU]sed (\d+) registers", log)[-1]),
        shared=sum(map(int, re.findall(r"^\.visible \.shared .*?\[(\d+)\]", ptx, re.MULTILINE))),
        stack=max(largest(r"(\d+) bytes stack frame"), largest(r"(\d+) stack")),
        spills=largest(r"(\d+) bytes spill stores") + largest(r"(\d+) bytes spill loads"),
        float64=len(re.findall(r"^\s*(?:@\S+ )?(?!ld|st|mov)[\w.]+\.f64", ptx, re.MULTILINE)),
        divisions=len(re.findall(r"\b(?:div|rem)\.[us]64", ptx)),
        calls=len(re.findall(r"\bcall(?:\.uni)?\b", ptx)),
    )


@functools.cache
def _key():
    from cuda.bindings import nvjitlink

    return source_key(_SOURCES, (metadata.version("numba-cuda"), nvjitlink.version()))


#: Machine code for all GPUs.
CACHE = KernelCache(lambda: f"cuda-{_key()}")
