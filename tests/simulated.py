"""Import this first in a file of tests that run kernels in the CUDA simulator.

Whether kernels are simulated is decided once per process. Under a plain ``python -m pytest`` these files are skipped,
and `test_cuda_simulator.py` runs each of them in a process of its own with ``NUMBA_ENABLE_CUDASIM=1``. By hand:

    NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/test_cuda_ptx.py
"""

import importlib.util
import os

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip('needs numba-cuda: pip install ".[test,cuda]"', allow_module_level=True)
if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    pytest.skip("runs in the simulator, from test_cuda_simulator.py", allow_module_level=True)
