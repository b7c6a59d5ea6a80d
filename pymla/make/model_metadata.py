"""Metadata of a model in GGUF, under the keys of llama.cpp's ``convert_hf_to_gguf.py``."""

import math
from dataclasses import dataclass

import gguf
from gguf import Keys, LlamaFileType

from pymla import ggml
from pymla.files.gguf_writer import Value
from pymla.models.minicpm3 import BASE_WIDTH, DEPTH_SCALE, EMBEDDING_SCALE

ARCHITECTURE = "deepseek2"

#: A key that the gguf package does not have yet.
_INDEXER_TYPES = "{arch}.attention.indexer.types"

#: Architectures of dense networks alone, whose files have no keys of experts.
DENSE = ("minicpm3", "plm")

#: How W_kv_b is stored: whole; as k_b and v_b; both.
LAYOUTS = ("kv_b", "split", "all")

#: The number that ``general.file_type`` gives to the type of most matrices, where the gguf package has one.
FILE_TYPES = {
    qtype: LlamaFileType[each]
    for qtype, name in ggml.NAME.items()
    # Mixes of K-quants that have the type throughout end in S.
    for each in (f"ALL_{name}", f"MOSTLY_{name}", f"MOSTLY_{name}_S", f"MOSTLY_{name}_MOE")
    if each in LlamaFileType.__members__
}


@dataclass(frozen=True)
class Shape:
    """Sizes and switches of a model, named as in DeepSeek's config.json.

    ``n_routed_experts=0`` means a dense model, ``q_lora_rank=0`` queries of full rank, ``n_group=1`` no groups,
    ``yarn_factor=1`` no YaRN. ``scoring_func="sigmoid"`` brings the expert bias ``exp_probs_b``.
    ``tie_word_embeddings`` leaves the output matrix out. ``beta_fast=None`` is the reader's default. Of
    ``rope_factors`` (LongRoPE) the first are for sequences longer than ``yarn_original`` tokens, the second for others.
    ``temperature_scale=0`` means no attention temperature, and ``num_nextn_predict_layers`` are behind
    ``num_hidden_layers``. ``fused_experts`` puts gate and up of the experts into one tensor. ``index_topk=0`` means no
    indexer; ``indexer_types=None`` that the file does not say which layers have one.
    """

    name: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    num_attention_heads: int
    vocab_size: int
    first_k_dense_replace: int = 1
    q_lora_rank: int = 0
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    context_length: int = 163840
    yarn_factor: float = 1.0
    yarn_original: int = 4096
    mscale_all_dim: float = 1.0
    beta_fast: float | None = 32.0
    beta_slow: float | None = 1.0
    tie_word_embeddings: bool = False
    architecture: str = ARCHITECTURE  # as GGUF names it
    rope_factors: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # half of qk_rope_head_dim each
    attention_factor: float = 1.0  # on cos and sin
    embedding_scale: float = EMBEDDING_SCALE  # this and the next two are of MiniCPM3 only
    residual_scale: float | None = None  # None: MiniCPM3-4B's for the number of layers
    logit_scale: float | None = None  # None: MiniCPM3-4B's for the hidden size
    temperature_scale: float = 0.0
    temperature_length: int = 0
    num_nextn_predict_layers: int = 0
    fused_experts: bool = False
    index_topk: int = 0
    index_n_heads: int = 0
    index_head_dim: int = 0
    indexer_types: tuple[str, ...] | None = None  # "full" or "shared", of each layer

    @property
    def dense_layers(self) -> int:
        """Layers without experts, which come first."""
        layers = self.num_hidden_layers
        return min(self.first_k_dense_replace, layers) if self.n_routed_experts else layers

    def has_indexer(self, layer: int) -> bool:
        """Whether a layer has an indexer of its own, as those that predict further tokens always do."""
        if self.indexer_types is None or layer >= self.num_hidden_layers:
            return self.index_topk > 0
        return self.indexer_types[layer] == "full"


def model_metadata(shape: Shape, layout: str, file_type: int | None) -> dict[str, Value]:
    """The keys of a model but ``general.architecture`` and those of its tokenizer.

    Parameters
    ----------
    layout : one of `LAYOUTS`
    file_type : ``general.file_type``, a number of `FILE_TYPES` or of a mix of types; None: left out
    """
    general: dict[str, Value] = {Keys.General.TYPE: "model", Keys.General.NAME: shape.name}
    llm = {
        Keys.LLM.BLOCK_COUNT: shape.num_hidden_layers + shape.num_nextn_predict_layers,
        Keys.LLM.CONTEXT_LENGTH: shape.context_length,
        Keys.LLM.EMBEDDING_LENGTH: shape.hidden_size,
        Keys.LLM.FEED_FORWARD_LENGTH: shape.intermediate_size,
        Keys.Attention.HEAD_COUNT: shape.num_attention_heads,
        Keys.Attention.LAYERNORM_RMS_EPS: float(shape.rms_norm_eps),
        Keys.LLM.VOCAB_SIZE: shape.vocab_size,
        **_attention(shape, layout),
        **_indexer(shape),
        **({} if shape.architecture in DENSE else _experts(shape)),
        **_rope(shape),
        **(_scales(shape) if shape.architecture == "minicpm3" else {}),
    }
    if shape.num_nextn_predict_layers:
        llm[Keys.LLM.NEXTN_PREDICT_LAYERS] = shape.num_nextn_predict_layers
    general |= {key.format(arch=shape.architecture): value for key, value in llm.items()}
    if file_type is not None:
        general[Keys.General.FILE_TYPE] = int(file_type)
    return general | {Keys.General.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION}


