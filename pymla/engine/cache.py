"""The paged cache: rows of past tokens, in pages of 64, that block tables assign to sequences.

A row belongs to a slot: position p of a sequence lies in slot ``block_table[p // 64] * 64 + p % 64`` of every layer. A
layer keeps the normalised ``c_kv`` (kv_lora_rank values) and the rotated ``k_pe`` (qk_rope_head_dim values), or, for
``--mla 0``, the keys and values of all heads (`pymla.engine.cache_layout`); a layer with an indexer keeps its key as
well. q8_0 takes 34 bytes for 32 values, q6_0 26, q5_0 22 and q4_0 18; ``k_pe`` stays 16-bit then, and an indexer's key
8-bit. Rows are stored as ggml blocks, or in a form that the backend's attention reads faster.

Memory is reserved for the whole cache at once. The host's is taken from the system page by page, when it is first
written; a GPU's is taken at once.

Several sequences may have a page, whose tokens they share: `PagedCache.fork` copies a sequence without its rows, and
`PagedCache.attach` begins one with the pages of an earlier one that were kept (`pymla.engine.prefixes`). A page is
copied before a sequence writes into it if others have it.

Which pages are free follows from the pages that sequences have and those that are kept, and is written down nowhere
else: a sequence that is dropped, freed by another thread or left behind by an interrupt cannot lose a page or give one
back twice. When a step needs more pages than are free, kept pages that no sequence has go first, those that were used
least recently; then the sequences that were used least recently are copied out of the cache, and back into it when they
go on: a sequence never ends early because of another one.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from typing import NamedTuple, TypeAlias

import numpy as np

from pymla import ggml
from pymla.backend import Array, Backend, Memory
from pymla.engine.cache_layout import index_layout, row_layout
from pymla.engine.context_shift import move_keys
from pymla.engine.page_copies import copy_page, read_pages, write_pages
from pymla.engine.page_sets import lowest_pages, page_set
from pymla.engine.prefixes import KeptPages
from pymla.errors import CacheFull, PymlaError
from pymla.models.config import ModelConfig
from pymla.pages import CACHE_TYPES, PAGE, FullCache, IndexedCache, LayerCache, Step, block_rows, pages_of
from pymla.tensor import QTensor


class _Held(NamedTuple):
    """Pages that a sequence has, twice: both forms change together."""

    pages: list[int]
    as_set: int


class Sequence:
    """A text in the cache.

    Attributes
    ----------
    tokens : list of int
        Those whose rows are in the cache.
    saved : list of uint8 array (pages, 64, bytes of a row), or None
        The rows of every layer in the host's memory, while the sequence is out of the cache.
    last_step : int
        Number of the step that used it last.
    shifted_from : int or None
        From this position on, rows know tokens that a context shift dropped (`PagedCache.shift`); None: no rows do.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.saved: list[np.ndarray] | None = None
        self.last_step = 0
        self.shifted_from: int | None = None
        self._held = _Held([], 0)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self.tokens)

    @property
    def own_text(self) -> list[int]:
        """Its first tokens, whose rows are those that these tokens alone give: all of them before a context shift."""
        return self.tokens[: self.shifted_from]

    @property
    def pages(self) -> list[int]:
        """Its pages, in the order of its tokens. An interrupted step may leave more than the tokens need."""
        return self._held.pages

    @pages.setter
    def pages(self, pages: list[int]) -> None:
        self._held = _Held(pages, page_set(pages))

    @property
    def page_set(self) -> int:
        """The set of its pages (`pymla.engine.page_sets`)."""
        return self._held.as_set

    def append_pages(self, pages: list[int]) -> None:
        """Take more pages."""
        self._held = _Held(self.pages + pages, self.page_set | page_set(pages))


#: The input of a step: sequences, and at least one new token for each.
Batch: TypeAlias = "Items[tuple[Sequence, np.ndarray]]"


class _Plan(NamedTuple):
    """What a sequence of a batch has before a step, and needs in it."""

    pages: list[int]  # that it has, or, where its rows are out of the cache, kept ones that hold some of them
    wanted: int  # pages that it needs in all


