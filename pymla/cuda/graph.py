"""Whole steps that the device repeats without the host: CUDA graphs. Twin of the CPU's `pymla.cpu.threads.Graph`."""

from cuda.bindings import driver as api

from pymla.cuda import driver
from pymla.cuda.driver import call
from pymla.errors import PymlaError


class Graph:
    """The launches of a function, recorded by calling it once, and run by `replay`.

    Everything that changes from replay to replay must lie in arrays that the function was recorded with: whatever it
    computes in Python is computed once. The function may make arrays (`memory.empty`, `memory.zeros`), which live as
    long as the graph, but must not copy from or to the host. In the simulator, with ``PYMLA_CUDA_SYNC=1`` and where
    `Graph.enabled` is false, the function is called at every replay.

    Parameters
    ----------
    function : callable()

    Attributes
    ----------
    enabled : bool
        Of the class: whether graphs that are made from now on are recorded.
    result
        What the function returned; device arrays are filled by `replay`.
    """

    enabled = True

    def __init__(self, function):
        self._function, self._executable, self._kept, self.result = function, None, [], None
        if driver.SIMULATED or driver.SYNC or not Graph.enabled:
            return
        from pymla.cuda.jit import KERNELS

        # To load machine code while recording is allowed to fail, so that whatever may be used is loaded before.
        for each in KERNELS.values():
            each.load()
        stream, graph = driver.stream(), None
        # Relaxed: allocations, which take effect at once, are permitted.
        call(api.cuStreamBeginCapture, stream, api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        driver.record(self)
        try:
            self.result = function()
        finally:
            driver.record(None)
            error, graph = api.cuStreamEndCapture(stream)
        if error != api.CUresult.CUDA_SUCCESS:
            raise PymlaError(f"a step cannot be recorded as a graph: {driver.describe(error)}")
        self._executable = call(api.cuGraphInstantiate, graph, 0)
        call(api.cuGraphDestroy, graph)

    def keep(self, value):
        """Keep something alive that the recorded launches use."""
        self._kept.append(value)

    def replay(self):
        """Run it; returns what the function returned."""
        if self._executable is None:
            self.result = self._function()
            return self.result
        call(api.cuGraphLaunch, self._executable, driver.stream())
        driver.launched("in a graph")
        return self.result

    def __del__(self):
        if getattr(self, "_executable", None) is not None:
            api.cuGraphExecDestroy(self._executable)
