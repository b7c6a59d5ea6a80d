"""Import this before Numba: wrong values of Numba's environment variables are an error of one line."""

import os
import warnings

from pymla.errors import PymlaError

try:
    with warnings.catch_warnings():
        # Of a variable that it cannot read, Numba prints a traceback, and goes on without it.
        warnings.filterwarnings("error", "Environment variable", RuntimeWarning)
        import numba  # noqa: F401
except MemoryError:
    raise
except Exception as error:
    _given = " ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
    raise PymlaError(
        f"Numba cannot be imported{_given and ' with ' + _given}: {str(error).partition(chr(10))[0]}"
    ) from error
