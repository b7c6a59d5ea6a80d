"""Copies of whole pages of a cache: within it, to the host's memory, and back."""

from collections.abc import Iterator
from collections.abc import Sequence as Items

import numpy as np

from pymla.backend import Array, Memory
from pymla.pages import PAGE
from pymla.tensor import QTensor


def read_pages(memory: Memory, rows: QTensor, pages: Items[int]) -> np.ndarray:
    """Pages in the host's memory: uint8 (pages, 64, bytes of a row), a copy."""
    out = np.empty((len(pages), PAGE, rows.data.shape[1]), np.uint8)
    for i, count in _neighbours(pages):
        out[i : i + count] = memory.to_host(_rows_of(rows, pages[i], count)).reshape(count, PAGE, -1)
    return out


def write_pages(memory: Memory, rows: QTensor, pages: Items[int], data: np.ndarray) -> None:
    """Write what `read_pages` gave into pages."""
    for i, count in _neighbours(pages):
        memory.write(_rows_of(rows, pages[i], count), data[i : i + count].reshape(count * PAGE, -1))


def copy_page(memory: Memory, rows: QTensor, source: int, target: int) -> None:
    """Copy the rows of a page into another one."""
    memory.copy(_rows_of(rows, source), _rows_of(rows, target))


def _rows_of(rows: QTensor, page: int, count: int = 1) -> Array:
    """The rows of a page, or of several neighbours, as bytes."""
    return rows.data[page * PAGE : (page + count) * PAGE]


def _neighbours(pages: Items[int]) -> Iterator[tuple[int, int]]:
    """Pages in runs of neighbours, each as the index of its first page and their count: a copy to or from a GPU takes
    as long for one page as for many."""
    start = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1:
            yield start, i - start
            start = i
