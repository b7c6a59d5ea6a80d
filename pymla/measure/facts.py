"""Facts that belong to every measurement: the machine, its limits, versions and the date."""

import datetime
import importlib
import platform
from pathlib import Path
from typing import Any

from pymla import __version__, checks, cuda
from pymla.backend import Rates


def measure_limits(device: str = "cpu", threads: int | None = None) -> Rates:
    """Measure the limits of the GPU for "cuda", else of the processor with so many threads.

    Parameters
    ----------
    device : "cpu", "cuda" or "reference"
    threads : all usable cores by default

    Raises
    ------
    PymlaError
        This process may not use so many cores.
    """
    from pymla import cpu

    cores = cpu.usable_cores()
    if threads is not None and not 1 <= threads <= cores:
        checks.refuse("threads", threads, f"this process may use 1 to {cores} cores")
    cpu.set_threads(threads or cores)
    limits = importlib.import_module(f"pymla.{'cuda' if device == 'cuda' else 'cpu'}.limits")
    return limits.measure()


def machine() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gather(limits: Rates, device: str = "cpu") -> dict[str, Any]:
    """Machine, threads, limits, versions and date, without which a table of rates is worth nothing, as plain types."""
    from pymla import cpu

    about: dict[str, Any] = {
        "device": device,
        "machine": machine(),
        "isa": cpu.ISA,
        "threads": cpu.thread_count(),
        "limits": {"read_bytes_per_second": limits.read, "int8_macs_per_second": limits.int8},
        "pymla": __version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        gpu = cuda.describe()
        about |= {"gpu": gpu["name"], "gpu_isa": "sm_{}{}".format(*gpu["capability"])}
    return about


def describe(about: dict[str, Any]) -> str:
    """The facts of `gather` on one line."""
    limits = about["limits"]
    return (
        f"{describe_machine(about)}; reads {limits['read_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"int8 {limits['int8_macs_per_second'] / 1e9:.0f} GMAC/s; pymla {about['pymla']}, {about['date'][:10]}"
    )


def describe_machine(about: dict[str, Any]) -> str:
    """The hardware that computes, in words."""
    if about["device"] == "cuda":
        return f"{about['gpu']}, {about['gpu_isa']}, {about['machine']}"
    return f"{about['machine']}, {about['isa']}, {about['threads']} threads"
