"""Numba kernels for NVIDIA GPUs: the twins of `pymla.reference`, with the same names and contracts.

This module can be imported without numba-cuda and without a device, and tells whether they are there.
"""

import importlib.util
import os

from pymla.errors import PymlaError

NAME = "cuda"

#: The oldest cards that kernels run on: Ampere, with asynchronous copies and bfloat16 in the tensor cores.
CAPABILITY = (8, 0)

__all__ = ["CAPABILITY", "NAME", "available", "check", "describe"]


def available():
    """Whether kernels can run here, and why not: (bool, str)."""
    try:
        check()
    except PymlaError as error:
        return False, str(error)
    return True, ""


def check():
    """Find the device, or raise.

    Raises
    ------
    PymlaError
        With what is missing: numba-cuda, the driver, a driver that is new enough, a device, or one that can do enough.
    """
    if importlib.util.find_spec("numba_cuda") is None:
        raise PymlaError('the package numba-cuda is not installed; pip install "pymla[cuda]"')
    from pymla.host import numba_check  # noqa: F401 - before Numba

    if _simulated():
        return
    from cuda.bindings import driver as api

    from pymla.cuda.runtime.driver import call, compute_capability

    # This one answers before the driver is initialised, which an old one may refuse.
    driver, toolkit = call(api.cuDriverGetVersion), _toolkit()
    if driver // 1000 < toolkit[0]:
        raise PymlaError(
            f"the NVIDIA driver is for CUDA {driver // 1000}.{driver % 1000 // 10}, and the installed toolkit is "
            f'{toolkit[0]}.{toolkit[1]}; update the driver, or pip install "numba-cuda[cu{driver // 1000}]"'
        )
    (error,) = api.cuInit(0)
    if error in (api.CUresult.CUDA_ERROR_NO_DEVICE, api.CUresult.CUDA_ERROR_INVALID_DEVICE):
        raise PymlaError("there is no NVIDIA GPU that this process may use; see nvidia-smi and CUDA_VISIBLE_DEVICES")
    capability = compute_capability()
    if capability < CAPABILITY:
        raise PymlaError(
            "{} has compute capability {}.{}, and kernels need {}.{}".format(_name(), *capability, *CAPABILITY)
        )


def describe():
    """The device: name, bytes of memory, compute capability and multiprocessors, as a dict."""
    check()
    from pymla.cuda import memory
    from pymla.cuda.runtime import driver

    return {
        "name": "CUDA simulator" if _simulated() else _name(),
        "memory": memory.total_memory(),
        "capability": CAPABILITY if _simulated() else driver.compute_capability(),
        "multiprocessors": driver.multiprocessors(),
    }


def _simulated():
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def _name():
    from cuda.bindings import driver as api

    from pymla.cuda.runtime.driver import call, device

    return call(api.cuDeviceGetName, 128, device()).split(b"\0")[0].decode()


def _toolkit():
    """The version of the linker, which machine code is of."""
    from cuda.bindings import nvjitlink

    return nvjitlink.version()
