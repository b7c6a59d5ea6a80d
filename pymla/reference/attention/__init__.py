"""Multi-head latent attention over a paged cache: the operations and their definition in NumPy.

The cache keeps a row ``c_kv`` (rank numbers) and a row ``k_pe`` (R rotated numbers) for each position, which all heads
share. Keys and values of a head follow from them by two matrices, ``k = [W_k_b c_kv; k_pe]`` and ``v = W_v_b c_kv``.
Attention over them has several forms with the same result:

========================  ======================================================================================
`expanded`                keys and values of every head are computed first (`expand`): cheap where many queries
                          share them, as in a prompt
`absorbed`                ``W_k_b`` is multiplied into the queries instead (`absorb`), and ``W_v_b`` after attention:
                          all heads meet the rows of the cache as they are, as in generation
`absorbed_materialised`   the same with all scores in memory, for comparison with the online softmax
`full`                    the cache holds keys and values of all heads, as in other models, for comparison
`sparse`                  the absorbed form over some positions of each token, which an indexer chooses (`choose`)
========================  ======================================================================================

The token at position p of its sequence sees the positions 0 to p. Rows behind them are never read: they may hold
anything, also NaN. Position p of a sequence lies in slot ``block_table[p // 64] * 64 + p % 64`` (`pymla.pages`).

Shapes use the letters T tokens, H heads, S rows of a sequence, R rotated numbers, nope the numbers of a key that are
not rotated, v the numbers of a value, rank the numbers of ``c_kv``.

DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1 and appendix C.
"""

from pymla.reference.attention.absorbed_form import absorb, absorbed
from pymla.reference.attention.cache_rows import latent_cache, load, store
from pymla.reference.attention.expanded_form import KeysValues as KeysValues
from pymla.reference.attention.expanded_form import expand, expanded, keys_values
from pymla.reference.attention.full_form import full
from pymla.reference.attention.indexer import choose, index_cache
from pymla.reference.attention.materialised_form import absorbed_materialised
from pymla.reference.attention.sparse_form import sparse
from pymla.scratch import HOST

__all__ = [
    "absorb",
    "absorbed",
    "absorbed_materialised",
    "choose",
    "expand",
    "expanded",
    "full",
    "heads_at_once",
    "index_cache",
    "keys_values",
    "latent_cache",
    "load",
    "sparse",
    "store",
]

#: Heads that `expand` takes at a time.
heads_at_once = HOST.heads_at_once
