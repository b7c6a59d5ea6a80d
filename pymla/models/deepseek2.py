"""The transformer of DeepSeek-V2 and V3: multi-head latent attention and a mixture of experts.

The methods of `DeepSeek2` are the stages of a forward pass in their order, each for T tokens of a step: a slice of a
prompt, or the next tokens of several sequences. `pymla.engine.forward` takes the tokens through the layers, slice by
slice, and chooses a form of attention; `ops` are the operations of a layer's backend on the T tokens.

- `embed`
- in every layer `attention_input` and `store`, then attention in one of its forms: `query_input`, `queries` and
  `absorbed`; `load`, `expand`, `query_input`, `queries` and `expanded`; or `query_input`, `queries` and `full`; then
  `feed_forward`
- `hidden_states` and `logits`

Shapes: S rows of a sequence's cache, H heads, E experts, k experts of a token, V tokens of the vocabulary, R rotated
numbers of a head. Queries and keys have nope + R numbers a head, values v, and a latent row has rank + R.

DeepSeek-V3 (2024), arXiv:2412.19437, section 2.1, whose equations are cited; DeepSeek-V2 (2024), arXiv:2405.04434.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pymla.pages import FullCache, IndexedCache, LatentCache, LayerCache

# The reader of configurations asks the family for its own fields.
if TYPE_CHECKING:
    from pymla.backend import Array, KeysValues, MatrixInput
    from pymla.models.config import ModelConfig
    from pymla.models.metadata import Metadata
    from pymla.models.operations import Operations
    from pymla.models.weights import Layer, Weights


class DeepSeek2:
    """The stages of a forward pass. Another family overrides the stages in which it differs.

    Parameters
    ----------
    config : ModelConfig
    weights : Weights

    Attributes
    ----------
    own_keys : tuple of str
        Keys of the metadata that this family reads and that must be neutral in files of the others.
    default_scoring_func : str
        Of the experts, where a file does not say it.
    """

    own_keys: ClassVar[tuple[str, ...]] = ()
    default_scoring_func: ClassVar[str] = "softmax"

    def __init__(self, config: ModelConfig, weights: Weights):
        self.config, self.weights = config, weights

    @staticmethod
    def own_fields(read: Metadata, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields of a `ModelConfig` that this family has, or reads otherwise.

        Parameters
        ----------
        read : Metadata
        fields : dict
            The fields of all families.
        """
        return {}

    def inv_freq(self, ctx: int) -> np.ndarray:
        """Radians by which each pair of the rotated part turns per position, in a model of at most `ctx` tokens.

        These are `ModelConfig.inv_freq`, divided by factors where the file has them (LongRoPE): one set for sequences
        within the original context and one for longer ones. As in llama.cpp, the longest sequence that the model is
        loaded for decides, so that the rows of a cache agree.

        Returns
        -------
        float64 (qk_rope_head_dim / 2,)
        """
        long = ctx > self.config.original_context_length
        factors = self.weights.rope_factors_long if long else self.weights.rope_factors_short
        frequencies = self.config.inv_freq()
        return frequencies if factors is None else frequencies / factors

    def embed(self, ops: Operations) -> Array:
        """The residual stream as it enters the first layer."""
        return ops.embedding_rows(self.weights.token_embd)  # (T, hidden)

    # Multi-head latent attention --------------------------------------------------------------------------------------

    def attention_input(self, ops: Operations, layer: Layer, x: Array) -> MatrixInput:
        """The input of attention: the residual stream `x`, (T, hidden), normalised."""
        return ops.normed(x, layer.attn_norm)  # (T, hidden)

    def query_input(self, ops: Operations, layer: Layer, h: MatrixInput) -> MatrixInput:
        """The input of queries: ``c_q``, (T, q_lora_rank), equation 6, normalised; without q-LoRA the hidden state."""
        if not self.config.q_lora_rank:
            return h
        c_q = ops.matmul(layer.attn_q_a, h)  # (T, q_lora_rank)
        return ops.normed(c_q, layer.attn_q_a_norm)

    def queries(self, ops: Operations, layer: Layer, c_q: MatrixInput, heads: slice = slice(None)) -> Array:
        """Queries of some heads, equations 7 to 9."""
        w = layer.attn_q_b if self.config.q_lora_rank else layer.attn_q
        start, stop, _ = heads.indices(self.config.num_attention_heads)
        size = self.config.qk_head_dim
        q = ops.matmul(w.rows(start * size, stop * size), c_q)  # (T, H * (nope + R))
        return ops.temper(ops.rope(q.reshape(len(q), -1, size)))  # (T, H, nope + R), the last R rotated

    def latent(self, ops: Operations, layer: Layer, h: MatrixInput) -> tuple[Array, Array]:
        """Latent rows, which the cache keeps, equations 1 and 3: ``c_kv``, normalised, and ``k_pe``, rotated."""
        rank = self.config.kv_lora_rank
        kv = ops.matmul(layer.attn_kv_a_mqa, h)  # (T, rank + R)
        ops.rope(kv[:, None])
        return ops.rms_norm(kv[:, :rank], layer.attn_kv_a_norm), kv[:, rank:]  # (T, rank), (T, R)

    def cache_rows(self, ops: Operations, layer: Layer, cache: LayerCache, h: MatrixInput) -> tuple[Array, ...]:
        """The tokens' rows of each kind that the cache keeps: latent ones, or for ``--mla 0`` keys and values of all
        heads."""
        c_kv, k_pe = self.latent(ops, layer, h)  # (T, rank), (T, R)
        if isinstance(cache, FullCache):
            keys_values = self.expand(ops, layer, c_kv, k_pe, exact=True)  # (T, H, nope + R), (T, H, v)
            return ops.as_rows(keys_values)  # (T, H * (nope + R)), (T, H * v)
        return c_kv, k_pe

    def store(self, ops: Operations, layer: Layer, cache: LayerCache, h: MatrixInput) -> None:
        """Write the tokens' rows into the cache."""
        for of_tokens, kept in zip(self.cache_rows(ops, layer, cache, h), cache, strict=True):
            ops.store(of_tokens, kept)

    def absorbed(self, ops: Operations, layer: Layer, cache: LatentCache | IndexedCache, q: Array, out: Array) -> None:
        """Attention in the latent space (DeepSeek-V2, section 2.1.2): ``W_k_b`` goes into the queries and ``W_v_b``
        onto the result, so that all heads share the cache's rows. Writes `out`, (T, H, v)."""
        latent_q = ops.absorb(q, layer.attn_k_b)  # (T, H, rank + R)
        latent = ops.absorbed(latent_q, cache)  # (T, H, rank)
        ops.matmul_heads(layer.attn_v_b, latent, out)  # (T, H, v)

    def load(
        self, ops: Operations, cache: LatentCache | IndexedCache, block_table: Array, length: int
    ) -> tuple[Array, Array]:
        """``c_kv`` and ``k_pe`` of the first S = `length` tokens of a sequence."""
        c_kv = ops.load(cache.latent, block_table, length, self.config.kv_lora_rank)
        k_pe = ops.load(cache.rope, block_table, length, self.config.qk_rope_head_dim)
        return c_kv, k_pe  # (S, rank), (S, R)

    def expand(
        self, ops: Operations, layer: Layer, c_kv: Array, k_pe: Array, heads: slice = slice(None), *, exact: bool
    ) -> KeysValues:
        """Keys and values of some heads from latent rows, equations 2, 4 and 5; `exact` as for
        `pymla.backend.Attention.keys_values`."""
        start, stop, _ = heads.indices(self.config.num_attention_heads)
        keys_values = ops.keys_values(len(c_kv), stop - start, exact)  # (S, H, nope + R), (S, H, v)
        w = layer.attn_k_b.rows(start, stop), layer.attn_v_b.rows(start, stop)
        return ops.expand(c_kv, k_pe, *w, keys_values)

    def expanded(self, ops: Operations, q: Array, keys_values: KeysValues, out: Array) -> None:
        """Multi-head attention of one sequence over expanded keys and values, equation 10. Writes `out`, (T, H, v)."""
        ops.expanded(q, keys_values, out)

    def full(self, ops: Operations, cache: FullCache, q: Array, out: Array) -> None:
        """The same over a cache of keys and values of all heads. Writes `out`, (T, H, v)."""
        ops.full(q, *cache, out)

    # The output of attention, and the feed-forward network ------------------------------------------------------------

    def feed_forward(self, ops: Operations, layer: Layer, x: Array, attended: Array) -> None:
        """``x += W_o attended``, equation 11, then ``x += FFN(norm(x))``; `x` is (T, hidden), `attended` (T, H * v).

        The network is dense, or a mixture of experts, equations 12 to 16: each token goes to k of the E routed experts
        and to the shared ones, which are one network here.
        """
        projected = ops.matmul(layer.attn_output, ops.activation(attended))  # (T, hidden)
        h = ops.normed(x, layer.ffn_norm, add=projected)  # (T, hidden)
        if layer.ffn_gate_inp is None:
            ops.add_ffn(h, layer.ffn, x)  # (T, hidden)
            return
        scores = ops.matmul(layer.ffn_gate_inp, h)  # (T, E)
        ids, weights = ops.router(scores, layer.exp_probs_b)  # (T, k), (T, k)
        ops.add_experts(h, ids, weights, layer.experts, layer.shared, x)  # (T, hidden)

    def hidden_states(self, ops: Operations, x: Array) -> MatrixInput:
        """The residual stream behind the last layer, normalised, of T tokens or some of them."""
        return ops.normed(x, self.weights.output_norm)  # (T, hidden)

    def logits(self, ops: Operations, h: MatrixInput) -> Array:
        """Logits of the next token from hidden states."""
        return ops.matmul(self.weights.output, h)  # (T, V)
