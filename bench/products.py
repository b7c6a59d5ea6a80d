"""Products of weights with activations, as the benchmarks take them."""

from collections.abc import Iterator
from itertools import cycle

import numpy as np
from cases import as_multiplied
from shapes import copies, matrix, normal

from pymla import cpu, reference
from pymla.cpu.graph import Graph

#: Tokens up to which weights are streamed from memory: more tokens are multiplied by panels, and bounded by that.
FEW = 16
#: Rows and tokens whose results are checked: the last ones.
CHECKED_ROWS, CHECKED_TOKENS = 48, 3
INT8 = {"rtol_max": 1e-5, "reason": "the reference multiplies the same int8 activations, in float64"}


class Product:
    """A product of a matrix with some tokens, ready to run.

    Attributes
    ----------
    macs, nbytes : int
        Multiply-adds, and bytes of weights that come from memory.
    streamed : bool
        Whether tokens are few: every run then takes another copy of the matrix, so that none is in a cache.
    copies : int
        Runs until the first copy is taken again.
    """

    def __init__(self, qtype: int, shape: tuple[int, int], tokens: int):
        w, self._x = matrix(qtype, *shape), normal(tokens, shape[1])
        self._w, self._out = w, np.full((tokens, shape[0]), np.nan, np.float32)
        activation = cpu.quant.Activation(self._x)
        activation.panels(qtype)
        self.streamed = tokens <= FEW
        self.macs = tokens * shape[0] * shape[1]
        self.nbytes = w.data.nbytes if self.streamed else 0
        # Launches are replayed, as in a step of a model, and not prepared by Python every time.
        weights = copies(w) if self.streamed else [w]
        self.copies = len(weights)
        self._turn = cycle([Graph(lambda w=each: cpu.quant.matmul(w, activation, self._out)) for each in weights])

    def run(self) -> None:
        """Take the product."""
        next(self._turn).replay()

    def checks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What a run computed and what is expected, for the last tokens and rows."""
        rows = self._w.rows(self._out.shape[1] - CHECKED_ROWS, self._out.shape[1])
        seen = as_multiplied(self._x[-CHECKED_TOKENS:], self._w.qtype).astype(np.float64)
        expected = np.empty((len(seen), CHECKED_ROWS))
        actual = self._out[-CHECKED_TOKENS:, -CHECKED_ROWS:]
        yield actual, reference.quant.matmul(rows, reference.quant.Activation(seen), expected)
