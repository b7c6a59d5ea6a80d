"""From the metadata of a GGUF file to the fields of a `pymla.models.config.ModelConfig`.

Metadata keys are those of llama.cpp's ``convert_hf_to_gguf.py`` (class DeepseekV2Model), defaults those of llama.cpp's
``load_arch_hparams`` for the architecture deepseek2; other families add their own (`DeepSeek2.own_fields`).

Two conventions exist for the sizes of a head: files made for the MLA attention of llama.cpp (since April 2025) say
``head_count_kv`` 1 and give the size of a cache row as ``key_length`` and ``value_length``, the sizes of a head as
``key_length_mla`` and ``value_length_mla``; older files have the sizes of a head in ``key_length`` and ``value_length``
and no ``*_mla``.
"""

import math
from typing import Any

from pymla.files.gguf_reader import REQUIRED, ModelFile
from pymla.models.attention_temperature import AttentionTemperature
from pymla.models.families import FAMILIES
from pymla.models.metadata import MAX_CONTEXT, MAX_LAYERS, Metadata
from pymla.models.yarn import Yarn

SCORING_FUNCS = {1: "softmax", 2: "sigmoid"}

# Keys that change what a model computes, with the values at which they change nothing. attn_factor is among them
# because engines disagree on it: ik_llama.cpp multiplies the softmax scale by its square and leaves cos and sin alone,
# llama.cpp does both, and transformers' attention_factor, from which converters write yarn_attn_factor, replaces the
# factor on cos and sin only. llama.cpp reads neither yarn_attn_factor nor yarn_ext_factor for this architecture, though
# its converter writes both. No published model sets any of the three.
_NEUTRAL = {
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
}


def read_config(file: ModelFile) -> dict[str, Any]:
    """The fields of a `ModelConfig`, checked.

    Raises
    ------
    PymlaError
        As `ModelConfig.from_gguf`.
    """
    read = Metadata(file)
    family = FAMILIES[read.architecture]
    for key, neutral in _NEUTRAL.items():
        if key not in family.own_keys:
            read.require(key, neutral)
    layers = read.size("block_count", maximum=MAX_LAYERS)
    nextn = read.size("nextn_predict_layers", 0, minimum=0, maximum=MAX_LAYERS)
    if nextn >= layers:
        read.refuse("nextn_predict_layers", nextn, f"of block_count {layers} layers, one at least must remain")
    vocab_size = _vocab_size(read)
    context_length = read.size("context_length", maximum=MAX_CONTEXT)
    yarn, linear_factor = _rope_scaling(read, context_length)
    hidden_size = read.size("embedding_length")
    heads = read.layer_size("attention.head_count", 0, layers - nextn)
    head_dim, v_head_dim = _head_dims(read, heads, layers - nextn, hidden_size)
    rope_dim = read.size("rope.dimension_count")
    if rope_dim % 2 or rope_dim >= head_dim:
        read.refuse("rope.dimension_count", rope_dim, f"an even number below the head size {head_dim} is expected")
    fields = dict(
        architecture=read.architecture,
        name=file.get("general.name", str, file.path.stem),
        vocab_size=vocab_size,
        context_length=context_length,
        hidden_size=hidden_size,
        num_hidden_layers=layers - nextn,
        num_attention_heads=heads,
        rms_norm_eps=read.number("attention.layer_norm_rms_epsilon", maximum=1.0),
        q_lora_rank=_q_lora_rank(read),
        kv_lora_rank=read.size("attention.kv_lora_rank"),
        qk_nope_head_dim=head_dim - rope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=v_head_dim,
        **_feed_forward(read, layers, nextn, vocab_size),
        rope_theta=read.number("rope.freq_base", 10000.0, minimum=1.0),
        yarn=yarn,
        original_context_length=_original_context_length(read, context_length),
        num_nextn_predict_layers=nextn,
        rope_linear_factor=linear_factor,
        attention_temperature=_temperature(read, yarn),
    )
    return fields | family.own_fields(read, fields)


