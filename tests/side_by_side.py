"""Processes of tests that run beside each other: each of them keeps one core busy."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from pymla.host.cores import usable_cores


@contextlib.contextmanager
def started(request: pytest.FixtureRequest, test: str, run: Callable[[Any], Any]) -> Iterator[dict[Any, Future]]:
    """``run(value)`` for every value of the parameter of a test, of those values that were selected: futures by value.

    Parameters
    ----------
    request : of a fixture with the scope of the test's module
    test : str
        Name of a function with one parameter.
    run : callable(value)
        Waits for a process.
    """
    items = [item for item in request.session.items if getattr(item, "originalname", None) == test]
    values = [value for item in items for value in item.callspec.params.values()]
    with ThreadPoolExecutor(usable_cores()) as pool:
        try:
            yield {value: pool.submit(run, value) for value in values}
        finally:
            pool.shutdown(cancel_futures=True)
