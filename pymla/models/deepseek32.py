"""The transformers of DeepSeek-V3.2 and GLM-5: DeepSeek-V3 with sparse attention.

An indexer with few, short heads scores the positions that a token sees, and attention takes the best of them. Its
queries come from the low-rank queries of attention, and its keys, one for a token, are a third kind of rows in the
cache. The stages are those of `pymla.models.deepseek2`, and for tokens that see more positions than are chosen `choose`
and `sparse` instead of `absorbed`.

Layers of GLM-5.2 share choices: one without an indexer takes that of the last layer before it that has one
(``Layer.has_indexer``).

DeepSeek-V3.2-Exp (2025), section 2.1, whose equations are cited; llama.cpp's ``deepseek32.cpp`` and ``glm-dsa.cpp``;
transformers' ``deepseek_v32`` and ``glm_moe_dsa``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pymla.models.deepseek2 import DeepSeek2
from pymla.models.indexer import read_indexer
from pymla.pages import IndexedCache, LatentCache, LayerCache

if TYPE_CHECKING:
    from pymla.backend import Array, MatrixInput
    from pymla.models.metadata import Metadata
    from pymla.models.operations import Operations
    from pymla.models.weights import Layer

#: Added to the variance of the indexer's keys. No file has it as a key.
KEY_EPS = 1e-6


class DeepSeek32(DeepSeek2):
    """The stages in which these models differ from DeepSeek-V3. Attention rotates pairs of neighbours, and the indexer
    those of GLM-5, but pairs of halves in DeepSeek-V3.2."""

    default_scoring_func = "sigmoid"

    @staticmethod
    def own_fields(read: Metadata, fields: dict[str, Any]) -> dict[str, Any]:
        return {"indexer": read_indexer(read, fields)}

    def cache_rows(self, ops: Operations, layer: Layer, cache: LayerCache, h: MatrixInput) -> tuple[Array, ...]:
        """As in DeepSeek-V3, and where the cache keeps them the indexer's keys, (T, D)."""
        rows = super().cache_rows(ops, layer, cache, h)
        return (*rows, self.index_keys(ops, layer, h)) if isinstance(cache, IndexedCache) else rows

    def index_keys(self, ops: Operations, layer: Layer, h: MatrixInput) -> Array:
        """The indexer's keys, (T, D): of all heads, and rotated at the front."""
        k = ops.matmul(layer.indexer_attn_k, h)  # (T, D)
        k = ops.layer_norm(k, layer.indexer_k_norm, layer.indexer_k_norm_bias, KEY_EPS)
        self.rotate_front(ops, k[:, None])
        return k

    def choose(
        self, ops: Operations, layer: Layer, cache: IndexedCache, h: MatrixInput, c_q: MatrixInput, out: Array
    ) -> None:
        """The positions that tokens attend to, equation 1. Writes `out`, (T, k).

        Trained models divide the weights by the root of the indexer's heads times D, and turn queries and keys by a
        Hadamard matrix, which their 8-bit keys need. Neither changes the order of the scores, so both are left out.
        """
        q = ops.matmul(layer.indexer_attn_q_b, c_q)  # (T, H * D)
        q = q.reshape(len(q), len(layer.indexer_proj.data), -1)  # (T, H, D)
        self.rotate_front(ops, q)
        weights = ops.matmul(layer.indexer_proj, h)  # (T, H)
        ops.choose(q, weights, cache.index_keys, out)

    def sparse(
        self,
        ops: Operations,
        layer: Layer,
        cache: LatentCache | IndexedCache,
        q: Array,
        chosen: Array,
        out: Array,
    ) -> None:
        """`absorbed` over the chosen positions (T, k), equation 2. Writes `out`, (T, H, v)."""
        latent_q = ops.absorb(q, layer.attn_k_b)  # (T, H, rank + R)
        latent = ops.sparse(latent_q, cache, chosen)  # (T, H, rank)
        ops.matmul_heads(layer.attn_v_b, latent, out)  # (T, H, v)

    def rotate_front(self, ops: Operations, x: Array) -> None:
        """Rotate the first R numbers of every head of the indexer's queries or keys, (T, H, D), in place."""
        front = x[..., : self.config.qk_rope_head_dim]
        if self.config.indexer and self.config.indexer.interleave:
            ops.rope(front)
        else:
            ops.rope_neox(front)