def _vocab_size(read: Metadata) -> int:
    tokens = read.file.get("tokenizer.ggml.tokens", list, None)
    embedding = read.file.tensors.get("token_embd.weight")
    if embedding is not None:
        rows = embedding.shape[0]
        vocab_size = read.size("vocab_size", rows)
        if vocab_size != rows:
            read.refuse("vocab_size", vocab_size, f"tensor token_embd.weight has {rows} rows")
        return vocab_size
    return read.size("vocab_size", REQUIRED if tokens is None else len(tokens))


def _q_lora_rank(read: Metadata) -> int:
    rank = read.size("attention.q_lora_rank", 0, minimum=0)
    if not read.file.tensors:
        return rank
    q_a = read.file.tensors.get("blk.0.attn_q_a.weight")
    if q_a is None:
        return 0
    rows = q_a.shape[0]
    if rank not in (0, rows):
        read.refuse("attention.q_lora_rank", rank, f"tensor {q_a.name} has {rows} rows")
    return rows


def _head_dims(read: Metadata, heads: int, layers: int, hidden_size: int) -> tuple[int, int]:
    """Sizes of a head of queries and keys, and of values; `layers` run. The size of a value has a default in llama.cpp:
    files of MiniCPM3 have no ``value_length``."""
    heads_kv = read.layer_size("attention.head_count_kv", 0, layers, heads)
    if heads_kv not in (1, heads):
        read.refuse("attention.head_count_kv", heads_kv, f"1 or head_count {heads} is expected")
    mla = read.size("attention.key_length_mla", 0, minimum=0) or (heads_kv == 1 and heads > 1)
    if mla:
        return read.size("attention.key_length_mla"), read.size("attention.value_length_mla")
    return read.size("attention.key_length"), read.size("attention.value_length", max(hidden_size // heads, 1))


def _feed_forward(read: Metadata, layers: int, nextn: int, vocab_size: int) -> dict[str, Any]:
    """The fields of the feed-forward networks: dense ones, experts and routing."""
    experts = read.size("expert_count", 0, minimum=0, maximum=1 << 16)
    dense = read.size("leading_dense_block_count", 0, minimum=0, maximum=layers)
    all_dense = experts == 0 or dense >= layers - nextn
    fields = {
        "first_k_dense_replace": layers - nextn if all_dense else dense,
        "intermediate_size": _intermediate_size(read, layers - nextn, layers - nextn if all_dense else dense),
        "n_routed_experts": 0,
        "num_experts_per_tok": 0,
        "n_shared_experts": 0,
        "moe_intermediate_size": 0,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "n_group": 1,
        "topk_group": 1,
        "group_score": "max",
    }
    if all_dense:
        return fields
    scoring_func = _scoring_func(read, layers, vocab_size)
    used = read.size("expert_used_count", maximum=experts)
    n_group, topk_group = _groups(read, experts, used, scoring_func)
    scale = read.get("expert_weights_scale", float, 0.0)
    if not (math.isfinite(scale) and scale >= 0):
        read.refuse("expert_weights_scale", scale, "a positive number is expected, or 0 for none")
    return fields | {
        "n_routed_experts": experts,
        "num_experts_per_tok": used,
        "n_shared_experts": read.size("expert_shared_count", 0, minimum=0, maximum=1 << 16),
        "moe_intermediate_size": read.layer_size("expert_feed_forward_length", dense, layers - nextn),
        "routed_scaling_factor": scale or 1.0,
        "norm_topk_prob": read.get("expert_weights_norm", bool, False),
        "scoring_func": scoring_func,
        "n_group": n_group,
        "topk_group": topk_group,
        # V2's softmax models rank a group by its best expert; the rule came with V3, and with it the sigmoid.
        "group_score": "top2" if scoring_func == "sigmoid" else "max",
    }


def _intermediate_size(read: Metadata, layers: int, dense: int) -> int:
    """The inner size of the `dense` layers in front of those with experts; without any, a file need not say it."""
    if dense:
        return read.layer_size("feed_forward_length", 0, dense)
    return read.layer_size("feed_forward_length", 0, layers, 0, minimum=0)


def _scoring_func(read: Metadata, layers: int, vocab_size: int) -> str:
    value = read.size("expert_gating_func", 0, minimum=0)
    if value == 0:
        # Files of deepseek2 from before the key was written are of V2, with one exception, told as llama.cpp tells it.
        is_glm_4_7_flash = layers in (47, 48) and vocab_size == 154880
        return "sigmoid" if is_glm_4_7_flash else FAMILIES[read.architecture].default_scoring_func
    if value not in SCORING_FUNCS:
        read.refuse("expert_gating_func", value, "pymla implements 1 (softmax) and 2 (sigmoid)")
    return SCORING_FUNCS[value]


def _groups(read: Metadata, experts: int, used: int, scoring_func: str) -> tuple[int, int]:
    n_group = read.size("expert_group_count", 0, minimum=0, maximum=experts)
    if n_group <= 1:
        return 1, 1
    if experts % n_group:
        read.refuse("expert_group_count", n_group, f"it does not divide expert_count {experts}")
    size = experts // n_group
    if scoring_func == "sigmoid" and size < 2:
        read.refuse("expert_group_count", n_group, f"groups of {experts} experts must hold two or more")
    topk_group = read.size("expert_group_used_count", maximum=n_group)
    if topk_group * size < used:
        read.refuse("expert_group_used_count", topk_group, f"groups of {size} experts cannot give {used}")
    return n_group, topk_group


def _rope_scaling(read: Metadata, context_length: int) -> tuple[Yarn | None, float]:
    """YaRN, and the linear factor; one of the two at most changes anything.

    transformers scales nothing but positions with a linear factor; llama.cpp multiplies the softmax scale by
    ``(1 + 0.1 ln(factor))^2``, too. No published model has one.
    """
    # llama.cpp takes the type for linear where only a factor is given.
    scaling = read.get("rope.scaling.type", str, "linear")
    if scaling == "none":
        return None, 1.0
    factor = read.get("rope.scaling.factor", float, 0.0) or 1.0
    if not 1.0 <= factor < 1e6:
        read.refuse("rope.scaling.factor", factor, "a number from 1 on is expected")
    if factor == 1.0:
        return None, 1.0
    log_multiplier = read.number("rope.scaling.yarn_log_multiplier", 0.0, maximum=10.0)
    if scaling == "linear" and not log_multiplier:
        return None, factor
    if scaling != "yarn":
        wanted = "yarn" if scaling == "linear" else "yarn, linear and none"
        beside = f" and yarn_log_multiplier {log_multiplier:g}" if log_multiplier else ""
        read.refuse("rope.scaling.type", scaling, f"with factor {factor:g}{beside}, pymla implements {wanted}")
    yarn = Yarn(
        factor=factor,
        original_context_length=_original_context_length(read, context_length),
        log_multiplier=log_multiplier,
        beta_fast=read.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=read.number("rope.scaling.yarn_beta_slow", 1.0),
    )
    if yarn.beta_fast < yarn.beta_slow:
        read.refuse("rope.scaling.yarn_beta_fast", yarn.beta_fast, f"it is below yarn_beta_slow {yarn.beta_slow:g}")
    return yarn, 1.0


def _original_context_length(read: Metadata, context_length: int) -> int:
    return read.size("rope.scaling.original_context_length", context_length, maximum=MAX_CONTEXT)


def _temperature(read: Metadata, yarn: Yarn | None) -> AttentionTemperature | None:
    """The attention temperature of a file; without a length of its own it begins where YaRN's original context ends, as
    in transformers' Mistral4."""
    scale = read.number("attention.temperature_scale", 0.0)
    if not scale:
        return None
    default = REQUIRED if yarn is None else yarn.original_context_length
    return AttentionTemperature(scale, read.size("attention.temperature_length", default, maximum=MAX_CONTEXT))
