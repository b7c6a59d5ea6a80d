"""A backend that shows what matrices read: it stands around another backend, to which every operation goes on.

A model that is made with it computes what it would compute without it, at the speed of the other backend plus that of
looking, and a model that is made without it pays nothing. The operations that multiply with a model's matrices are
overridden here (`pymla.backend`): `matmul`, `matmul_heads`, `absorb`, `experts` and `ffn`, and `store`, which gets the
latent rows. `experts` and `ffn` never give away the hidden activations that their down matrices read, so these are
computed a second time, as the backend computes gate and up alone.

Steps are not recorded: a recorded one runs without Python.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import numpy as np

from pymla.backend import Array, Backend, MatrixInput
from pymla.tensor import QTensor


class Reads(Protocol):
    """Told of what matrices read."""

    def add(self, x: np.ndarray, matrix: int = 0) -> None:
        """Inputs (n, K) of a matrix, or the inputs of the matrices of all heads side by side; `matrix` is the number of
        an expert."""


#: By the `address` of a matrix, or of the rows of a cache. What has no entry is not looked at.
Watched = Mapping[int, Reads]


def address(array: Array) -> int:
    """Where an array begins, in the memory of its backend. A matrix and its first rows, a slice of heads, begin at the
    same address; no two tensors do."""
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.address


def observed(backend: Backend, watched: Watched) -> Backend:
    """A backend that shows what `watched` matrices read; they may be added to it later."""
    return cast(Backend, _Observed(backend, watched))


class _Around:
    """Has the members of another object or module, but for those that a subclass overrides."""

    def __init__(self, backend: Backend, member: Any, watched: Watched):
        self._backend, self._member, self._watched = backend, member, watched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._member, name)

    def _show(self, place: Array, x: Array, of: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> None:
        """Tell of rows `x`, or of what `of` takes from them, if the matrix or the cache at `place` is watched."""
        reads = self._watched.get(address(place))
        if reads is not None:
            reads.add(of(self._backend.memory.to_host(x)))


class _Observed(_Around):
    def __init__(self, backend: Backend, watched: Watched):
        super().__init__(backend, backend, watched)
        self.quant = _Quant(backend, backend.quant, watched)
        self.attention = _Attention(backend, backend.attention, watched)
        self.moe = _MoE(backend, backend.moe, watched)

    class Graph:
        """Serves no step."""

        @staticmethod
        def size(sequences: int) -> None:
            return None


class _Quant(_Around):
    def matmul(self, w: QTensor, activation: MatrixInput, out: Array) -> Array:
        self._show(w.data, activation.x)
        return self._member.matmul(w, activation, out)

    def matmul_heads(self, w: QTensor, x: Array, out: Array) -> Array:
        self._show(w.data, x, _side_by_side)
        return self._member.matmul_heads(w, x, out)


class _Attention(_Around):
    def absorb(self, q: Array, k_b: QTensor, out: Array) -> Array:
        nope = k_b.data.shape[1]
        self._show(k_b.data, q, lambda q: _side_by_side(q[..., :nope]))
        return self._member.absorb(q, k_b, out)

    def store(self, rows: Array, slots: Array, cache: QTensor) -> None:
        self._show(cache.data, rows)
        self._member.store(rows, slots, cache)


class _MoE(_Around):
    def experts(
        self,
        activation: MatrixInput,
        ids: Array,
        weights: Array,
        gate: QTensor,
        up: QTensor,
        down: QTensor,
        out: Array,
        shared: tuple[QTensor, QTensor, QTensor] | None = None,
        add: bool = False,
    ) -> Array:
        reads, reads_down = (self._watched.get(address(w.data)) for w in (gate, down))
        if reads is not None and reads_down is not None:
            x, chosen = self._backend.memory.to_host(activation.x), self._backend.memory.to_host(ids)
            for e in np.unique(chosen).tolist():
                own = x[np.nonzero(chosen == e)[0]]
                reads.add(own, e)
                reads_down.add(self._hidden(own, gate.rows(e, e + 1), up.rows(e, e + 1)), e)
        if shared is not None:
            self._show_ffn(activation, *shared)
        return self._member.experts(activation, ids, weights, gate, up, down, out, shared=shared, add=add)

    def ffn(
        self, activation: MatrixInput, gate: QTensor, up: QTensor, down: QTensor, out: Array, add: bool = False
    ) -> Array:
        self._show_ffn(activation, gate, up, down)
        return self._member.ffn(activation, gate, up, down, out, add=add)

    def _show_ffn(self, activation: MatrixInput, gate: QTensor, up: QTensor, down: QTensor) -> None:
        self._show(gate.data, activation.x)
        reads = self._watched.get(address(down.data))
        if reads is not None:
            reads.add(self._hidden(self._backend.memory.to_host(activation.x), gate, up))

    def _hidden(self, x: np.ndarray, gate: QTensor, up: QTensor) -> np.ndarray:
        """``silu(gate @ x) * (up @ x)`` for rows (n, K) of one network: (n, F)."""
        memory, quant = self._backend.memory, self._backend.quant
        activation = quant.Activation(memory.to_device(x))
        products = []
        for w in (gate, up):
            out = memory.empty((len(x), w.data.shape[-2]), x.dtype)
            products.append(memory.to_host(quant.matmul(w, activation, out)))
        with np.errstate(over="ignore"):  # silu of a large negative number is 0
            return products[0] / (1 + np.exp(-products[0])) * products[1]


def _side_by_side(x: np.ndarray) -> np.ndarray:
    """Inputs of the matrices of all heads, (T, H, K), as rows (T, H * K)."""
    return x.reshape(len(x), -1)
