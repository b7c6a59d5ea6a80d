"""Kept pages: full pages that stay in the cache when no sequence has them, found again by their tokens.

A row of the cache depends on its token and on all tokens before it. So a page is found by a digest of its 64 tokens and
of the digest of the page before it: equal digests mean equal texts up to the end of the page. Digests are
cryptographic, as nobody may choose a text that is taken for another one.
"""

import hashlib
from collections.abc import Iterator
from collections.abc import Sequence as Items

import numpy as np

from pymla.engine.page_sets import page_set
from pymla.pages import PAGE


def page_digests(tokens: Items[int]) -> Iterator[bytes]:
    """For every full page of a text, the digest of its tokens and of all tokens before them."""
    ids, digest = np.asarray(tokens, np.int32), b""
    for start in range(0, len(ids) // PAGE * PAGE, PAGE):
        digest = hashlib.blake2b(digest + ids[start : start + PAGE].tobytes(), digest_size=16).digest()
        yield digest


class KeptPages:
    """The index of kept pages.

    An interrupt at any moment leaves it consistent: which pages are kept follows from the entries alone.
    """

    def __init__(self) -> None:
        self._entries: dict[bytes, int] = {}  # pages by digest, the least recently used first
        self._pages: int | None = 0  # the set of `_entries`; None while these change

    @property
    def pages(self) -> int:
        """The set of all kept pages (`pymla.engine.page_sets`)."""
        if self._pages is None:
            self._pages = page_set(self._entries.values())
        return self._pages

    def find(self, tokens: Items[int]) -> dict[bytes, int]:
        """The longest kept prefix of a text in full pages: these, by digest, in the order of the text."""
        found: dict[bytes, int] = {}
        for digest in page_digests(tokens):
            page = self._entries.get(digest)
            if page is None:
                break
            found[digest] = page
        return found

    def add(self, tokens: Items[int], pages: Items[int]) -> None:
        """Keep the first pages of a text. Where an equal page is kept already, that one stays."""
        digests = page_digests(tokens[: len(pages) * PAGE])
        self.use({digest: self._entries.get(digest, page) for digest, page in zip(digests, pages, strict=True)})

    def use(self, entries: dict[bytes, int]) -> None:
        """Keep pages as the most recently used ones. The first page of a text becomes the most recent of all: without
        it, those behind it cannot be found."""
        pages, self._pages = self.pages | page_set(entries.values()), None
        for digest, page in reversed(entries.items()):
            self._entries.pop(digest, None)
            self._entries[digest] = page
        self._pages = pages

    def drop(self, page: int) -> None:
        """Keep a page no longer."""
        pages, self._pages = self.pages & ~(1 << page), None
        for digest in [digest for digest, each in self._entries.items() if each == page]:
            del self._entries[digest]
        self._pages = pages

    def evict(self, count: int, in_use: int) -> bool:
        """Drop the `count` least recently used pages, or fewer where there are no more, of those that no sequence has.

        Parameters
        ----------
        count : int
        in_use : int
            The set of pages that sequences have. Those that are passed on the way become the most recently used ones,
            so that the next call does not pass them again.

        Returns
        -------
        bool
            Whether any page was dropped.
        """
        pages = self.pages
        if not pages & ~in_use:
            return False
        passed: dict[bytes, int] = {}
        evicted: dict[bytes, int] = {}
        for digest, page in self._entries.items():
            if len(evicted) == count:
                break
            (passed if in_use >> page & 1 else evicted)[digest] = page
        self._pages = None
        for digest in evicted:
            del self._entries[digest]
        for digest in passed:
            self._entries[digest] = self._entries.pop(digest)
        self._pages = pages & ~page_set(evicted.values())
        return True