class PagedCache:
    """Rows of all layers, and who has which pages.

    Parameters
    ----------
    config : ModelConfig
    cache_type : str
        One of `CACHE_TYPES`.
    mla : str
        "0" keeps keys and values of all heads; the others the latent rows.
    pages : int
        Pages of 64 tokens, for all sequences together.
    ctx : int
        The longest sequence.
    backends : sequence of Backend
        In whose memory each layer's rows lie.

    Attributes
    ----------
    exact : bool
        Whether rows hold as many bits as the numbers that are computed from them.
    row_bytes : int
        Of a token, all layers.
    """

    def __init__(
        self, config: ModelConfig, cache_type: str, mla: str, pages: int, ctx: int, backends: Items[Backend]
    ) -> None:
        self.ctx, self.cache_type, self.pages = ctx, cache_type, pages
        self._config, self._backends = config, backends
        # Sequences that have pages, or had some. A `WeakSet` takes ten times as long to go through.
        self._holders: set[weakref.ref[Sequence]] = set()
        self._kept = KeptPages()
        self._steps = 0
        layout, slots = row_layout(config, cache_type, mla), pages * PAGE
        self.layers: list[LayerCache] = []
        for i, backend in enumerate(backends):
            if mla == "0":
                self.layers.append(FullCache(*block_rows(backend.memory, layout, slots)))
                continue
            latent = backend.attention.latent_cache(layout, slots)
            index = index_layout(config, cache_type, i)
            if index is None:
                self.layers.append(latent)
            else:
                self.layers.append(IndexedCache(*latent, backend.attention.index_cache(*index, slots)))
        self.row_bytes = sum(rows.data.nbytes for layer in self.layers for rows in layer) // slots
        self.exact = ggml.BLOCK_SIZE[CACHE_TYPES[cache_type]] == 1

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has and that are not kept."""
        return self.pages - (self._in_use() | self._kept.pages).bit_count()

    @property
    def room(self) -> int:
        """Pages that can be had without taking any from a sequence: free ones, and kept ones that no sequence has."""
        return self.pages - self._in_use().bit_count()

    def pages_needed(self, sequence: Sequence, new_tokens: int) -> int:
        """Pages that `extend` would take from `room` for a sequence: for new tokens, for a copy of a last page that
        others have, and for rows that are out of the cache.

        Of several sequences that share a last page, the last one needs no copy once the others have theirs: the sum
        over a batch may be larger than what the batch takes.
        """
        wanted = pages_of(sequence.length + new_tokens)
        if sequence.saved is not None:
            found = page_set(self._kept.find(sequence.own_text).values())
            return wanted - (found & self._in_use()).bit_count()
        copies = new_tokens > 0 and self._last_page(sequence) & self._shared() != 0
        return wanted - pages_of(sequence.length) + copies

    def extend(self, batch: Batch) -> Step:
        """Find slots for new tokens. Lengths stay as they are until `advance`.

        Parameters
        ----------
        batch : list of (Sequence, int32 array)

        Raises
        ------
        CacheFull
            A sequence would outgrow the context, or the sequences of the batch need more pages than there are. Nothing
            has changed then.
        """
        self._bring_in(batch)
        return self._step(batch)

    @staticmethod
    def advance(batch: Batch) -> None:
        """Count the tokens of a finished step."""
        for sequence, tokens in batch:
            sequence.tokens.extend(np.asarray(tokens).tolist())

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget a sequence's tokens from position `length` on, and give back the pages that only they used."""
        if not length:
            self.free(sequence)
        del sequence.tokens[length:]
        if sequence.shifted_from is not None and sequence.shifted_from >= length:
            sequence.shifted_from = None
        if len(sequence.pages) > pages_of(length):
            sequence.pages = sequence.pages[: pages_of(length)]

    @staticmethod
    def free(sequence: Sequence) -> None:
        """Give a sequence's pages back and empty it. Any thread may do it at any time, and so may the garbage
        collector."""
        sequence.tokens, sequence.pages, sequence.saved, sequence.shifted_from = [], [], None, None

    def fork(self, sequence: Sequence) -> Sequence:
        """A copy of a sequence that shares its pages until one of the two writes into them."""
        copy = Sequence()
        self._register(copy)
        copy.saved, copy.last_step = sequence.saved, sequence.last_step
        copy.tokens, copy.shifted_from = list(sequence.tokens), sequence.shifted_from
        if sequence.saved is None:
            copy.pages = sequence.pages[: pages_of(sequence.length)]
        return copy

    def keep(self, sequence: Sequence) -> None:
        """Keep a sequence's full pages, so that `attach` finds them, also when the sequence has gone on or is freed.
        Those that no sequence has are dropped when their space is needed, the least recently used first. Of a sequence
        whose rows are out of the cache nothing is kept, and nothing behind a context shift."""
        if sequence.saved is not None:
            return  # an interrupted step may have left pages without their rows
        text = sequence.own_text
        self._kept.add(text, sequence.pages[: len(text) // PAGE])

    def attach(self, sequence: Sequence, tokens: Items[int]) -> int:
        """Let an empty sequence begin with the longest kept prefix of a text, in full pages, without the last token.

        Parameters
        ----------
        sequence : Sequence
        tokens : sequence of int
            The text. Logits are wanted after its last token, so that this one is always computed.

        Returns
        -------
        int
            Tokens that the sequence now has: a multiple of 64.

        Raises
        ------
        PymlaError
            The sequence is not empty.
        """
        if sequence.length:
            raise PymlaError(f"attach: the sequence has {sequence.length} tokens; give an empty one")
        found = self._kept.find(tokens[: max(len(tokens) - 1, 0)])
        self._register(sequence)
        sequence.pages, sequence.last_step = list(found.values()), self._steps
        self._kept.use(found)
        sequence.tokens = [int(token) for token in tokens[: len(found) * PAGE]]
        return sequence.length

    def swap_out(self, sequence: Sequence) -> None:
        """Keep a sequence's rows in the host's memory, and give its pages back. `extend` brings them back."""
        if sequence.length:
            sequence.saved = self.rows_of(sequence)
        sequence.pages = []

    def rows_of(self, sequence: Sequence) -> list[np.ndarray]:
        """The rows of a sequence in the host's memory, of every layer and kind: uint8 (pages, 64, bytes of a row), in
        the form that the backend keeps them in."""
        count = pages_of(sequence.length)
        if sequence.saved is not None:
            return [data[:count] for data in sequence.saved]
        return [read_pages(memory, rows, sequence.pages[:count]) for memory, rows in self._rows()]

    def row_types(self) -> list[tuple[int, int]]:
        """The types of the rows of every layer and kind, ggml's or the backend's own, and the bytes of a row."""
        return [(rows.qtype, rows.data.shape[1]) for _, rows in self._rows()]

    def shift(self, sequence: Sequence, start: int, stop: int, inv_freq: Mapping[Backend, Array]) -> None:
        """Context shift: forget the tokens at positions `start` to `stop` - 1. Those behind them move there, and their
        keys are rotated in place; their rows still know the forgotten tokens.

        Pages that others have, or that are kept, stay as they are: the sequence gets copies. If the shift fails or is
        interrupted, the sequence is empty.

        Parameters
        ----------
        sequence : Sequence
        start, stop : int
            Multiples of 64, as rows stay where they are in their pages.
        inv_freq : mapping of backend to float64 array (R / 2,)
            Radians per position, in the memory of each backend.

        Raises
        ------
        PymlaError
            The positions are not those of full pages of the sequence.
        """
        if start % PAGE or stop % PAGE or not 0 <= start < stop <= sequence.length:
            raise PymlaError(
                f"shift: positions {start} to {stop} of {sequence.length} tokens cannot be forgotten; give multiples "
                f"of {PAGE}, the first from 0 on and the second above it, within the sequence"
            )
        try:
            self._bring_in([(sequence, np.empty(0, np.int32))])
            for number in range(stop // PAGE, len(sequence.pages)):
                self._own_page(sequence, number)
            moved = sequence.pages[stop // PAGE :]
            tokens = sequence.length - stop
            for backend, layer in zip(self._backends, self.layers, strict=True):
                move_keys(self._config, backend, layer, moved, tokens, inv_freq[backend], start - stop)
            sequence.pages = sequence.pages[: start // PAGE] + moved
            del sequence.tokens[start:stop]
            if tokens:
                sequence.shifted_from = min(start, len(sequence.own_text))
        except BaseException:
            self.free(sequence)  # some layers may have moved
            raise

    # Who has which pages ----------------------------------------------------------------------------------------------

    def _register(self, sequence: Sequence) -> None:
        """Count a sequence's pages as its own from now on, for as long as it lives."""
        self._holders.add(weakref.ref(sequence, self._holders.discard))

    def _sequences(self) -> Iterator[Sequence]:
        """The sequences that have pages, or had some."""
        for reference in list(self._holders):
            sequence = reference()
            if sequence is not None:
                yield sequence

    def _in_use(self) -> int:
        """The set of pages that sequences have."""
        pages = 0
        for sequence in self._sequences():
            pages |= sequence.page_set
        return pages

    def _shared(self) -> int:
        """The set of pages that several sequences have."""
        pages = several = 0
        for sequence in self._sequences():
            own = sequence.page_set
            several |= pages & own
            pages |= own
        return several

    @staticmethod
    def _last_page(sequence: Sequence) -> int:
        """The set of the page that the next token is written into, if the sequence has it."""
        partly_filled = sequence.saved is None and sequence.length % PAGE
        return 1 << sequence.pages[sequence.length // PAGE] if partly_filled else 0

    def _plan(self, batch: Batch) -> list[_Plan]:
        """What the sequences of a batch have, and need. Raises CacheFull as `extend` does."""
        plans = []
        for sequence, tokens in batch:
            length = sequence.length + len(tokens)
            if length > self.ctx:
                raise CacheFull(
                    f"{length} tokens do not fit the context of {self.ctx}; shorten the prompt or raise `ctx`"
                )
            if sequence.saved is None:
                pages = sequence.pages[: pages_of(sequence.length)]  # an interrupted step may have left more
            else:
                pages = list(self._kept.find(sequence.own_text).values())
            plans.append(_Plan(pages, pages_of(length)))
        needed = self._pages_of_plans(batch, plans)
        if needed > self.pages:
            raise CacheFull(
                f"the sequences of a step need {needed} pages of {PAGE} tokens, and the cache has {self.pages}; "
                "raise `ctx`"
            )
        return plans

    def _pages_of_plans(self, batch: Batch, plans: list[_Plan]) -> int:
        """Pages that the sequences of a batch have in all, once they have what they need."""
        sets = [
            sequence.page_set if sequence.pages == plan.pages else page_set(plan.pages)
            for (sequence, _), plan in zip(batch, plans, strict=True)
        ]
        pages = several = 0
        for own in sets:
            several |= pages & own
            pages |= own
        needed = pages.bit_count() + sum(plan.wanted - len(plan.pages) for plan in plans)
        if not several:
            return needed
        # Each sequence that writes into a page of several gets a copy, but the last one that has it.
        writers = Counter(self._last_page(sequence) for sequence, _ in batch)
        for page, count in writers.items():
            if page & several:
                needed += min(count, sum(own & page != 0 for own in sets) - 1)
        return needed

    def _bring_in(self, batch: Batch) -> None:
        """Give the sequences of a batch the pages that they need, with their rows. Raises as `extend` does."""
        plans = self._plan(batch)
        self._steps += 1
        for (sequence, _), plan in zip(batch, plans, strict=True):
            sequence.last_step = self._steps  # its pages are not taken for this step
            self._register(sequence)
            if sequence.pages != plan.pages:
                sequence.pages = plan.pages
        self._own_last_pages([sequence for sequence, _ in batch])
        missing = sum(plan.wanted - len(plan.pages) for plan in plans)
        new = self._take(missing) if missing else []
        for (sequence, _), plan in zip(batch, plans, strict=True):
            count = plan.wanted - len(plan.pages)
            if count:
                sequence.append_pages(new[:count])
                new = new[count:]
            if sequence.saved is not None:
                self._copy_in(sequence, sequence.saved, len(plan.pages))

    def _own_last_pages(self, sequences: Items[Sequence]) -> None:
        """Copy pages that others have and that sequences will write into."""
        others = self._shared() | self._kept.pages
        for sequence in sequences if others else ():
            if self._last_page(sequence) & others:
                self._own_page(sequence, len(sequence.pages) - 1)
                others = self._shared() | self._kept.pages

    def _own_page(self, sequence: Sequence, number: int) -> None:
        """Let a sequence have one of its pages for itself: a copy, if others have it or it is kept."""
        page = sequence.pages[number]
        while (is_shared := self._shared() >> page & 1) or self._kept.pages >> page & 1:
            if self.room:
                (copy,) = self._take(1)
                for memory, rows in self._rows():
                    copy_page(memory, rows, page, copy)
                sequence.pages = [*sequence.pages[:number], copy, *sequence.pages[number + 1 :]]
                return
            if is_shared:
                self._swap_out_oldest()
            else:
                self._kept.drop(page)

    def _take(self, count: int) -> list[int]:
        """The numbers of `count` free pages. Where too few are free, kept pages go, and other sequences give up
        theirs."""
        while True:
            in_use = self._in_use()
            free = ((1 << self.pages) - 1) & ~(in_use | self._kept.pages)
            missing = count - free.bit_count()
            if missing <= 0:
                return lowest_pages(free, count)
            if not self._kept.evict(missing, in_use):
                self._swap_out_oldest()

    def _swap_out_oldest(self) -> None:
        """Let the sequence that was used least recently give up its pages."""
        others = [each for each in self._sequences() if each.pages and each.last_step < self._steps]
        self.swap_out(min(others, key=lambda each: each.last_step))

    # Rows and slots ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _step(batch: Batch) -> Step:
        """The input of a step for sequences that have the pages for it."""
        tables = np.zeros((len(batch), max(len(s.pages) for s, _ in batch)), np.int32)
        for b, (sequence, _) in enumerate(batch):
            tables[b, : len(sequence.pages)] = sequence.pages
        return Step.at([s.length for s, _ in batch], [tokens for _, tokens in batch], tables)

    def _copy_in(self, sequence: Sequence, saved: list[np.ndarray], present: int) -> None:
        """Write the rows that `swap_out` kept into the pages that the sequence has now; the first `present` pages have
        theirs."""
        pages = sequence.pages[present : pages_of(sequence.length)]
        for (memory, rows), data in zip(self._rows(), saved, strict=True):
            write_pages(memory, rows, pages, data[present : present + len(pages)])
        sequence.saved = None

    def _rows(self) -> Iterator[tuple[Memory, QTensor]]:
        """The rows of every layer, with the memory that they lie in."""
        for backend, layer in zip(self._backends, self.layers, strict=True):
            for rows in layer:
                yield backend.memory, rows
