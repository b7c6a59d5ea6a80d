"""The CUDA backend in the simulator against `pymla.backend`: the same operations as on a GPU."""

import simulated  # noqa: F401
from test_backend import differences

from pymla import backend as protocols
from pymla.cuda import backend


def test_every_operation_is_there_with_its_arguments():
    found = list(differences(protocols.Backend, backend, backend.__name__))
    assert not found, "\n".join(found)
