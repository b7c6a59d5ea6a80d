"""The configuration of a model: its sizes and switches, and the numbers that follow from them."""

import math
from dataclasses import dataclass, replace

import numpy as np

from pymla.files.gguf_reader import ModelFile
from pymla.models.attention_temperature import AttentionTemperature
from pymla.models.config_reader import read_config
from pymla.models.indexer import Indexer
from pymla.models.yarn import Yarn

__all__ = ["AttentionTemperature", "Indexer", "ModelConfig", "Yarn"]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a model, named as in DeepSeek's config.json."""

    architecture: str
    name: str
    vocab_size: int
    context_length: int
    hidden_size: int
    num_hidden_layers: int  # without the layers that predict further tokens (nextn)
    intermediate_size: int  # of the dense layers' feed-forward network
    first_k_dense_replace: int  # the first layer with experts
    num_attention_heads: int
    rms_norm_eps: float
    q_lora_rank: int  # 0: queries come from the hidden state by one matrix
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int  # 0: a dense model
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    scoring_func: str  # "softmax" or "sigmoid"
    n_group: int  # 1: no groups
    topk_group: int
    group_score: str  # "max": a group counts as its best expert (V2); "top2": as the sum of its two best (V3)
    rope_theta: float
    yarn: Yarn | None
    original_context_length: int  # that the model was trained with, before YaRN or LongRoPE
    num_nextn_predict_layers: int = 0  # layers behind the others that predict further tokens
    rope_interleave: bool = True  # whether rope's pairs are neighbours; otherwise of the two halves
    hidden_act: str = "silu"  # of dense networks: "silu" of a gate, or "relu2", the square of ReLU, without a gate
    attention_factor: float = 1.0  # on cos and sin
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a layer adds to the residual stream
    logit_scale: float = 1.0  # that logits are divided by
    rope_linear_factor: float = 1.0  # positions are divided by it; 1 with YaRN, which has a factor of its own
    attention_temperature: AttentionTemperature | None = None
    indexer: Indexer | None = None  # of sparse attention; None: all positions are attended to

    @classmethod
    def from_gguf(cls, file: ModelFile) -> "ModelConfig":
        """The configuration of a model file.

        Works from metadata alone, too; where the tensors are there, `vocab_size` is the rows of ``token_embd`` and
        `q_lora_rank` the rows of ``blk.0.attn_q_a``.

        Raises
        ------
        PymlaError
            The architecture is unknown, a key is missing, of the wrong type or absurd, or asks for something that
            pymla does not implement.
        """
        return cls(**read_config(file))

    def dense(self) -> "ModelConfig":
        """The configuration of the same model that attends to all positions."""
        return replace(self, indexer=None)

    @property
    def qk_head_dim(self) -> int:
        """Size of a query's or key's head: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention scores, ``mscale^2 / sqrt(qk_head_dim)``, with YaRN's ``mscale`` or 1.

        DeepSeek scales all dimensions of a head here, instead of the rotated ones through cos and sin. V2-Lite 0.1147,
        V3 0.1352. As transformers' DeepseekV3Attention and, wherever the file has a log_multiplier, llama.cpp's
        ``deepseek2.cpp``.
        """
        mscale = 1.0 if self.yarn is None else self.yarn.mscale
        return mscale**2 / math.sqrt(self.qk_head_dim)

    @property
    def rope_magnitude(self) -> float:
        """Factor on cos and sin: `attention_factor`, times `Yarn.rope_magnitude`."""
        return self.attention_factor * (1.0 if self.yarn is None else self.yarn.rope_magnitude)

    @property
    def rope_layouts(self) -> set[bool]:
        """Whether pairs are neighbours, in attention and in the indexer: true, false, or both."""
        return {self.rope_interleave, *([self.indexer.interleave] if self.indexer else [])}

    def inv_freq(self) -> np.ndarray:
        """Radians by which each pair of the rotated part turns per position: ``theta^(-2i/d)``, divided by
        `rope_linear_factor`, and with YaRN `Yarn.mixed`.

        Returns
        -------
        float64 (qk_rope_head_dim / 2,)
        """
        dim = self.qk_rope_head_dim
        frequencies = self.rope_theta ** (-np.arange(0, dim, 2) / dim) / self.rope_linear_factor
        return frequencies if self.yarn is None else self.yarn.mixed(frequencies, self.rope_theta)
