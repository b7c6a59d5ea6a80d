"""The twin of the other backends' graphs: a step that is computed again each time."""


class Graph:
    """A function whose launches the other backends record once.

    Parameters
    ----------
    function : callable()
        Must read what changes from replay to replay from arrays that stay the same.
    """

    @staticmethod
    def size(sequences):
        """Sequences of the recorded step of which a step of some sequences is part; None: it is not recorded."""
        return sequences

    def __init__(self, function):
        self._function = function

    def replay(self):
        """Run it; returns what the function returned."""
        return self._function()
