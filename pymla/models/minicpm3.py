"""The transformer of MiniCPM3: latent attention and dense networks, with scaled embeddings, sums and logits.

Three numbers set it apart from `pymla.models.deepseek2`. Embeddings are multiplied by `embedding_scale` (12), what each
layer adds to the residual stream by `residual_scale` (1.4 / sqrt(layers)), and logits are divided by `logit_scale`
(hidden / 256). Rope turns halves, not neighbours, at frequencies that a file may divide by factors (LongRoPE).

Hu et al., "MiniCPM" (2024), arXiv:2404.06395; transformers' ``MiniCPM3ForCausalLM``; llama.cpp's
``minicpm3.cpp``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pymla.models.deepseek2 import DeepSeek2

if TYPE_CHECKING:
    from pymla.backend import Array, MatrixInput
    from pymla.models.config import ModelConfig
    from pymla.models.metadata import Metadata
    from pymla.models.operations import Operations
    from pymla.models.weights import Layer, Weights

#: The numbers of MiniCPM3-4B, which converters do not write.
EMBEDDING_SCALE, DEPTH_SCALE, BASE_WIDTH = 12.0, 1.4, 256


class MiniCPM3(DeepSeek2):
    """The stages in which MiniCPM3 differs.

    The residual stream x is kept as x / residual_scale: then what a layer gives is added as it is, and only embeddings
    are multiplied. A norm of x / s with eps / s² is the norm of x with eps. `Weights` divides the weight of the last
    norm by logit_scale.
    """

    own_keys = ("embedding_scale", "residual_scale", "logit_scale", "rope.scaling.attn_factor")

    def __init__(self, config: ModelConfig, weights: Weights):
        super().__init__(config, weights)
        self._eps = config.rms_norm_eps / config.residual_scale**2

    @staticmethod
    def own_fields(read: Metadata, fields: dict[str, Any]) -> dict[str, Any]:
        depth_scale = DEPTH_SCALE / math.sqrt(fields["num_hidden_layers"])
        return {
            "rope_interleave": False,
            "attention_factor": read.number("rope.scaling.attn_factor", 1.0),
            "embedding_scale": read.number("embedding_scale", 0.0) or EMBEDDING_SCALE,
            "residual_scale": read.number("residual_scale", 0.0) or depth_scale,
            "logit_scale": read.number("logit_scale", 0.0) or fields["hidden_size"] / BASE_WIDTH,
        }

    def embed(self, ops: Operations) -> Array:
        scale = self.config.embedding_scale / self.config.residual_scale
        return ops.embedding_rows(self.weights.token_embd, scale)  # (T, hidden)

    def attention_input(self, ops: Operations, layer: Layer, x: Array) -> MatrixInput:
        return ops.normed(x, layer.attn_norm, eps=self._eps)  # (T, hidden)

    def feed_forward(self, ops: Operations, layer: Layer, x: Array, attended: Array) -> None:
        projected = ops.matmul(layer.attn_output, ops.activation(attended))  # (T, hidden)
        h = ops.normed(x, layer.ffn_norm, add=projected, eps=self._eps)  # (T, hidden)
        ops.add_ffn(h, layer.ffn, x)  # (T, hidden)

    def hidden_states(self, ops: Operations, x: Array) -> MatrixInput:
        return ops.normed(x, self.weights.output_norm, eps=self._eps)  # (T, hidden)
