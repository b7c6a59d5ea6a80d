"""What a GGUF file says about its model.

Metadata keys are those of llama.cpp's ``convert_hf_to_gguf.py`` (class DeepseekV2Model), defaults those of llama.cpp's
``load_arch_hparams`` for the architecture deepseek2. Two conventions exist for the sizes of a head: files made for the
MLA attention of llama.cpp (since April 2025) say ``head_count_kv`` 1 and give the size of a cache row as
``key_length`` and ``value_length``, the sizes of a head as ``key_length_mla`` and ``value_length_mla``; older files
have the sizes of a head in ``key_length`` and ``value_length`` and no ``*_mla``.
"""

import math
from dataclasses import dataclass

import numpy as np

from pymla.errors import PymlaError
from pymla.files.gguf_reader import REQUIRED, ModelFile

#: Architectures that run, as ``general.architecture`` names them.
ARCHITECTURES = ("deepseek2",)

SCORING_FUNCS = {1: "softmax", 2: "sigmoid"}

# A value above these is no model's: it is refused before anything is computed from it.
MAX_LAYERS = 4096
MAX_SIZE = 1 << 24
MAX_CONTEXT = 1 << 31

# Keys that change what a model computes, with the values at which they do not. attn_factor is among them because
# engines disagree on it: ik_llama.cpp multiplies the softmax scale by its square and leaves cos and sin alone,
# llama.cpp does both, and transformers' attention_factor, from which it is converted, replaces the factor on cos and
# sin only. yarn_attn_factor is read by llama.cpp and overwritten. No model of this architecture sets them.
_NEUTRAL = {
    "attention.temperature_scale": (0.0,),
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


@dataclass(frozen=True)
class Yarn:
    """YaRN: how rope's frequencies and the softmax scale change to extend the context (arXiv:2309.00071).

    Frequencies whose wave fits the original context more than `beta_fast` times stay, those that fit it less than
    `beta_slow` times are divided by `factor`, between the two they are mixed.
    """

    factor: float
    original_context_length: int
    log_multiplier: float  # 0.1 * mscale_all_dim; 0 where the model has no mscale_all_dim
    beta_fast: float = 32.0
    beta_slow: float = 1.0


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
    first_k_dense_replace: int  # layers from this one on have experts
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
    num_nextn_predict_layers: int = 0  # layers behind the others that predict further tokens; they are not run

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
        read = _Reader(file)
        for key, neutral in _NEUTRAL.items():
            read.require(key, neutral)
        layers = read.size("block_count", maximum=MAX_LAYERS)
        nextn = read.size("nextn_predict_layers", 0, minimum=0, maximum=MAX_LAYERS)
        if nextn >= layers:
            read.refuse("nextn_predict_layers", nextn, f"of block_count {layers} layers, one at least must remain")
        vocab_size = _vocab_size(read)
        context_length = read.size("context_length", maximum=MAX_CONTEXT)
        heads = read.size("attention.head_count")
        head_dim, v_head_dim = _head_dims(read, heads)
        rope_dim = read.size("rope.dimension_count")
        if rope_dim % 2 or rope_dim >= head_dim:
            read.refuse("rope.dimension_count", rope_dim, f"an even number below the head size {head_dim} is expected")
        return cls(
            architecture=read.architecture,
            name=file.get("general.name", str, file.path.stem),
            vocab_size=vocab_size,
            context_length=context_length,
            hidden_size=read.size("embedding_length"),
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
            yarn=_yarn(read, context_length),
            num_nextn_predict_layers=nextn,
        )

    @property
    def qk_head_dim(self) -> int:
        """Size of a query's or key's head: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention scores, ``mscale^2 / sqrt(qk_head_dim)``.

        With YaRN ``mscale = 1 + log_multiplier * ln(factor)``: DeepSeek scales all dimensions of a head here, instead
        of the rotated ones through cos and sin. V2-Lite 0.1147, V3 0.1352. As transformers' DeepseekV3Attention and,
        wherever the file has a log_multiplier, llama.cpp's ``deepseek2.cpp``.
        """
        mscale = 1.0 if self.yarn is None else 1.0 + self.yarn.log_multiplier * math.log(self.yarn.factor)
        return mscale**2 / math.sqrt(self.qk_head_dim)

    @property
    def rope_magnitude(self) -> float:
        """Factor on cos and sin.

        DeepSeek's is ``(1 + 0.1 mscale ln(factor)) / (1 + 0.1 mscale_all_dim ln(factor))``. A file stores
        ``mscale_all_dim`` only, as ``10 log_multiplier``; all models that have it have an equal ``mscale``, so the
        factor is 1. A model without it has ``mscale`` 1: then the numerator remains, as in transformers'
        ``_compute_yarn_parameters``. (llama.cpp has it in the softmax scale as well, then.)
        """
        if self.yarn is None or self.yarn.log_multiplier:
            return 1.0
        return 1.0 + 0.1 * math.log(self.yarn.factor)

    def inv_freq(self) -> np.ndarray:
        """Radians by which each pair of the rotated part turns per position.

        Without YaRN ``theta^(-2i/d)``. With it, frequencies are mixed from themselves and themselves divided by
        `factor`, along a ramp over the pairs: ``rope_yarn`` in ggml, ``_compute_yarn_parameters`` in transformers.

        Returns
        -------
        float64 (qk_rope_head_dim / 2,)
        """
        dim = self.qk_rope_head_dim
        freqs = self.rope_theta ** (-np.arange(0, dim, 2) / dim)
        if self.yarn is None:
            return freqs

        def pair_that_turns(rotations: float) -> float:
            """The pair, as a fraction, that makes so many rotations over the original context."""
            wavelength = self.yarn.original_context_length / (rotations * 2 * math.pi)
            return dim * math.log(wavelength) / (2 * math.log(self.rope_theta))

        low = max(math.floor(pair_that_turns(self.yarn.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(self.yarn.beta_slow)), dim - 1)
        interpolated = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
        return freqs / self.yarn.factor * interpolated + freqs * (1 - interpolated)


class _Reader:
    """Metadata under the architecture's prefix, with limits."""

    def __init__(self, file: ModelFile):
        self.file = file
        self.architecture = file.get("general.architecture", str)
        if self.architecture not in ARCHITECTURES:
            raise PymlaError(
                f"{file.path}: metadata general.architecture is {self.architecture!r}, which pymla does not run; "
                f"it runs {', '.join(ARCHITECTURES)} (DeepSeek V2, V3, R1 and their relatives)"
            )

    def refuse(self, key: str, value, reason: str):
        raise PymlaError(f"{self.file.path}: metadata {self.key(key)} is {value}; {reason}")

    def key(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def get(self, key: str, kind: type, default=REQUIRED):
        return self.file.get(self.key(key), kind, default)

    def size(self, key: str, default=REQUIRED, *, minimum: int = 1, maximum: int = MAX_SIZE):
        value = self.get(key, int, default)
        if value is not None and not minimum <= value <= maximum:
            self.refuse(key, value, f"a number from {minimum} to {maximum} is expected")
        return value

    def number(self, key: str, default=REQUIRED, *, minimum: float = 0.0, maximum: float = 1e9) -> float:
        """A number between the limits, both excluded unless it is the default."""
        value = self.get(key, float, default)
        if not minimum < value < maximum and value != default:
            self.refuse(key, value, f"a number between {minimum:g} and {maximum:g} is expected")
        return value

    def require(self, key: str, accepted: tuple[float, ...]) -> None:
        value = self.get(key, float, accepted[0])
        if value not in accepted:
            self.refuse(key, value, f"pymla does not implement other values than {accepted[-1]:g}")


def _vocab_size(read: _Reader) -> int:
    tokens = read.file.get("tokenizer.ggml.tokens", list, None)
    embedding = read.file.tensors.get("token_embd.weight")
    if embedding is not None:
        rows = embedding.shape[0]
        vocab_size = read.size("vocab_size", rows)
        if vocab_size != rows:
            read.refuse("vocab_size", vocab_size, f"tensor token_embd.weight has {rows} rows")
        return vocab_size
    return read.size("vocab_size", REQUIRED if tokens is None else len(tokens))


def _q_lora_rank(read: _Reader) -> int:
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


def _head_dims(read: _Reader, heads: int) -> tuple[int, int]:
    """Sizes of a head of queries and keys, and of values."""
    heads_kv = read.size("attention.head_count_kv", heads)
    if heads_kv not in (1, heads):
        read.refuse("attention.head_count_kv", heads_kv, f"1 or head_count {heads} is expected")
    mla = read.size("attention.key_length_mla", 0, minimum=0) or (heads_kv == 1 and heads > 1)
    suffix = "_mla" if mla else ""
    return read.size(f"attention.key_length{suffix}"), read.size(f"attention.value_length{suffix}")


def _feed_forward(read: _Reader, layers: int, nextn: int, vocab_size: int) -> dict:
    """The fields of ModelConfig that say what follows attention."""
    experts = read.size("expert_count", 0, minimum=0, maximum=1 << 16)
    dense = read.size("leading_dense_block_count", 0, minimum=0, maximum=layers)
    all_dense = experts == 0 or dense >= layers - nextn
    has_dense = all_dense or dense > 0
    fields = {
        "first_k_dense_replace": layers - nextn if all_dense else dense,
        "intermediate_size": read.size("feed_forward_length", REQUIRED if has_dense else 0, minimum=int(has_dense)),
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
        "moe_intermediate_size": read.size("expert_feed_forward_length"),
        "routed_scaling_factor": scale or 1.0,
        "norm_topk_prob": read.get("expert_weights_norm", bool, False),
        "scoring_func": scoring_func,
        "n_group": n_group,
        "topk_group": topk_group,
        # V2's softmax models rank a group by its best expert; the rule came with V3, and with it the sigmoid.
        "group_score": "top2" if scoring_func == "sigmoid" else "max",
    }


def _scoring_func(read: _Reader, layers: int, vocab_size: int) -> str:
    value = read.size("expert_gating_func", 0, minimum=0)
    if value == 0:
        # Files from before the key was written are of V2, with one exception, told as llama.cpp tells it.
        is_glm_4_7_flash = layers in (47, 48) and vocab_size == 154880
        return "sigmoid" if is_glm_4_7_flash else "softmax"
    if value not in SCORING_FUNCS:
        read.refuse("expert_gating_func", value, "pymla implements 1 (softmax) and 2 (sigmoid)")
    return SCORING_FUNCS[value]


def _groups(read: _Reader, experts: int, used: int, scoring_func: str) -> tuple[int, int]:
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


def _yarn(read: _Reader, context_length: int) -> Yarn | None:
    # llama.cpp takes the type for linear where only a factor is given.
    scaling = read.get("rope.scaling.type", str, "linear")
    if scaling == "none":
        return None
    factor = read.get("rope.scaling.factor", float, 0.0) or 1.0
    if not 1.0 <= factor < 1e6:
        read.refuse("rope.scaling.factor", factor, "a number from 1 on is expected")
    if factor == 1.0:
        return None
    if scaling != "yarn":
        read.refuse("rope.scaling.type", scaling, f"with factor {factor:g}, pymla implements yarn and none")
    yarn = Yarn(
        factor=factor,
        original_context_length=read.size("rope.scaling.original_context_length", context_length, maximum=MAX_CONTEXT),
        log_multiplier=read.number("rope.scaling.yarn_log_multiplier", 0.0, maximum=10.0),
        beta_fast=read.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=read.number("rope.scaling.yarn_beta_slow", 1.0),
    )
    if yarn.beta_fast < yarn.beta_slow:
        read.refuse("rope.scaling.yarn_beta_fast", yarn.beta_fast, f"it is below yarn_beta_slow {yarn.beta_slow:g}")
    return yarn
