"""Whole steps that the device repeats without the host: CUDA graphs. Twin of `pymla.cpu.graph`."""

from cuda.bindings import driver as api

from pymla.cuda.memory import pool_of_graph
from pymla.cuda.runtime import driver
from pymla.cuda.runtime.driver import call
from pymla.errors import PymlaError


class Graph:
    """A function whose launches are recorded once and repeated by `replay`.

    Everything that changes from replay to replay must lie in arrays that the function was recorded with: whatever it
    computes in Python is computed once. These arrays must live as long as the graph. The function may make arrays
    (`memory.empty`, `memory.zeros`), whose memory belongs to the graph, but must not copy from or to the host.

    The first replay calls the function, so that every kernel is compiled and loaded before the second one records. In
    the simulator, with ``PYMLA_CUDA_SYNC=1`` and while `Graph.enabled` is false, every replay calls it.

    Parameters
    ----------
    function : callable()

    Attributes
    ----------
    enabled : bool
        Of the class: whether functions are recorded, and what was recorded is repeated.
    pool : Pool
        Memory of the arrays that the recorded function made. What it freed serves its next array, as the launches are
        always repeated in the same order.
    """

    enabled = True

    def __init__(self, function):
        self._function, self._called, self._executable, self._result = function, False, None, None
        self.pool = pool_of_graph()

    @staticmethod
    def size(sequences):
        """Sequences of the recorded step of which a step of some sequences is part; None: it is not recorded. A step
        keeps its memory, so that there are few sizes from 8 on: a graph of 64 sequences takes some 50 MB with V2-Lite,
        and all sizes 230 MB."""
        if sequences > 64:
            return None
        return sequences if sequences <= 8 else -(-sequences // 8) * 8

    def replay(self):
        """Run it; returns what the function returned."""
        if not self._called or not Graph.enabled or driver.SIMULATED or driver.SYNC:
            self._called = True
            return self._function()
        if self._executable is None:
            self._record()
        call(api.cuGraphLaunch, self._executable, driver.stream())
        driver.launched("in a graph")
        return self._result

    def _record(self):
        stream, graph = driver.stream(), None
        # Relaxed: allocations, which take effect at once, are permitted.
        call(api.cuStreamBeginCapture, stream, api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        driver.record(self)
        try:
            self._result = self._function()
        finally:
            driver.record(None)
            error, graph = api.cuStreamEndCapture(stream)
        if error != api.CUresult.CUDA_SUCCESS:
            raise PymlaError(f"a step cannot be recorded as a graph: {driver.describe(error)}")
        self._executable = call(api.cuGraphInstantiate, graph, 0)
        call(api.cuGraphDestroy, graph)

    def __del__(self):
        if getattr(self, "_executable", None) is not None:
            api.cuGraphExecDestroy(self._executable)
