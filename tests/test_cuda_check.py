"""What a user reads where there is no GPU that can be used. The driver's answers are made up; none is needed."""

import importlib.util
import sys

import pytest

from pymla import cuda
from pymla.cli import main
from pymla.engine.devices import find_device
from pymla.errors import PymlaError

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip('needs numba-cuda: pip install ".[test,cuda]"', allow_module_level=True)

from cuda.bindings import driver as api
from cuda.bindings import nvjitlink

OK, NO_DEVICE = api.CUresult.CUDA_SUCCESS, api.CUresult.CUDA_ERROR_NO_DEVICE


def no_package(patch):
    patch.setattr(importlib.util, "find_spec", lambda name: None)


def no_driver(patch):
    def fail():
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    patch.setattr(api, "cuDriverGetVersion", fail)


def driver(patch, version=99000, started=OK, capability=(9, 0)):
    patch.setattr(api, "cuDriverGetVersion", lambda: (OK, version))
    patch.setattr(api, "cuInit", lambda flags: (started,))
    patch.setattr("pymla.cuda.runtime.driver.compute_capability", lambda: capability)
    patch.setattr(cuda, "_name", lambda: "NVIDIA T4")


@pytest.fixture(
    params=[
        (no_package, "the package numba-cuda is not installed", 'pip install "pymla[cuda]"'),
        (no_driver, "there is no NVIDIA driver on this machine", ""),
        (
            lambda patch: driver(patch, version=11040),
            "the NVIDIA driver is for CUDA 11.4, and the installed toolkit is {}.{}".format(*nvjitlink.version()),
            "update the driver",
        ),
        (
            lambda patch: driver(patch, started=NO_DEVICE),
            "there is no NVIDIA GPU that this process may use",
            "CUDA_VISIBLE_DEVICES",
        ),
        (
            lambda patch: driver(patch, capability=(7, 5)),
            "NVIDIA T4 has compute capability 7.5, and kernels need 8.0",
            "",
        ),
    ],
    ids=["package", "driver", "old", "device", "capability"],
)
def trouble(request, monkeypatch):
    """What is wrong, and what to do about it."""
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "0")
    change, reason, advice = request.param
    change(monkeypatch)
    return reason, advice


def test_reasons(trouble):
    reason, advice = trouble
    with pytest.raises(PymlaError) as caught:
        find_device("cuda")
    assert str(caught.value).startswith(f"`device` cuda: {reason}")
    assert advice in str(caught.value)
    assert find_device("auto") == ("cpu", reason)
    assert [find_device(each) for each in ("cpu", "reference")] == [("cpu", ""), ("reference", "")]


@pytest.mark.parametrize("command", [["generate", "def"], ["bench"]])
def test_command_line(trouble, command, monkeypatch, capfd):
    reason, advice = trouble
    monkeypatch.setattr(sys, "argv", ["pymla", *command, "--device", "cuda"])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capfd.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert err.startswith(f"pymla: error: --device cuda: {reason}")
    assert advice in err
    assert err.count("\n") == 1


def test_a_card_that_can_be_used(monkeypatch):
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "0")
    driver(monkeypatch)
    assert find_device("auto") == find_device("cuda") == ("cuda", "")
