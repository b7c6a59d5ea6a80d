"""The CUDA backend's operations, called with what does not fit, in the simulator: `test_contract` without values of
indices, which lie on the device."""

import numpy as np
import pytest
import simulated  # noqa: F401
from operations import calls, run, spoiled

from pymla.cuda import backend
from pymla.errors import PymlaError


@pytest.mark.parametrize("seed", [1])
def test_nothing_crashes(seed):
    """What the tensor cores cannot take is refused as well, though it fits."""
    rng, refused = np.random.default_rng(seed), 0
    for operation, arguments in calls(rng, backend):
        for name, value in arguments.items():
            changed = spoiled(rng, value, indices=False)
            if changed is None:
                continue
            try:
                run(backend, operation, arguments | {name: changed})
            except PymlaError:
                refused += 1
    assert refused > 25
