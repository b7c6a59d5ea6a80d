"""Rotating the keys of a cache that move to other positions.

Attention knows positions by rotations alone: the score of a query at position p and a key at position s depends on
p - s. A key that moves to another position is rotated by the difference, in place. What else a row holds stays as it
is, and so it still knows the tokens that were dropped: through a layer, a row depends on all tokens before it.

``llama_memory_seq_add`` and ``build_graph_shift`` of llama.cpp.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np

from pymla.backend import Array, Backend
from pymla.engine.slices import slices
from pymla.models.config import ModelConfig
from pymla.pages import PAGE, FullCache, IndexedCache, LayerCache, pages_of
from pymla.tensor import QTensor

#: Tokens whose keys are numbers at a time, in whole pages.
_TOKENS_AT_ONCE = 16 * PAGE


class _Keys(NamedTuple):
    """Rows of a cache that hold rotated keys."""

    rows: QTensor
    heads: int
    head_dim: int
    rotated: slice  # numbers of a head
    interleave: bool  # whether pairs are neighbours; otherwise of the two halves


def move_keys(
    config: ModelConfig, backend: Backend, layer: LayerCache, pages: Items[int], tokens: int, inv_freq: Array, by: int
) -> None:
    """Rotate the keys in pages of a layer as if their positions were larger by `by`.

    Parameters
    ----------
    config : ModelConfig
    backend : Backend
        In whose memory the layer's cache lies.
    layer : LayerCache
    pages : sequence of int
        No page twice.
    tokens : int
        Rows of the pages that hold keys: the first ones.
    inv_freq : float64 array (R / 2,)
        Radians per position, in the backend's memory.
    by : int
        May be negative.

    Notes
    -----
    Keys are read as float32 and rounded to their type again. A shift moves a number by no more than rounding it once
    does.
    """
    for part in slices(0, tokens, _TOKENS_AT_ONCE):
        table = np.array(pages[part.start // PAGE : pages_of(part.stop)], np.int32)
        slots = (table[:, None] * PAGE + np.arange(PAGE, dtype=np.int32)).ravel()[: part.stop - part.start]
        positions = backend.memory.to_device(np.full(len(slots), by, np.int32))
        cos_sin = backend.memory.empty((len(slots), len(inv_freq), 2), np.float32)
        backend.rope.angles(positions, inv_freq, 1.0, cos_sin)
        table, slots = backend.memory.to_device(table), backend.memory.to_device(slots)
        for keys in _keys(config, layer):
            x = backend.memory.empty((len(slots), keys.heads * keys.head_dim), np.float32)
            backend.attention.load(keys.rows, table, x)
            rotate = backend.rope.rope_interleaved if keys.interleave else backend.rope.rope_neox
            rotate(x.reshape(len(slots), keys.heads, keys.head_dim)[..., keys.rotated], cos_sin)
            backend.attention.store(x, slots, keys.rows)


def _keys(config: ModelConfig, layer: LayerCache) -> Iterator[_Keys]:
    """The rotated keys of a layer."""
    rotated = config.qk_rope_head_dim
    if isinstance(layer, FullCache):
        last = slice(config.qk_nope_head_dim, config.qk_head_dim)
        yield _Keys(layer.keys, config.num_attention_heads, config.qk_head_dim, last, config.rope_interleave)
        return
    yield _Keys(layer.rope, 1, rotated, slice(0, rotated), config.rope_interleave)
    if isinstance(layer, IndexedCache) and config.indexer:
        yield _Keys(layer.index_keys, 1, config.indexer.head_dim, slice(0, rotated), config.indexer.interleave)
