"""Facts that belong to every measurement: the machine, its limits, versions and the date."""

import datetime
import platform
from pathlib import Path
from typing import Any

from pymla import __version__, cuda
from pymla.backend import Rates
from pymla.engine.devices import backend_of, use_threads


def measure_limits(device: str = "cpu", threads: int | None = None) -> Rates:
    """Measure the limits of a device, those of the processor with so many threads.

    Parameters
    ----------
    device : "cpu", "cuda" or "reference"
    threads : all usable cores by default

    Raises
    ------
    PymlaError
        This process may not use so many cores.
    """
    use_threads(threads)
    return backend_of(device).limits.measure()


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
    if "gpu" in about:
        return f"{about['gpu']}, {about['gpu_isa']}, {about['machine']}"
    return f"{about['machine']}, {about['isa']}, {about['threads']} threads"
