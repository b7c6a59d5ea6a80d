"""Which backend each part of a model is on, and how arrays get from one to another.

A backend is a module with the submodules ``attention``, ``memory``, ``moe``, ``norm``, ``quant``, ``rope`` and
``sampling``, with ``Graph``, and with ``SLICE``, the tokens of a prompt that it takes at a time: `pymla.reference`,
`pymla.cpu`, `pymla.cuda.backend`. Its functions take and return arrays in its own memory.
"""

from types import ModuleType
from typing import NamedTuple


class Placement(NamedTuple):
    """The backend of every part of a model. A part's weights lie in its backend's memory."""

    embedding: ModuleType
    layers: tuple[ModuleType, ...]  # of each layer: attention, its cache, the router, dense and shared experts
    experts: tuple[ModuleType, ...]  # of each layer: the routed experts
    output: ModuleType  # the last norm and the output matrix; tokens are chosen there

    @classmethod
    def on(cls, backend, layers):
        """All of a model of so many layers on one backend."""
        return cls(backend, (backend,) * layers, (backend,) * layers, backend)

    @property
    def backends(self):
        """Each backend once."""
        return list(dict.fromkeys((self.embedding, *self.layers, *self.experts, self.output)))


def moved(array, source, target):
    """An array of the backend `source` as one of `target`: itself where they are the same, else a copy that passes
    through the host's memory."""
    return array if source is target else target.memory.to_device(source.memory.to_host(array))


def moved_input(activation, source, target):
    """An `Activation` as `moved` moves arrays: float values are moved, and quantised again for the other backend."""
    return activation if source is target else target.quant.Activation(moved(activation.x, source, target))
