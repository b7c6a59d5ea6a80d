"""Reading in a thread, beside the work on what was read before."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

#: Items that are read and not yet worked on.
AHEAD = 2

_END = object()


def read_ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """The items of an iterable, in order, of which the next ones are made in a thread meanwhile.

    What the iterable raises is raised here when its turn comes. Where the system allows no further thread, items are
    made when they are asked for. Close the iterator where it is not used up (`contextlib.closing`): the thread ends
    with the item that it is making.
    """
    iterator = iter(items)
    thread = ThreadPoolExecutor(1, "pymla-read-ahead")
    try:
        try:
            waiting = deque(thread.submit(next, iterator, _END) for _ in range(AHEAD))
        except RuntimeError:  # a limit on processes
            yield from iterator
            return
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(next, iterator, _END))
            yield item  # type: ignore[misc]
    finally:
        thread.shutdown(cancel_futures=True)
