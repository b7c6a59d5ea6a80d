"""Which backend (`pymla.backend`) each part of a model is on, and how arrays get from one to another."""

from typing import NamedTuple

from pymla.backend import Array, Backend, MatrixInput


class Placement(NamedTuple):
    """The backend of every part of a model. The weights of a part lie in the memory of its backend."""

    embedding: Backend
    layers: tuple[Backend, ...]  # of each layer: attention, its cache, the router, dense and shared experts
    experts: tuple[Backend, ...]  # of each layer: the routed experts
    output: Backend  # the last norm and the output matrix; tokens are chosen there

    @classmethod
    def on(cls, backend: Backend, layers: int) -> "Placement":
        """All of a model of `layers` layers on one backend."""
        return cls(backend, (backend,) * layers, (backend,) * layers, backend)

    @property
    def backends(self) -> list[Backend]:
        """Each backend once."""
        return list(dict.fromkeys((self.embedding, *self.layers, *self.experts, self.output)))


def moved(array: Array, source: Backend, target: Backend) -> Array:
    """An array of the backend `source` as one of `target`: itself where they are the same, else a copy that passes
    through the host's memory."""
    return array if source is target else target.memory.to_device(source.memory.to_host(array))


def moved_input(activation: MatrixInput, source: Backend, target: Backend) -> MatrixInput:
    """The input of matrices as `moved` moves arrays: numbers are moved, and quantised again for the other backend."""
    return activation if source is target else target.quant.Activation(moved(activation.x, source, target))
