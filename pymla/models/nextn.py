"""The block that predicts a further token (nextn): multi-token prediction of DeepSeek-V3, V3.2 and GLM.

A model's hidden state h_i, after token i, predicts token i + 1. Once that token t is chosen, the block takes h_i and
the embedding of t, and predicts token i + 2: it is a transformer of one layer whose input is a projection of the two,

    x = eh_proj [enorm(embedding of t); hnorm(h_i)],

with a cache of its own, and an output norm and matrix (`shared_head_norm`, `shared_head_head`). Its own hidden state in
the place of h_i, with the token that it predicted, gives another token.

DeepSeek-V3 (2024), arXiv:2412.19437, section 2.2, equations 21 to 23. The report leaves three things open, in which all
of vLLM's ``deepseek_mtp.py``, SGLang's ``deepseek_nextn.py``, transformers' ``MtpModel`` and llama.cpp's
``deepseek2.cpp`` agree, or came to agree:

- h_i is the hidden state behind the model's last norm, which the output matrix reads, and the block's own is behind
  `shared_head_norm`.
- The columns of ``eh_proj`` are those of the embedding first (the report writes them the other way round).
- The input of h_i and t is at position i of the block's sequence, or at i + 1 throughout: attention sees differences of
  positions only. It is i here, so that rows lie where the model's rows of token i do. llama.cpp has another input in
  front, of the first token and zeros, and vLLM took zeros for the embedding at position 0; the report has neither.

The layer of V3.2's block has an indexer, and attends to chosen positions as it was trained (vLLM); llama.cpp attends to
all. A block without one attends to all.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import TYPE_CHECKING

from pymla.models.deepseek2 import DeepSeek2
from pymla.models.deepseek32 import DeepSeek32
from pymla.models.tensors import has_indexer
from pymla.models.weights import Weights

if TYPE_CHECKING:
    from pymla.backend import Array
    from pymla.models.config import ModelConfig
    from pymla.models.operations import Operations
    from pymla.models.weights import NextnWeights


class Nextn(DeepSeek2):
    """The stages of a block: those of a model of one layer, with `join` behind `embed`.

    Parameters
    ----------
    config : ModelConfig
        The model's, or its `dense` one where the block has no indexer.
    weights : NextnWeights
    """

    def __init__(self, config: ModelConfig, weights: NextnWeights):
        of_block = Weights(weights.embed_tokens, weights.shared_head_norm, weights.shared_head_head, [weights.layer])
        super().__init__(config, of_block)
        self._block = weights

    def join(self, ops: Operations, embedding: Array, hidden: Array) -> Array:
        """The residual stream as it enters the layer, equation 21, from embeddings of T tokens and from the hidden
        states after the tokens before them: both (T, hidden), as the result."""
        width = self.config.hidden_size
        joined = ops.empty(len(hidden), 2 * width)
        ops.rms_norm(embedding, self._block.enorm, joined[:, :width])
        ops.rms_norm(hidden, self._block.hnorm, joined[:, width:])
        return ops.matmul(self._block.eh_proj, ops.activation(joined))


class SparseNextn(Nextn, DeepSeek32):
    """The stages of a block whose model's attention is sparse."""


#: The blocks of the architectures that have them.
NEXTN: dict[str, type[Nextn]] = {"deepseek2": Nextn, "deepseek32": SparseNextn, "glm-dsa": SparseNextn}


def with_nextn(config: ModelConfig, names: Container[str]) -> ModelConfig:
    """The configuration of a model whose first block is loaded: `Indexer.full` goes on with the block's layer.

    Parameters
    ----------
    config : ModelConfig
    names : of the tensors that the file holds
    """
    if config.indexer is None:
        return config
    layers = config.num_hidden_layers
    full = (*config.indexer.full[:layers], has_indexer(config, layers, names))
    return replace(config, indexer=replace(config.indexer, full=full))


def nextn_of(config: ModelConfig, weights: NextnWeights) -> Nextn:
    """The stages of a model's block."""
    return NEXTN[config.architecture](config if weights.layer.has_indexer else config.dense(), weights)
