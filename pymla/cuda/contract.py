"""The checks of a GPU's operations (`pymla.contract`). Values of indices are on the device: they are not looked at.

Kernels take an index that is out of range for the last one in range, so that they never read or write outside an array.
There must be one then: `need_any` and `need_pages` refuse indices of nothing.
"""

from __future__ import annotations

from pymla.backend import Array
from pymla.contract import FLOAT16, Contract
from pymla.errors import PymlaError
from pymla.pages import PAGE, Step
from pymla.tensor import QTensor

check = Contract(expanded_floats=FLOAT16)


def need_any(operation: str, name: str, indices: Array, count: int, things: str) -> None:
    """Raise where indices have nothing to index: `count` is the number of `things`."""
    if indices.size and count < 1:
        raise PymlaError(f"{operation}: {name} is an array of {indices.size} indices, and there are no {things}")


def need_pages(operation: str, step: Step, cache: QTensor) -> None:
    """Raise where the tokens of a step have no sequence, no page in the tables, or no page in the cache."""
    sequences, pages = step.block_tables.shape
    need_any(operation, "step.seq_of", step.seq_of, sequences, "sequences of the step")
    need_any(operation, "step.positions", step.positions, pages, "pages in the block tables")
    need_any(operation, "step.block_tables", step.block_tables, len(cache.data) // PAGE, "pages in the cache")
