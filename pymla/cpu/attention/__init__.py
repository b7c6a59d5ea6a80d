"""Multi-head latent attention over a paged cache: the operations of `pymla.reference.attention`, compiled.

All forms run over the cache a page of 64 positions at a time with an online softmax (`softmax`). Positions behind a
query are never read.

======================  ================================================================================
`absorbed_form`         over the latent rows; `absorbed_form_int8` over rows of 4 to 8 bits
`materialised_form`     the same with all scores in memory
`expanded_form`         over keys and values of every head; `expanded_form_int8` over panels of codes
`full_form`             over a cache of whole keys and values
`sparse_form`           `absorbed_form` over chosen positions
`indexer`               the choice of positions; its scores are made by `index_scores`, over keys of 8 bits by
                        `index_scores_int8`, and the largest are found by `largest`
`cache_rows`            rows into the cache, and back
`kernels`               the kernels that each form launches
======================  ================================================================================

What the forms share: `splits` (split-kv and combine), `query_blocks` (queries of a head that share keys and values),
`codes` (numbers as codes of 8 and 16 bits), `hadamard` (numbers mixed before they become codes), `score_tiles`,
`value_tiles` and `index_tiles` (products of codes in registers).

>>> import numpy as np
>>> from pymla.cpu import attention
>>> q, keys, values = (np.ones((5, 2, size), np.float32) for size in (48, 48, 32))
>>> positions = np.arange(5, dtype=np.int32)
>>> out = np.empty((5, 2, 32), np.float32)
>>> attention.expanded(q, attention.KeysValues(keys, values), positions, 48**-0.5, out)[4, 1, :3].tolist()
[1.0, 1.0, 1.0]
"""

from pymla.cpu.attention.absorbed_form import absorb, absorbed
from pymla.cpu.attention.cache_rows import latent_cache, load, store
from pymla.cpu.attention.expanded_form import KeysValues as KeysValues
from pymla.cpu.attention.expanded_form import expand, expanded, keys_values
from pymla.cpu.attention.full_form import full
from pymla.cpu.attention.indexer import choose, index_cache
from pymla.cpu.attention.kernels import (
    absorbed_kernels,
    choose_kernels,
    expanded_kernels,
    full_kernels,
    sparse_kernels,
)
from pymla.cpu.attention.materialised_form import absorbed_materialised
from pymla.cpu.attention.sparse_form import sparse
from pymla.scratch import HOST

__all__ = [
    "absorb",
    "absorbed",
    "absorbed_kernels",
    "absorbed_materialised",
    "choose",
    "choose_kernels",
    "expand",
    "expanded",
    "expanded_kernels",
    "full",
    "full_kernels",
    "heads_at_once",
    "index_cache",
    "keys_values",
    "latent_cache",
    "load",
    "sparse",
    "sparse_kernels",
    "store",
]

#: Heads that `expand` takes at a time.
heads_at_once = HOST.heads_at_once
