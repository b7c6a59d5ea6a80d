"""The transformer of PLM: latent attention without a low rank of queries, and dense networks of a squared ReLU.

Deng et al., "PLM: Efficient Peripheral Language Models" (2025), arXiv:2503.12167; llama.cpp's ``plm.cpp``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pymla.models.deepseek2 import DeepSeek2

if TYPE_CHECKING:
    from pymla.backend import Array
    from pymla.models.metadata import Metadata
    from pymla.models.operations import Operations
    from pymla.models.weights import Layer


class PLM(DeepSeek2):
    """The stage in which PLM differs."""

    @staticmethod
    def own_fields(read: Metadata, fields: dict[str, Any]) -> dict[str, Any]:
        return {"hidden_act": "relu2"}

    def feed_forward(self, ops: Operations, layer: Layer, x: Array, attended: Array) -> None:
        """``x += W_o attended``, then ``x += W_down max(W_up norm(x), 0)²``."""
        projected = ops.matmul(layer.attn_output, ops.activation(attended))  # (T, hidden)
        h = ops.normed(x, layer.ffn_norm, add=projected)  # (T, hidden)
        inner = ops.relu_squared(ops.matmul(layer.ffn_up, h))  # (T, inner)
        ops.add(x, ops.matmul(layer.ffn_down, ops.activation(inner)))  # (T, hidden)
