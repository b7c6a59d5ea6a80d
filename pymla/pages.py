"""The paged cache as kernels know it, and the step that they work on: facts that the engine and all backends share.

A row belongs to a slot: position p of a sequence lies in slot ``block_table[p // 64] * 64 + p % 64`` of every layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from pymla import ggml
from pymla.tensor import QTensor

if TYPE_CHECKING:
    from pymla.backend import Array, Backend, Memory

#: Slots of a page.
PAGE = 64


def pages_of(tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // PAGE)


#: Cache types and the ggml type of their rows.
CACHE_TYPES = {
    "f32": ggml.F32,
    "f16": ggml.F16,
    "bf16": ggml.BF16,
    "q8_0": ggml.Q8_0,
    "q6_0": ggml.ID["Q6_0"],
    "q5_0": ggml.ID["Q5_0"],
    "q4_0": ggml.ID["Q4_0"],
}

#: ggml types of an indexer's keys; with any other type of latent rows they are Q8_0.
INDEX_TYPES = (ggml.F32, ggml.F16, ggml.BF16, ggml.Q8_0)

#: Types whose rows, those of ``c_kv`` alone, are mixed before they are rounded. Every 32 numbers x, a block, are stored
#: as ``H x / 4`` and read as ``H y / 8``, where H is the Hadamard matrix of 32 rows of 1 and -1: ``H H / 32`` is the
#: unit matrix, and a number that is much larger than the others makes no other number coarse.
HADAMARD_TYPES = tuple(CACHE_TYPES[name] for name in ("q6_0", "q5_0", "q4_0"))
#: Numbers that are mixed, and the factors of those that are stored, and of those that are read.
MIXED, STORED, READ = 32, 1 / 4, 1 / 8


class LatentCache(NamedTuple):
    """A layer's cache: slots × kv_lora_rank and slots × qk_rope_head_dim."""

    latent: QTensor
    rope: QTensor


class IndexedCache(NamedTuple):
    """A layer's cache where it chooses the positions to attend to: latent rows, and the indexer's keys, slots × D."""

    latent: QTensor
    rope: QTensor
    index_keys: QTensor


class FullCache(NamedTuple):
    """A layer's cache for ``--mla 0``: slots × H * qk_head_dim and slots × H * v_head_dim."""

    keys: QTensor
    values: QTensor


#: A layer's cache.
LayerCache: TypeAlias = LatentCache | IndexedCache | FullCache


class Step(NamedTuple):
    """The input of a forward pass: T tokens of B sequences, where the tokens of a sequence are neighbours.

    Its arrays are NumPy's, or lie in the memory of a backend.
    """

    tokens: np.ndarray  # int32 (T,)
    positions: np.ndarray  # int32 (T,)
    seq_of: np.ndarray  # int32 (T,): row of block_tables
    slots: np.ndarray  # int32 (T,): of the token's rows in the cache
    block_tables: np.ndarray  # int32 (B, pages)

    @classmethod
    def at(cls, starts: Sequence[int], tokens: Sequence[np.ndarray | Sequence[int]], tables: np.ndarray) -> Step:
        """The step of neighbouring tokens of each sequence, from given positions on.

        Parameters
        ----------
        starts : B of int
        tokens : B of int array
        tables : int32 array (B, pages)
        """
        counts = [len(each) for each in tokens]
        of_step = np.concatenate(tokens).astype(np.int32)
        seq_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        # A token's number in the step, less that of its sequence's first one, plus this one's position.
        first = np.array(starts) - (np.cumsum(counts) - counts)
        positions = np.arange(len(of_step), dtype=np.int32) + first[seq_of].astype(np.int32)
        slots = tables[seq_of, positions // PAGE] * PAGE + positions % PAGE
        return cls(of_step, positions, seq_of, slots.astype(np.int32), tables)

    def part(self, start: int, stop: int) -> Step:
        """The step of some of the tokens."""
        of_tokens = (array[start:stop] for array in (self.tokens, self.positions, self.seq_of, self.slots))
        return Step._make((*of_tokens, self.block_tables))

    def packed(self, pages: int | None = None) -> np.ndarray:
        """All arrays in one, so that a single copy brings them to a device: int32 (4 T + B pages,).

        Parameters
        ----------
        pages : int, optional
            Columns of the block tables, at least as many as they have.
        """
        tokens, (sequences, width) = len(self.tokens), self.block_tables.shape
        result = np.zeros(4 * tokens + sequences * (pages or width), np.int32)
        for target, source in zip(Step.unpacked(result, tokens, sequences), self, strict=True):
            target[..., : source.shape[-1]] = source
        return result

    @classmethod
    def unpacked(cls, packed: Array, tokens: int, sequences: int) -> Step:
        """The step of a `packed` array, whose numbers of tokens and sequences are given, as views."""
        of_tokens, tables = packed[: 4 * tokens].reshape(4, tokens), packed[4 * tokens :].reshape(sequences, -1)
        return cls._make((*(of_tokens[i] for i in range(4)), tables))

    def on(self, backend: Backend) -> Step:
        """The step in the memory of a backend."""
        return Step.unpacked(backend.memory.to_device(self.packed()), len(self.tokens), len(self.block_tables))


def block_rows(memory: Memory, layout: Iterable[tuple[int, int]], slots: int) -> list[QTensor]:
    """Rows of ggml blocks in the memory of a backend: a QTensor for each type and width of a layout."""
    shapes = [(qtype, (slots, ggml.row_bytes(qtype, width))) for qtype, width in layout]
    return [QTensor(qtype, memory.empty(shape, np.uint8)) for qtype, shape in shapes]