def _attention(shape: Shape, layout: str) -> dict[str, Value]:
    found: dict[str, Value] = {Keys.Attention.Q_LORA_RANK: shape.q_lora_rank} if shape.q_lora_rank else {}
    found[Keys.Attention.KV_LORA_RANK] = shape.kv_lora_rank
    if shape.temperature_scale:
        found[Keys.Attention.TEMPERATURE_SCALE] = float(shape.temperature_scale)
        found[Keys.Attention.TEMPERATURE_LENGTH] = shape.temperature_length
    head_dim = shape.qk_nope_head_dim + shape.qk_rope_head_dim
    if layout == "split":
        return found | {
            Keys.Attention.HEAD_COUNT_KV: 1,
            Keys.Attention.KEY_LENGTH: shape.kv_lora_rank + shape.qk_rope_head_dim,
            Keys.Attention.VALUE_LENGTH: shape.kv_lora_rank,
            Keys.Attention.KEY_LENGTH_MLA: head_dim,
            Keys.Attention.VALUE_LENGTH_MLA: shape.v_head_dim,
        }
    found |= {Keys.Attention.HEAD_COUNT_KV: shape.num_attention_heads, Keys.Attention.KEY_LENGTH: head_dim}
    # Files of MiniCPM3 leave out what is the reader's default.
    if shape.architecture != "minicpm3" or shape.v_head_dim != shape.hidden_size // shape.num_attention_heads:
        found[Keys.Attention.VALUE_LENGTH] = shape.v_head_dim
    return found


def _indexer(shape: Shape) -> dict[str, Value]:
    if not shape.index_topk:
        return {}
    found: dict[str, Value] = {
        Keys.Attention.Indexer.HEAD_COUNT: shape.index_n_heads,
        Keys.Attention.Indexer.KEY_LENGTH: shape.index_head_dim,
        Keys.Attention.Indexer.TOP_K: shape.index_topk,
    }
    if shape.indexer_types is not None:
        found[_INDEXER_TYPES] = [each == "full" for each in shape.indexer_types]
    return found


def _experts(shape: Shape) -> dict[str, Value]:
    # llama.cpp wants these keys of a dense model, too.
    found: dict[str, Value] = {
        Keys.LLM.LEADING_DENSE_BLOCK_COUNT: shape.dense_layers,
        Keys.LLM.EXPERT_SHARED_COUNT: shape.n_shared_experts,
        Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: shape.moe_intermediate_size,
    }
    if not shape.n_routed_experts:
        return found
    found |= {
        Keys.LLM.EXPERT_COUNT: shape.n_routed_experts,
        Keys.LLM.EXPERT_USED_COUNT: shape.num_experts_per_tok,
        Keys.LLM.EXPERT_WEIGHTS_SCALE: float(shape.routed_scaling_factor),
        Keys.LLM.EXPERT_GATING_FUNC: int(gguf.ExpertGatingFuncType[shape.scoring_func.upper()]),
        Keys.LLM.EXPERT_GROUP_COUNT: shape.n_group,
        Keys.LLM.EXPERT_GROUP_USED_COUNT: shape.topk_group if shape.n_group > 1 else 1,
    }
    return found | ({Keys.LLM.EXPERT_WEIGHTS_NORM: True} if shape.norm_topk_prob else {})


def _scales(shape: Shape) -> dict[str, Value]:
    """MiniCPM3's factors that are not those of MiniCPM3-4B, which readers take where a file has none."""
    known = {
        Keys.LLM.EMBEDDING_SCALE: (shape.embedding_scale, EMBEDDING_SCALE),
        Keys.LLM.RESIDUAL_SCALE: (shape.residual_scale, DEPTH_SCALE / math.sqrt(shape.num_hidden_layers)),
        Keys.LLM.LOGIT_SCALE: (shape.logit_scale, shape.hidden_size / BASE_WIDTH),
    }
    return {key: float(value) for key, (value, usual) in known.items() if value not in (None, usual)}


def _rope(shape: Shape) -> dict[str, Value]:
    found: dict[str, Value] = {
        Keys.Rope.DIMENSION_COUNT: shape.qk_rope_head_dim,
        Keys.Rope.FREQ_BASE: float(shape.rope_theta),
    }
    if shape.rope_factors:
        found[Keys.Rope.SCALING_ORIG_CTX_LEN] = shape.yarn_original
    if shape.attention_factor != 1:
        found[Keys.Rope.SCALING_ATTN_FACTOR] = shape.attention_factor
    if shape.yarn_factor == 1:
        return found
    found |= {
        Keys.Rope.SCALING_TYPE: gguf.RopeScalingType.YARN.value,
        Keys.Rope.SCALING_FACTOR: float(shape.yarn_factor),
        Keys.Rope.SCALING_ORIG_CTX_LEN: shape.yarn_original,
        Keys.Rope.SCALING_YARN_LOG_MUL: 0.1 * shape.mscale_all_dim,
    }
    betas = {
        Keys.Rope.SCALING_YARN_BETA_FAST: shape.beta_fast,
        Keys.Rope.SCALING_YARN_BETA_SLOW: shape.beta_slow,
    }
    return found | {key: float(beta) for key, beta in betas.items() if beta is not None}
