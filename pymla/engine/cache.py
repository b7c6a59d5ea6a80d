"""The paged cache: rows of past tokens, in pages of 64, that block tables assign to sequences.

A row belongs to a slot: position p of a sequence lies in slot ``block_table[p // 64] * 64 + p % 64`` of every layer. A
layer keeps the normalised ``c_kv`` (kv_lora_rank values) and the rotated ``k_pe`` (qk_rope_head_dim values), or, for
``--mla 0``, the keys and values of all heads (`pymla.engine.cache_layout`); a layer with an indexer keeps its key as
well. q8_0 takes 34 bytes for 32 values, q6_0 26, q5_0 22 and q4_0 18; ``k_pe`` stays 16-bit then, and an indexer's key
8-bit. Rows are stored as ggml blocks, or in a form that the backend's attention reads faster.

Memory is reserved for the whole cache at once. The host's is taken from the system page by page, when it is first
written; a GPU's is taken at once.

Which pages are free follows from the pages that sequences hold, and is written down nowhere else: a sequence that is
dropped, freed by another thread or left behind by an interrupt cannot lose a page or give one back twice. When a step
needs more pages than are free, the sequences that were used least recently are copied out of the cache, and back into
it when they go on: a sequence never ends early because of another one.
"""

import weakref
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import TypeAlias

import numpy as np

from pymla import ggml
from pymla.backend import Backend, Memory
from pymla.engine.cache_layout import index_layout, row_layout
from pymla.errors import CacheFull
from pymla.models.config import ModelConfig
from pymla.pages import CACHE_TYPES, PAGE, FullCache, IndexedCache, LayerCache, Step, block_rows
from pymla.tensor import QTensor


class Sequence:
    """A text in the cache."""

    def __init__(self) -> None:
        self.length = 0  # tokens in the cache
        self.pages: list[int] = []
        #: Its rows in the host's memory, while other sequences have its pages; None for layers without any.
        self.saved: list[np.ndarray | None] | None = None
        self.last_step = 0  # number of the step that used it last


#: The input of a step: sequences, and at least one new token for each.
Batch: TypeAlias = "Items[tuple[Sequence, np.ndarray]]"


class PagedCache:
    """Rows of all layers, and the pages that are free.

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
        self._memories = [backend.memory for backend in backends]
        # Sequences that have pages, or had some.
        self._holders: weakref.WeakSet[Sequence] = weakref.WeakSet()
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
        """Pages that no sequence holds."""
        return self.pages - sum(len(sequence.pages) for sequence in self._holders)

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
        wanted = self._wanted_pages(batch)
        self._steps += 1
        for (sequence, _), count in zip(batch, wanted, strict=True):
            sequence.last_step = self._steps  # its pages are not taken for this step
            sequence.pages = sequence.pages[:count]  # an interrupted step may have left more
        for (sequence, _), count in zip(batch, wanted, strict=True):
            self._hold(sequence, count)
        tables = np.zeros((len(batch), max(len(s.pages) for s, _ in batch)), np.int32)
        for b, (sequence, _) in enumerate(batch):
            tables[b, : len(sequence.pages)] = sequence.pages
        tokens = np.concatenate([np.asarray(tokens, np.int32) for _, tokens in batch])
        positions = np.concatenate([np.arange(s.length, s.length + len(t), dtype=np.int32) for s, t in batch])
        seq_of = np.repeat(np.arange(len(batch), dtype=np.int32), [len(t) for _, t in batch])
        slots = tables[seq_of, positions // PAGE] * PAGE + positions % PAGE
        return Step(tokens, positions, seq_of, slots.astype(np.int32), tables)

    @staticmethod
    def advance(batch: Batch) -> None:
        """Count the tokens of a finished step."""
        for sequence, tokens in batch:
            sequence.length += len(tokens)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget a sequence's tokens from position `length` on, and give back the pages that only they used."""
        sequence.length = length
        sequence.pages = sequence.pages[: -(-length // PAGE)]

    @staticmethod
    def free(sequence: Sequence) -> None:
        """Give a sequence's pages back and empty it. Any thread may do it at any time, and so may the garbage
        collector."""
        sequence.length, sequence.pages, sequence.saved = 0, [], None

    def _wanted_pages(self, batch: Batch) -> list[int]:
        """Pages that each sequence needs once it has the new tokens."""
        wanted = []
        for sequence, tokens in batch:
            length = sequence.length + len(tokens)
            if length > self.ctx:
                raise CacheFull(
                    f"{length} tokens do not fit the context of {self.ctx}; shorten the prompt or raise `ctx`"
                )
            wanted.append(-(-length // PAGE))
        if sum(wanted) > self.pages:
            raise CacheFull(
                f"the sequences of a step need {sum(wanted)} pages of {PAGE} tokens, and the cache has {self.pages}; "
                "raise `ctx`"
            )
        return wanted

    def _hold(self, sequence: Sequence, count: int) -> None:
        """Let a sequence hold `count` pages, with its rows in them."""
        if sequence.saved is not None:
            sequence.pages = []  # pages that an interrupted copy left
        missing = count - len(sequence.pages)
        if missing > 0:
            sequence.pages = sequence.pages + self._take(missing)
            self._holders.add(sequence)
        if sequence.saved is not None:
            self._copy_in(sequence, sequence.saved)

    def _take(self, count: int) -> list[int]:
        """The numbers of `count` free pages, which other sequences give up where too few are free."""
        while self.free_pages < count:
            others = [each for each in self._holders if each.pages and each.last_step < self._steps]
            self._copy_out(min(others, key=lambda each: each.last_step))
        held = {page for sequence in self._holders for page in sequence.pages}
        return [page for page in range(self.pages) if page not in held][:count]

    def _copy_out(self, sequence: Sequence) -> None:
        """Keep a sequence's rows in the host's memory, and give its pages back."""
        pages = sequence.pages[: -(-sequence.length // PAGE)]
        sequence.saved = [
            np.stack([memory.to_host(rows.data[page * PAGE : (page + 1) * PAGE]) for page in pages]) if pages else None
            for memory, rows in self._rows()
        ]
        sequence.pages = []

    def _copy_in(self, sequence: Sequence, saved: list[np.ndarray | None]) -> None:
        """Write the rows that `_copy_out` kept into the pages that the sequence has now."""
        kept = -(-sequence.length // PAGE)
        for (memory, rows), pages in zip(self._rows(), saved, strict=True):
            for page, data in zip(sequence.pages[:kept], () if pages is None else pages, strict=False):
                memory.write(rows.data[page * PAGE : (page + 1) * PAGE], data)
        sequence.saved = None

    def _rows(self) -> Iterator[tuple[Memory, QTensor]]:
        """The rows of every layer, with the memory that they lie in."""
        for memory, layer in zip(self._memories, self.layers, strict=True):
            for rows in layer:
                yield memory, rows
