"""The paged cache: rows of past tokens, in pages of 64, that block tables assign to sequences.

A row belongs to a slot: position p of a sequence lies in slot ``block_table[p // 64] * 64 + p % 64`` of every layer. A
layer keeps the normalised ``c_kv`` (kv_lora_rank values) and the rotated ``k_pe`` (qk_rope_head_dim values), or, for
``--mla 0``, the keys and values of all heads. q8_0 takes 34 bytes for 32 values; ``k_pe`` stays 16-bit then. Rows are
stored as ggml blocks, or as the backend's attention likes them best.

Memory is reserved for the whole cache at once. The host's is taken from the system page by page, when it is first
written; a GPU's is taken at once.

Which pages are free follows from the pages that sequences hold, and is written down nowhere else: a sequence that is
dropped, freed by another thread or left behind by an interrupt cannot lose a page or give one back twice. When a step
needs more pages than are free, the sequences that were used least recently are copied out of the cache, and back into
it when they go on: a sequence never ends early because of another one.
"""

import weakref

import numpy as np

from pymla import ggml
from pymla.errors import CacheFull, PymlaError
from pymla.pages import CACHE_TYPES, PAGE, FullCache, Step, block_rows


class Sequence:
    """A text in the cache."""

    def __init__(self):
        self.length = 0  # tokens in the cache
        self.pages = []
        self.saved = None  # its rows in the host's memory, while other sequences have its pages
        self.last_step = 0  # number of the step that used it last


def row_layout(config, cache_type, mla):
    """Names, ggml types and widths of the two kinds of rows of a layer.

    Raises
    ------
    PymlaError
        The type is unknown, or its blocks of 32 do not fit the model's sizes.
    """
    if cache_type not in CACHE_TYPES:
        raise PymlaError(f"unknown cache type {cache_type!r}; choose {', '.join(CACHE_TYPES)}")
    qtype = CACHE_TYPES[cache_type]
    if mla == "0":
        heads = config.num_attention_heads
        layout = (
            ("qk_head_dim", qtype, config.qk_head_dim, heads * config.qk_head_dim),
            ("v_head_dim", qtype, config.v_head_dim, heads * config.v_head_dim),
        )
    else:
        rope_type = ggml.F16 if qtype == ggml.Q8_0 else qtype
        layout = (
            ("kv_lora_rank", qtype, config.kv_lora_rank, config.kv_lora_rank),
            ("qk_rope_head_dim", rope_type, config.qk_rope_head_dim, config.qk_rope_head_dim),
        )
    for name, each, size, _ in layout:
        if size % ggml.BLOCK_SIZE[each]:
            raise PymlaError(f"cache type {cache_type} needs a {name} that 32 divides, and it is {size}; choose f16")
    return [(each, width) for _, each, _, width in layout]


def row_bytes(config, cache_type, mla):
    """Bytes of a token in the cache, all layers, as ggml blocks."""
    layout = row_layout(config, cache_type, mla)
    return sum(ggml.row_bytes(qtype, width) for qtype, width in layout) * config.num_hidden_layers


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
    backends : sequence of modules
        In whose memory each layer's rows lie.
    """

    def __init__(self, config, cache_type, mla, pages, ctx, backends):
        self.ctx, self.cache_type, self.pages = ctx, cache_type, pages
        self._memories = [backend.memory for backend in backends]
        self._holders = weakref.WeakSet()  # sequences that have pages, or had some
        self._steps = 0
        layout, slots = row_layout(config, cache_type, mla), pages * PAGE
        if mla == "0":
            self.layers = [FullCache(*block_rows(backend.memory, layout, slots)) for backend in backends]
        else:
            self.layers = [backend.attention.latent_cache(layout, slots) for backend in backends]
        self.row_bytes = sum(rows.data.nbytes for layer in self.layers for rows in layer) // slots
        #: Whether rows hold as many bits as what is computed from them.
        self.exact = CACHE_TYPES[cache_type] not in ggml.QUANTISED

    @property
    def free_pages(self):
        """Pages that no sequence holds."""
        return self.pages - sum(len(sequence.pages) for sequence in self._holders)

    def extend(self, batch):
        """Find slots for new tokens. Lengths stay as they are until `advance`.

        Parameters
        ----------
        batch : list of (Sequence, int32 array)

        Returns
        -------
        Step

        Raises
        ------
        CacheFull
            A sequence would outgrow the context, or the sequences of the batch need more pages than there are. Nothing
            has changed then.
        """
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
    def advance(batch):
        """Count the tokens of a finished step."""
        for sequence, tokens in batch:
            sequence.length += len(tokens)

    def truncate(self, sequence, length):
        """Forget a sequence's tokens from position `length` on, and give back the pages that only they used."""
        sequence.length = length
        sequence.pages = sequence.pages[: -(-length // PAGE)]

    @staticmethod
    def free(sequence):
        """Give a sequence's pages back and empty it. Any thread may do it at any time, a garbage collector's, too."""
        sequence.length, sequence.pages, sequence.saved = 0, [], None

    def _hold(self, sequence, count):
        """Let a sequence hold `count` pages, with its rows in them."""
        if sequence.saved is not None:
            sequence.pages = []  # what an interrupted copy left
        missing = count - len(sequence.pages)
        if missing > 0:
            sequence.pages = sequence.pages + self._take(missing)
            self._holders.add(sequence)
        if sequence.saved is not None:
            self._copy_in(sequence)

    def _take(self, count):
        """The numbers of `count` free pages, once so many are free."""
        while self.free_pages < count:
            others = [each for each in self._holders if each.pages and each.last_step < self._steps]
            self._copy_out(min(others, key=lambda each: each.last_step))
        held = {page for sequence in self._holders for page in sequence.pages}
        return [page for page in range(self.pages) if page not in held][:count]

    def _copy_out(self, sequence):
        """Keep a sequence's rows in the host's memory, and give its pages back."""
        pages = sequence.pages[: -(-sequence.length // PAGE)]
        sequence.saved = [
            np.stack([memory.to_host(rows.data[page * PAGE : (page + 1) * PAGE]) for page in pages]) if pages else None
            for memory, rows in self._rows()
        ]
        sequence.pages = []

    def _copy_in(self, sequence):
        """Write the rows that `_copy_out` kept into the pages that the sequence has now."""
        kept = -(-sequence.length // PAGE)
        for (memory, rows), saved in zip(self._rows(), sequence.saved, strict=True):
            for page, data in zip(sequence.pages[:kept], () if saved is None else saved, strict=False):
                memory.write(rows.data[page * PAGE : (page + 1) * PAGE], data)
        sequence.saved = None

    def _rows(self):
        """The rows of every layer, with the memory that they lie in."""
        for memory, layer in zip(self._memories, self.layers, strict=True):
            for rows in layer:
                yield memory, rows
