"""The operations that families of models are written in.

A family (`pymla.models.deepseek2`) is a sequence of operations; `Operations` binds them to a backend, to some tokens of
a step, and to memory for the results. All families share this class, and it knows none of them.
"""

from typing import Any, NamedTuple

import numpy as np

from pymla.backend import Array, Backend, KeysValues, MatrixInput
from pymla.models.config import ModelConfig
from pymla.models.placement import moved, moved_input
from pymla.models.weights import Swiglu
from pymla.pages import IndexedCache, LatentCache, Step
from pymla.tensor import QTensor


class Operations(NamedTuple):
    """The operations of a backend on T tokens of a step.

    An operation takes new memory for its result where the caller gives none. It knows the tokens: their positions,
    their slots in the cache, and the pages of their sequences.
    """

    backend: Backend
    experts_backend: Backend  # of the layer's routed experts
    config: ModelConfig
    step: Step  # its arrays are in the backend's memory
    cos_sin: Array  # float (T, R / 2, 2)
    dtype: Any  # of intermediate results
    materialised: bool  # whether absorbed attention keeps the scores of all positions (``--mla 2``)
    kept: dict  # the memory for expanded keys and values, under its sizes; `part` shares it

    @classmethod
    def of(
        cls, backend: Backend, config: ModelConfig, step: Step, inv_freq: Array, dtype: Any, materialised: bool
    ) -> "Operations":
        """The operations on all tokens of a step, which lies in the backend's memory as `inv_freq` does."""
        cos_sin = backend.memory.empty((len(step.positions), len(inv_freq), 2), dtype)
        backend.rope.angles(step.positions, inv_freq, config.rope_magnitude, cos_sin)
        return cls(backend, backend, config, step, cos_sin, dtype, materialised, {})

    def part(self, start: int, stop: int) -> "Operations":
        """The operations on some of the tokens."""
        return self._replace(step=self.step.part(start, stop), cos_sin=self.cos_sin[start:stop])

    def with_experts_on(self, backend: Backend) -> "Operations":
        """The operations of a layer whose routed experts are on another backend, or on the same."""
        return self._replace(experts_backend=backend)

    def empty(self, *shape: int) -> Array:
        """Memory for an intermediate result."""
        return self.backend.memory.empty(shape, self.dtype)

    # Matrices and norms -----------------------------------------------------------------------------------------------

    def embedding_rows(self, w: QTensor, scale: float = 1.0) -> Array:
        """The tokens' rows of the embedding matrix, (T, hidden), times `scale`."""
        out = self.empty(len(self.step.tokens), self.config.hidden_size)
        return self.backend.quant.embedding_rows(w, self.step.tokens, scale, out)

    def activation(self, x: Array) -> MatrixInput:
        """Rows (T, K) as the input of matrices."""
        return self.backend.quant.Activation(x)

    def matmul(self, w: QTensor, h: MatrixInput) -> Array:
        """``h @ W.T``, (T, N)."""
        return self.backend.quant.matmul(w, h, self.empty(len(h.x), len(w.data)))

    def matmul_heads(self, w: QTensor, x: Array, out: Array) -> Array:
        """A matrix for each head: (T, H, K) to `out` (T, H, N)."""
        return self.backend.quant.matmul_heads(w, x, out)

    def rms_norm(self, x: Array, weight: Array, out: Array | None = None) -> Array:
        """Normalised rows, (T, K); `out` may be columns of a wider array."""
        out = self.empty(*x.shape) if out is None else out
        return self.backend.norm.rms_norm(x, weight, self.config.rms_norm_eps, out)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """Rows (T, K) with mean 0 and variance 1, times a weight, plus a bias."""
        return self.backend.norm.layer_norm(x, weight, bias, eps, self.empty(*x.shape))

    def normed(self, x: Array, weight: Array, add: Array | None = None, eps: float | None = None) -> MatrixInput:
        """Normalised rows (T, K) as the input of matrices, after ``x += add``; `eps` is the configuration's by
        default."""
        eps = self.config.rms_norm_eps if eps is None else eps
        return self.backend.norm.normed(x, weight, eps, self.empty(*x.shape), add)

    def add(self, x: Array, y: Array) -> Array:
        """``x += y``, (T, K)."""
        return self.backend.norm.add(x, y)

    def rope(self, x: Array) -> Array:
        """Rotate the last R numbers of every head of `x`, (T, H, D), by the tokens' positions, in place."""
        rope = self.backend.rope
        rotate = rope.rope_interleaved if self.config.rope_interleave else rope.rope_neox
        return rotate(x, self.cos_sin)

    def rope_neox(self, x: Array) -> Array:
        """`rope` on pairs of a number of the first half of the R and one of the second."""
        return self.backend.rope.rope_neox(x, self.cos_sin)

    def temper(self, q: Array) -> Array:
        """Multiply queries (T, H, D) by the attention temperature of the tokens' positions, in place, if the model has
        one."""
        temperature = self.config.attention_temperature
        if temperature is None:
            return q
        return self.backend.rope.temper(q, self.step.positions, temperature.scale, temperature.length)

    # Attention --------------------------------------------------------------------------------------------------------

    def store(self, rows: Array, cache: QTensor) -> None:
        """Write rows (T, W) into the tokens' slots of a cache."""
        self.backend.attention.store(rows, self.step.slots, cache)

    def load(self, cache: QTensor, block_table: Array, length: int, width: int) -> Array:
        """The first `length` cache rows of a sequence, as numbers: (S, W)."""
        return self.backend.attention.load(cache, block_table, self.empty(length, width))

    def absorb(self, q: Array, k_b: QTensor) -> Array:
        """Queries with ``W_k_b`` folded in: (T, H, nope + R) to (T, H, rank + R)."""
        out = self.empty(*q.shape[:2], self.config.kv_lora_rank + self.config.qk_rope_head_dim)
        return self.backend.attention.absorb(q, k_b, out)

    def absorbed(self, latent_q: Array, cache: LatentCache | IndexedCache) -> Array:
        """Attention of absorbed queries, (T, H, rank + R), over latent rows: (T, H, rank)."""
        attention = self.backend.attention
        attend = attention.absorbed_materialised if self.materialised else attention.absorbed
        out = self.empty(*latent_q.shape[:2], self.config.kv_lora_rank)
        return attend(latent_q, cache.latent, cache.rope, self.step, self.config.softmax_scale, out)

    def choices(self) -> Array:
        """Memory for the positions that the tokens attend to: int32 (T, k)."""
        top_k = self.config.indexer.top_k if self.config.indexer else 0
        return self.backend.memory.empty((len(self.step.tokens), top_k), np.int32)

    def choose(self, q: Array, weights: Array, index: QTensor, out: Array) -> Array:
        """The positions with the best scores, `out` (T, k), by the indexer's queries (T, H, D) and weights (T, H)."""
        return self.backend.attention.choose(q, weights, index, self.step, out)

    def sparse(self, latent_q: Array, cache: LatentCache | IndexedCache, chosen: Array) -> Array:
        """`absorbed` over the chosen positions, (T, k)."""
        out, scale = self.empty(*latent_q.shape[:2], self.config.kv_lora_rank), self.config.softmax_scale
        return self.backend.attention.sparse(latent_q, cache.latent, cache.rope, self.step, chosen, scale, out)

    def keys_values(self, length: int, heads: int, exact: bool) -> KeysValues:
        """Memory for expanded keys (S, H, nope + R) and values (S, H, v). It is kept for the next layer: to take it
        from the system costs as much as to fill it."""
        sizes = length, heads, exact
        if sizes not in self.kept:
            self.kept.clear()
            config = self.config
            widths = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
            self.kept[sizes] = self.backend.attention.keys_values(length, heads, *widths, exact, self.dtype)
        return self.kept[sizes]

    def expand(self, c_kv: Array, k_pe: Array, k_b: QTensor, v_b: QTensor, out: KeysValues) -> KeysValues:
        """Keys and values of some heads from latent rows, (S, rank) and (S, R)."""
        return self.backend.attention.expand(c_kv, k_pe, k_b, v_b, out)

    def as_rows(self, keys_values: Any) -> tuple[Array, Array]:
        """Exact keys and values of all heads as rows of a cache: (S, H * (nope + R)) and (S, H * v)."""
        keys, values = keys_values.keys, keys_values.values
        return keys.reshape(len(keys), -1), values.reshape(len(values), -1)

    def expanded(self, q: Array, keys_values: KeysValues, out: Array) -> Array:
        """Attention of queries (T, H, nope + R) of one sequence over its expanded keys and values: `out` (T, H, v)."""
        scale = self.config.softmax_scale
        return self.backend.attention.expanded(q, keys_values, self.step.positions, scale, out)

    def full(self, q: Array, keys: QTensor, values: QTensor, out: Array) -> Array:
        """Attention of queries (T, H, nope + R) over a cache of keys and values of all heads: `out` (T, H, v)."""
        return self.backend.attention.full(q, keys, values, self.step, self.config.softmax_scale, out)

    # Feed-forward networks --------------------------------------------------------------------------------------------

    def router(self, scores: Array, bias: Array | None) -> tuple[Array, Array]:
        """The experts that each token goes to by its scores (T, E), and their weights: int32 and float (T, k)."""
        shape = len(scores), self.config.num_experts_per_tok
        ids, weights = self.backend.memory.empty(shape, np.int32), self.empty(*shape)
        self.backend.moe.router(scores, bias, self.config, ids, weights)
        return ids, weights

    def relu_squared(self, x: Array) -> Array:
        """``x = max(x, 0)²``, (T, K), in place."""
        return self.backend.moe.relu_squared(x)

    def add_ffn(self, h: MatrixInput, matrices: Swiglu, x: Array) -> None:
        """``x += down(silu(gate h) * up h)``."""
        self.backend.moe.ffn(h, *matrices, x, add=True)

    def add_experts(
        self, h: MatrixInput, ids: Array, weights: Array, routed: Swiglu, shared: Swiglu | None, x: Array
    ) -> None:
        """Add the results of experts to `x`, (T, hidden): of the chosen ones, times their weights, and of the shared.

        Where routed experts are on a backend of their own, their input goes there and their result comes back.
        """
        here, there = self.backend, self.experts_backend
        if here is there:
            here.moe.experts(h, ids, weights, *routed, x, shared=shared, add=True)
            return
        sent = moved_input(h, here, there), moved(ids, here, there), moved(weights, here, there)
        if shared is not None:
            # Launched first: a GPU computes the shared experts while the host computes the others.
            self.add_ffn(h, shared, x)
        out = there.moe.experts(*sent, *routed, there.memory.empty(x.shape, self.dtype))
        here.norm.add(x, moved(out, there, here))
