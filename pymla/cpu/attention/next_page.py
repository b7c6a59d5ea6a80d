"""The next page of the cache, prefetched while this one is computed."""

from typing import NamedTuple

from pymla.cpu.machine.simd import address, prefetch_l2
from pymla.cpu.runtime.jit import helper
from pymla.pages import PAGE

#: Bytes of a cache line.
LINE = 64


class NextPage(NamedTuple):
    """Where the next page lies. It is prefetched a few lines at a time, as a core has some sixteen requests under way
    at most."""

    latent: int  # address
    latent_lines: int
    rope: int  # address
    rope_lines: int


@helper
def next_page(latent, rope, page):
    """The page with a number. A page has 64 rows and a line 64 bytes, so it has as many lines as a row has bytes."""
    latent_rows, rope_rows = address(latent.data[page * PAGE]), address(rope.data[page * PAGE])
    return NextPage(latent_rows, latent.data.shape[1], rope_rows, rope.data.shape[1])


@helper
def prefetch_lines(page, first, stop):
    """Prefetch lines `first` to `stop` - 1 of a page. The lines of the latent rows come before those of the rotated
    dimensions."""
    count = page.latent_lines
    for i in range(first, min(stop, count)):
        prefetch_l2(page.latent + LINE * i)
    for i in range(max(first, count), stop):
        prefetch_l2(page.rope + LINE * (i - count))
