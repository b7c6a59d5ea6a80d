"""What a section of `bench/gpu.py` finds out: a line on the terminal and a line of JSON for each, at once, so that what
came before a crash is kept."""

import json
import sys
import time
import traceback

from compare import relative_error

#: Kinds of records: facts about the device, checks against the reference, times of kernels, points of the sweep.
KINDS = ("fact", "check", "time", "sweep")


class Records:
    """Writes records to a file.

    Parameters
    ----------
    path : Path
    section : str
        Its name.
    """

    def __init__(self, path, section):
        self._path, self._section = path, section

    def add(self, kind, name, text, **values):
        """Write a record and show `text`."""
        print(f"  {name:52} {text}", flush=True)
        record = {"kind": kind, "section": self._section, "name": name, **values}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def check(self, name, run, *, rtol_max, reason):
        """Compare what a function computes.

        Parameters
        ----------
        run : callable()
            Pairs of what the device computed and what the reference says.
        rtol_max, reason : as for `compare.assert_close`
        """
        began, failure, error = time.perf_counter(), None, None
        try:
            error = max(relative_error(actual, expected) for actual, expected in run())
        except Exception as problem:  # whatever it is, the other checks go on
            failure = f"{type(problem).__name__}: {problem}"
            traceback.print_exc(file=sys.stderr)
        passed = error is not None and error < rtol_max
        said = failure or f"{error:.1e}, allowed {rtol_max:.0e}"
        self.add(
            "check",
            name,
            said if passed else f"FAILED: {said} ({reason})",
            passed=passed,
            error=error if error is None or error == error else "nan",
            allowed=rtol_max,
            reason=reason,
            failure=failure,
            seconds=time.perf_counter() - began,
        )

    def time(self, name, measure, *, amount, unit, limit=None):
        """Note how long something takes.

        Parameters
        ----------
        measure : callable()
            Its seconds.
        amount : float
            What is done in that time: bytes or operations.
        unit : str
            "TB/s", "TOP/s" or "TFLOP/s".
        limit : float, optional
            Of the device, per second.
        """
        try:
            seconds = measure()
        except Exception as problem:  # the other times are still worth having
            traceback.print_exc(file=sys.stderr)
            failure = f"{type(problem).__name__}: {problem}"
            self.add("time", name, f"FAILED: {failure}", failure=failure)
            return
        rate, share = amount / seconds, amount / seconds / limit if limit else None
        text = f"{seconds * 1e6:10.1f} µs {rate / 1e12:8.2f} {unit}" + (f" {share:6.1%}" if limit else "")
        self.add("time", name, text, seconds=seconds, rate=rate, unit=unit, share=share, failure=None)


def read(path):
    """The records of a file; of one that a crash cut off, those before."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
