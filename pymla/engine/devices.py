"""The devices that a model can run on, and their backends. Backends are imported when a model needs them: that of the
processor imports Numba, and that of the GPU needs numba-cuda and a driver."""

from pymla import checks, cuda
from pymla.backend import Backend
from pymla.engine.report import Report
from pymla.engine.split import Split
from pymla.errors import PymlaError
from pymla.models.config import ModelConfig
from pymla.models.placement import Placement

#: Devices that a model can run on; "auto" is the GPU where there is one that can be used.
DEVICES = ("auto", "cpu", "cuda", "reference")


def find_device(device: str) -> tuple[str, str]:
    """The device that "auto" stands for on this machine: "cuda", or "cpu" with the reason, as (device, reason). The
    other names stand for themselves.

    Raises
    ------
    PymlaError
        "cuda" is asked for, and cannot be used.
    """
    if device == "auto":
        found, reason = cuda.available()
        return ("cuda", "") if found else ("cpu", reason.partition(";")[0])
    if device == "cuda":
        try:
            cuda.check()
        except PymlaError as error:
            raise PymlaError(f"`device` cuda: {error}") from None
    return device, ""


def backend_of(device: str) -> Backend:
    """The backend of "cpu", "cuda" or "reference"."""
    if device == "cuda":
        from pymla.cuda import backend

        return backend
    if device == "cpu":
        from pymla import cpu

        return cpu
    from pymla import reference

    return reference


def use_threads(threads: int | None) -> int:
    """Let the processor's kernels run on `threads` threads, by default on all usable cores. Returns the number that was
    asked for; a limit on processes may permit fewer (`pymla.cpu.thread_count`).

    Raises
    ------
    PymlaError
        `threads` is more than there are cores.
    """
    from pymla import cpu

    cores = cpu.usable_cores()
    if threads is not None and not 1 <= threads <= cores:
        checks.refuse("threads", threads, f"this process may use 1 to {cores} cores")
    cpu.set_threads(threads or cores)
    return threads or cores


def placement(device: str, split: Split, config: ModelConfig, threads: int | None, report: Report) -> Placement:
    """The backend of each part of a model, ready to compute: the reference for all, or a split between processor and
    GPU."""
    if device == "reference":
        return Placement.on(backend_of(device), config.num_hidden_layers)
    from pymla import cpu

    wanted = use_threads(threads)
    if cpu.thread_count() < wanted:
        report.warn(
            f"the system lets this process start {cpu.thread_count()} of {wanted} threads, and kernels run slower; "
            "raise its limit on processes (ulimit -u), or give `threads`"
        )
    return split.placement(config, backend_of("cpu"), backend_of("cuda" if split.gpu_layers else "cpu"))
