"""Steps that are recorded once and replayed without a return to Python: the twin of a CUDA graph."""

from pymla.cpu.runtime import threads
from pymla.cpu.runtime.isa import PYTHON
from pymla.cpu.runtime.polling import OPERATION_WORDS
from pymla.cpu.runtime.pool import zeros


class Graph:
    """The launches of a function, recorded by calling it once, and run by `replay`: with the addresses of their arrays,
    on what the arrays then hold.

    Everything that changes from replay to replay must lie in arrays that the function was recorded with: whatever it
    computes in Python is computed once.

    Parameters
    ----------
    function : callable()
        Where kernels run as Python, it is called by every replay instead.

    Attributes
    ----------
    result
        What the function returned; arrays are filled by `replay`.
    """

    def __init__(self, function):
        self._function = function
        self._launches = []
        self._keep = []
        self.result = None
        if PYTHON:
            return
        with threads.record(self):
            self.result = function()
        self._operations = zeros(OPERATION_WORDS * max(1, len(self._launches)))
        table = self._operations.reshape(-1, OPERATION_WORDS)
        for row, each in zip(table, self._launches, strict=False):
            row[:5] = *each, 0

    @staticmethod
    def size(sequences):
        """For how many sequences the step is recorded in which a step of `sequences` takes part; None: it is not
        recorded. A step keeps the arrays of all its launches. Where it is not, Python takes some 2.5 ms a layer, a
        small part of a larger step."""
        return sequences if sequences <= 16 else None

    def add(self, address, items, grain, words, keep):
        """Record a launch."""
        if items:
            self._launches.append((address, words.ctypes.data, items, grain))
            self._keep.append((words, keep))

    def replay(self):
        """Run it; returns what the function returned."""
        if PYTHON:
            self.result = self._function()
        elif self._launches:
            threads.run(self._operations, len(self._launches))
        return self.result
