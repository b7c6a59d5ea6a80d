"""Checks of the arguments of an operation: arrays, indices, matrices, rows of a cache and steps.

`pymla.contract` puts them together to the contract of each operation. All raise a PymlaError of one form, ``operation:
argument is … ; … is expected``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from pymla import ggml
from pymla.backend import Array, MatrixInput
from pymla.errors import PymlaError
from pymla.pages import CACHE_TYPES, HADAMARD_TYPES, PAGE, Step
from pymla.tensor import QTensor

#: Dtypes that an array may have.
Dtypes = tuple[np.dtype, ...]
#: A shape that an array must have, in which None stands for any size.
Shape = tuple[int | None, ...]

INT32: Dtypes = (np.dtype(np.int32),)
UINT8: Dtypes = (np.dtype(np.uint8),)


class Abilities(NamedTuple):
    """How a backend differs from others in the arguments that it takes."""

    floats: Dtypes  # of float arrays
    expanded_floats: Dtypes  # of expanded keys and values
    contiguous: bool  # whether kernels go through arrays by address, so that elements must follow each other
    known: Callable[[], bool]  # whether values of indices can be looked at now
    pages: Mapping[int, Callable[[int], int]]  # types of the cache beside ggml's, and the bytes of a row by its width


class Call:
    """The checks of one call of an operation.

    Parameters
    ----------
    operation : str
        Its name, for messages.
    abilities : Abilities
        Those of the backend.
    """

    def __init__(self, operation: str, abilities: Abilities):
        self.operation, self.abilities = operation, abilities

    def refuse(self, name: str, got: str, wanted: str) -> NoReturn:
        """Raise the PymlaError for an argument."""
        raise PymlaError(f"{self.operation}: {name} is {got}; {wanted} is expected")

    # Arrays ----------------------------------------------------------------------------------------------------------

    def array(
        self, name: str, array: Any, dtypes: Dtypes, shape: Shape, contiguous: bool = False, rows: bool = False
    ) -> None:
        """An array of one of some dtypes and of a shape.

        Parameters
        ----------
        contiguous, rows : bool
            Whether all of it, or each row of it, must be contiguous on a backend that needs that.
        """
        if not hasattr(array, "strides"):
            self.refuse(name, f"a {type(array).__name__}", f"an array, {_described(dtypes, shape)},")
        fits = len(array.shape) == len(shape)
        fits = fits and all(want is None or have == want for have, want in zip(array.shape, shape, strict=True))
        if array.dtype not in dtypes or not fits:
            self.refuse(name, _described((array.dtype,), array.shape), _described(dtypes, shape))
        if not self.abilities.contiguous:
            return
        if contiguous and not _contiguous(array):
            self.refuse(name, f"an array with strides {array.strides}", "a contiguous one")
        if not rows or 0 in array.shape:  # NumPy's strides of an array without elements mean nothing
            return
        if array.shape[-1] > 1 and array.strides[-1] != array.dtype.itemsize:
            self.refuse(name, f"an array with strides {array.strides}", "one with contiguous rows")

    def float(self, name: str, array: Any, shape: Shape, contiguous: bool = False, rows: bool = False) -> None:
        """An array of the backend's float dtypes."""
        self.array(name, array, self.abilities.floats, shape, contiguous, rows)

    def activation(self, activation: MatrixInput) -> tuple[int, int]:
        """The input of a matrix. Returns its tokens and columns."""
        if not hasattr(activation, "x"):
            self.refuse("activation", f"a {type(activation).__name__}", "an Activation")
        self.float("activation", activation.x, (None, None), contiguous=True)
        tokens, columns = activation.x.shape
        return tokens, columns

    # Indices ---------------------------------------------------------------------------------------------------------

    def index(self, name: str, array: Array, shape: Shape, stop: int, things: str) -> None:
        """An int32 array whose values lie from 0 to below `stop`, the number of `things` that they index."""
        self.array(name, array, INT32, shape, contiguous=True)
        if self.abilities.known():
            self.within(name, array, stop, things)

    def within(self, name: str, values: np.ndarray, stop: int, things: str) -> None:
        """Known values of indices."""
        if not values.size:
            return
        least, most = int(values.min()), int(values.max())
        if least < 0 or most >= stop:
            worst = least if least < 0 else most
            raise PymlaError(f"{self.operation}: {name} has {worst}, and {things} go from 0 to {stop - 1}")

    def chosen(self, step: Step, chosen: np.ndarray) -> None:
        """Known positions of `Attention.choose`: ascending, from 0 to the token's own, then -1."""
        if not len(chosen):
            return
        ends = chosen < 0
        counts = chosen.shape[1] - ends.sum(axis=1)
        behind = np.arange(chosen.shape[1]) >= counts[:, None]
        steps_up = np.diff(chosen, axis=1) > 0
        good = (ends == behind).all(axis=1) & (counts > 0) & (chosen.max(axis=1) <= step.positions)
        good &= (steps_up | behind[:, 1:]).all(axis=1)
        if not good.all():
            t = int(np.flatnonzero(~good)[0])
            self.refuse(
                "chosen", f"no list of positions for token {t}", f"ascending ones up to {step.positions[t]}, then -1,"
            )

    def step(self, step: Step, tokens: int, slots: int) -> None:
        """A step's own arrays, and that the pages that its tokens see are pages of a cache of so many slots."""
        tables, seq_of, positions = step.block_tables, step.seq_of, step.positions
        self.array("step.block_tables", tables, INT32, (None, None), contiguous=True)
        sequences, pages = tables.shape
        self.index("step.seq_of", seq_of, (tokens,), sequences, "sequences of the step")
        self.index("step.positions", positions, (tokens,), pages * PAGE, "positions in the pages of a step")
        if self.abilities.known():
            seen = np.zeros(sequences, np.int32)
            np.maximum.at(seen, seq_of, positions // PAGE + 1)
            used = tables[np.arange(pages) < seen[:, None]]
            self.within("step.block_tables", used, slots // PAGE, "pages of the cache")

    # Matrices and caches ---------------------------------------------------------------------------------------------

    def matrices(self, name: str, w: QTensor, shape: tuple[int | None, int | None, int]) -> tuple[int, ...]:
        """A QTensor of matrices with rows of a number of columns.

        Parameters
        ----------
        shape : (matrices, rows, columns)
            None for the matrices stands for one or several, None for the rows for any number.

        Returns
        -------
        (rows,) or (matrices, rows)
        """
        matrices, rows, columns = shape
        self._qtensor(name, w)
        if w.qtype not in ggml.SUPPORTED:
            known = ", ".join(ggml.NAME[each] for each in ggml.SUPPORTED)
            self.refuse(name, f"of type {ggml.NAME.get(w.qtype, w.qtype)}", f"one of {known}")
        block, row = ggml.BLOCK_SIZE[w.qtype], _dimensions(w)[-1]
        if columns % block:
            kind = ggml.NAME[w.qtype]
            self.refuse(name, f"{kind}, in blocks of {block}", f"a type whose blocks divide {columns} columns")
        if row != ggml.row_bytes(w.qtype, columns):
            have = ggml.columns(w.qtype, row)
            got = f"{ggml.NAME[w.qtype]} with rows of {have} columns ({row} bytes)"
            self.refuse(name, got, f"a matrix of {columns} columns")
        wanted: Shape = (rows, row) if matrices is None else (matrices, rows, row)
        if len(w.data.shape) == 3 and matrices is None:
            wanted = (None, rows, row)
        self.array(name, w.data, UINT8, wanted, rows=True)
        return w.data.shape[:-1]

    def single(self, name: str, w: QTensor, rows: int | None, columns: int) -> int:
        """One matrix. Returns its rows."""
        if len(_dimensions(w)) != 2:
            self.refuse(name, "not a matrix", "a QTensor (rows, bytes)")
        return self.matrices(name, w, (None, rows, columns))[0]

    def several(self, name: str, w: QTensor) -> tuple[int, int]:
        """Matrices whose columns are not known yet. Returns how many there are, and the rows of each."""
        if len(_dimensions(w)) != 3:
            self.refuse(name, "not several matrices", "a QTensor (matrices, rows, bytes)")
        count, rows, _ = w.data.shape
        return count, rows

    def stack(self, name: str, w: QTensor, rows: int | None, columns: int) -> tuple[int, int]:
        """Several matrices. Returns how many there are, and the rows of each."""
        count, found = self.several(name, w)
        self.matrices(name, w, (count, rows, columns))
        return count, found

    def cache(self, name: str, cache: QTensor, width: int) -> int:
        """Rows of a cache, of `width` numbers. Returns the number of slots."""
        self._qtensor(name, cache)
        qtype, slots = cache.qtype, _dimensions(cache)[0]
        if qtype in self.abilities.pages:
            nbytes = self.abilities.pages[qtype](width)
            if slots % PAGE:
                self.refuse(name, f"of {slots} slots", f"a multiple of {PAGE}")
        elif qtype in self._cache_types() and width % ggml.BLOCK_SIZE[qtype] == 0:
            nbytes = ggml.row_bytes(qtype, width)
        else:
            got = f"of type {ggml.NAME.get(qtype, qtype)}"
            self.refuse(name, got, f"a cache type for rows of {width} numbers")
        self.array(name, cache.data, UINT8, (slots, nbytes), contiguous=True)
        return slots

    def _cache_types(self) -> tuple[int, ...]:
        """ggml's types that rows of a cache have. Where rows lie page by page, those of mixed types always do."""
        mixed = () if self.abilities.pages else HADAMARD_TYPES
        return tuple(qtype for qtype in CACHE_TYPES.values() if qtype in mixed or qtype not in HADAMARD_TYPES)

    def _qtensor(self, name: str, value: Any) -> None:
        if not (hasattr(value, "qtype") and hasattr(value, "data")):
            self.refuse(name, f"a {type(value).__name__}", "a QTensor")


def _contiguous(array: Array) -> bool:
    flags = getattr(array, "flags", None)
    return flags.c_contiguous if flags is not None else array.contiguous


def _dimensions(tensor: Any) -> tuple[int, ...]:
    """The shape of a QTensor's data; (0,) where it has none."""
    return getattr(getattr(tensor, "data", None), "shape", None) or (0,)


def _described(dtypes: Dtypes, shape: Shape) -> str:
    """An array in words, such as ``float32 (n, 64)``."""
    sizes = ", ".join("n" if size is None else str(size) for size in shape)
    return f"{' or '.join(map(str, dtypes))} ({sizes}{',' * (len(shape) == 1)})"
