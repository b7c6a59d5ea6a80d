"""ModelConfig from metadata as converters write it, and everything it must refuse."""

import dataclasses
import math

import gguf_files
import numpy as np
import pytest

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.models.attention_temperature import AttentionTemperature
from pymla.models.config import Indexer, ModelConfig, Yarn
from pymla.models.metadata import NOT_RUN

# Metadata of published files, without the architecture's prefix.
V2_LITE = {
    "block_count": 27,
    "context_length": 163840,
    "embedding_length": 2048,
    "feed_forward_length": 10944,
    "leading_dense_block_count": 1,
    "vocab_size": 102400,
    "attention.head_count": 16,
    "attention.head_count_kv": 16,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.kv_lora_rank": 512,
    "attention.key_length": 192,
    "attention.value_length": 128,
    "expert_count": 64,
    "expert_used_count": 6,
    "expert_shared_count": 2,
    "expert_feed_forward_length": 1408,
    "expert_weights_scale": 1.0,
    "rope.dimension_count": 64,
    "rope.freq_base": 10000.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 40.0,
    "rope.scaling.original_context_length": 4096,
    "rope.scaling.yarn_log_multiplier": 0.0707,
}
MLA = {
    "attention.head_count_kv": 1,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.key_length_mla": 192,
    "attention.value_length_mla": 128,
}
V2 = V2_LITE | {
    "block_count": 60,
    "embedding_length": 5120,
    "feed_forward_length": 12288,
    "attention.head_count": 128,
    "attention.head_count_kv": 128,
    "attention.q_lora_rank": 1536,
    "expert_count": 160,
    "expert_feed_forward_length": 1536,
    "expert_weights_scale": 16.0,
    "expert_weights_norm": False,
    "expert_gating_func": 1,
    "expert_group_count": 8,
    "expert_group_used_count": 3,
}
V3 = (
    V2
    | MLA
    | {
        "block_count": 61,
        "embedding_length": 7168,
        "feed_forward_length": 18432,
        "leading_dense_block_count": 3,
        "vocab_size": 129280,
        "expert_count": 256,
        "expert_used_count": 8,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 2048,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "expert_group_count": 8,
        "expert_group_used_count": 4,
        "rope.scaling.yarn_log_multiplier": 0.1,
    }
)
GLM_4_7_FLASH = MLA | {
    "block_count": 48,
    "nextn_predict_layers": 1,
    "context_length": 202752,
    "embedding_length": 2048,
    "feed_forward_length": 10240,
    "leading_dense_block_count": 1,
    "vocab_size": 154880,
    "attention.head_count": 20,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.q_lora_rank": 768,
    "attention.kv_lora_rank": 512,
    "attention.key_length_mla": 256,
    "attention.value_length_mla": 256,
    "expert_count": 64,
    "expert_used_count": 4,
    "expert_shared_count": 1,
    "expert_feed_forward_length": 1536,
    "expert_weights_scale": 1.8,
    "expert_weights_norm": True,
    "rope.dimension_count": 64,
    "rope.freq_base": 1e6,
}
KIMI_K2 = V3 | {
    "context_length": 131072,
    "leading_dense_block_count": 1,
    "vocab_size": 163840,
    "attention.head_count": 64,
    "expert_count": 384,
    "expert_weights_scale": 2.827,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "rope.freq_base": 50000.0,
    "rope.scaling.factor": 32.0,
    "rope.scaling.yarn_beta_fast": 1.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}


@pytest.fixture
def load(tmp_path):
    """A function that writes metadata, and tensors of a given shape, and reads the configuration."""

    def load(metadata, shapes=None, arch="deepseek2", general=None):
        path = tmp_path / "model.gguf"
        entries = {f"{arch}.{key}": value for key, value in metadata.items()} | (general or {})
        tensors = {name: (np.zeros(shape, np.float32), ggml.F32) for name, shape in (shapes or {}).items()}
        return ModelConfig.from_gguf(ModelFile.open(gguf_files.write(path, entries, tensors, arch)))

    return load


def without(metadata, *keys):
    return {key: value for key, value in metadata.items() if key not in keys}


def test_v2_lite(load):
    config = load(V2_LITE, general={"general.name": "DeepSeek-V2-Lite"})
    assert config == ModelConfig(
        architecture="deepseek2",
        name="DeepSeek-V2-Lite",
        vocab_size=102400,
        context_length=163840,
        hidden_size=2048,
        num_hidden_layers=27,
        intermediate_size=10944,
        first_k_dense_replace=1,
        num_attention_heads=16,
        rms_norm_eps=float(np.float32(1e-6)),
        q_lora_rank=0,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        moe_intermediate_size=1408,
        routed_scaling_factor=1.0,
        norm_topk_prob=False,
        scoring_func="softmax",
        n_group=1,
        topk_group=1,
        group_score="max",
        rope_theta=10000.0,
        yarn=Yarn(40.0, 4096, float(np.float32(0.0707)), 32.0, 1.0),
        original_context_length=4096,
    )
    assert config.qk_head_dim == 192
    assert config.softmax_scale == pytest.approx(0.1147, abs=5e-5)
    assert config.rope_magnitude == 1.0


def test_the_two_conventions_agree(load):
    assert load(V2_LITE | MLA) == load(V2_LITE)


def test_v2(load):
    config = load(V2)
    assert (config.n_group, config.topk_group, config.group_score) == (8, 3, "max")
    assert (config.routed_scaling_factor, config.norm_topk_prob) == (16.0, False)
    assert config.q_lora_rank == 1536


def test_v3(load):
    config = load(V3)
    assert (config.n_group, config.topk_group, config.group_score) == (8, 4, "top2")
    assert (config.routed_scaling_factor, config.norm_topk_prob) == (2.5, True)
    assert config.scoring_func == "sigmoid"
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (128, 64, 128)
    assert config.first_k_dense_replace == 3
    assert config.softmax_scale == pytest.approx(0.1352, abs=5e-5)


def test_kimi_k2(load):
    config = load(KIMI_K2)
    assert (config.n_group, config.topk_group) == (1, 1)
    assert (config.yarn.beta_fast, config.yarn.beta_slow) == (1.0, 1.0)


def test_glm_4_7_flash(load):
    config = load(GLM_4_7_FLASH)
    assert config.scoring_func == "sigmoid"
    assert (config.num_hidden_layers, config.num_nextn_predict_layers) == (47, 1)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (192, 64, 256)
    assert config.yarn is None
    assert config.softmax_scale == pytest.approx(256**-0.5)
    assert load(without(GLM_4_7_FLASH, "nextn_predict_layers") | {"block_count": 47}).scoring_func == "sigmoid"
    assert load(GLM_4_7_FLASH | {"vocab_size": 154881}).scoring_func == "softmax"
    assert load(GLM_4_7_FLASH | {"expert_gating_func": 1}).scoring_func == "softmax"


def test_dense_model(load):
    config = load({key: value for key, value in V2_LITE.items() if "expert" not in key})
    assert config.n_routed_experts == 0
    assert config.first_k_dense_replace == config.num_hidden_layers == 27


def test_all_experts(load):
    config = load(without(V2_LITE, "feed_forward_length", "leading_dense_block_count", "expert_shared_count"))
    assert (config.first_k_dense_replace, config.intermediate_size, config.n_shared_experts) == (0, 0, 0)


def test_defaults(load):
    config = load(without(V2_LITE, "rope.freq_base", "attention.head_count_kv", "expert_weights_scale"))
    assert config.rope_theta == 10000.0
    assert config.routed_scaling_factor == 1.0
    assert config.name == "model"
    assert load(V2_LITE | {"expert_weights_scale": 0.0}).routed_scaling_factor == 1.0


def test_integers_where_numbers_are_expected(load):
    config = load(V2_LITE | {"rope.freq_base": 10000, "rope.scaling.factor": 40})
    assert isinstance(config.rope_theta, float)
    assert isinstance(config.yarn.factor, float)


def test_tensors_tell_vocabulary_and_q_lora(load):
    shapes = {"token_embd.weight": (40, 8), "blk.0.attn_q_a.weight": (24, 8)}
    config = load(without(V2_LITE, "vocab_size"), shapes)
    assert (config.vocab_size, config.q_lora_rank) == (40, 24)
    # A file may keep the key and have no q-LoRA.
    assert load(V2 | {"vocab_size": 40}, {"token_embd.weight": (40, 8)}).q_lora_rank == 0


def test_vocabulary_from_the_tokens(load):
    config = load(without(V2_LITE, "vocab_size"), general={"tokenizer.ggml.tokens": ["a", "b", "c"]})
    assert config.vocab_size == 3


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"vocab_size": 41}, "token_embd.weight has 40 rows"),
        ({"vocab_size": 40, "attention.q_lora_rank": 32}, "blk.0.attn_q_a.weight has 24 rows"),
    ],
)
def test_tensors_contradict(load, changed, words):
    with pytest.raises(PymlaError, match=words):
        load(V2_LITE | changed, {"token_embd.weight": (40, 8), "blk.0.attn_q_a.weight": (24, 8)})


# YaRN -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [{}, {"rope.scaling.type": "none"}, {"rope.scaling.type": "yarn"}])
@pytest.mark.parametrize("factor", [{}, {"rope.scaling.factor": 1.0}, {"rope.scaling.factor": 0.0}])
def test_no_yarn(load, scaling, factor):
    plain = {key: value for key, value in V2_LITE.items() if "scaling" not in key}
    config = load(plain | scaling | factor)
    assert config.yarn is None
    assert config.rope_magnitude == 1.0
    assert config.softmax_scale == pytest.approx(192**-0.5)
    np.testing.assert_allclose(config.inv_freq(), [10000 ** (-2 * i / 64) for i in range(32)], rtol=1e-15)


def test_no_factor_means_no_scaling(load):
    """A factor beside the type none is not used, as in llama.cpp."""
    assert load(V2_LITE | {"rope.scaling.type": "none"}).yarn is None


def test_yarn_without_log_multiplier(load):
    """mscale_all_dim 0: nothing on the softmax scale, mscale 1 on cos and sin."""
    config = load(without(V2_LITE, "rope.scaling.yarn_log_multiplier", "rope.scaling.original_context_length"))
    assert config.yarn == Yarn(40.0, 163840, 0.0)
    assert config.softmax_scale == pytest.approx(192**-0.5)
    assert config.rope_magnitude == pytest.approx(1 + 0.1 * math.log(40))


def yarn_config(load, dim, theta, yarn):
    base = load(V2_LITE | {"rope.dimension_count": dim, "attention.key_length": 256})
    return dataclasses.replace(base, rope_theta=theta, yarn=yarn)


YARNS = [
    (64, 10000.0, Yarn(40.0, 4096, 0.0707)),
    (64, 10000.0, Yarn(40.0, 4096, 0.1)),
    (64, 50000.0, Yarn(32.0, 4096, 0.1, 1.0, 1.0)),  # Kimi-K2: the ramp is one step
    (32, 10000.0, Yarn(4.0, 256, 0.1)),
    (128, 1e6, Yarn(8.0, 32768, 0.0)),
    (16, 100.0, Yarn(2.5, 64, 0.05, 8.0, 2.0)),
    (2, 10000.0, Yarn(40.0, 4096, 0.1)),
    (16, 10.0, Yarn(4.0, 1 << 20, 0.1, 1e5)),  # the ramp would end behind the last pair
]


@pytest.mark.parametrize(("dim", "theta", "yarn"), YARNS)
def test_inv_freq(load, dim, theta, yarn):
    """Pair by pair, by the wavelength: what is shorter than L / beta_fast stays, what is longer than L / beta_slow is
    interpolated, with the ramp's ends at whole pairs."""
    inv_freq = yarn_config(load, dim, theta, yarn).inv_freq()
    assert inv_freq.dtype == np.float64
    assert inv_freq.shape == (dim // 2,)

    def first_pair_with_wavelength(wavelength):
        return math.log(wavelength / (2 * math.pi), theta) * dim / 2

    low = max(0, math.floor(first_pair_with_wavelength(yarn.original_context_length / yarn.beta_fast)))
    high = min(dim - 1, math.ceil(first_pair_with_wavelength(yarn.original_context_length / yarn.beta_slow)))
    for i, actual in enumerate(inv_freq):
        plain = theta ** (-2 * i / dim)
        if i <= low:
            expected = plain
        elif i >= high:
            expected = plain / yarn.factor
        else:
            share = (i - low) / (high - low)
            expected = plain * ((1 - share) + share / yarn.factor)
        assert actual == pytest.approx(expected, rel=1e-14), i


@pytest.mark.parametrize(("dim", "theta", "yarn"), YARNS)
def test_same_as_transformers(load, dim, theta, yarn):
    pytest.importorskip("torch")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    config = yarn_config(load, dim, theta, yarn)
    scaling = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_context_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    mscale = 10 * yarn.log_multiplier
    if mscale:
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    theirs = transformers.DeepseekV3Config(
        max_position_embeddings=163840, qk_rope_head_dim=dim, rope_parameters=scaling
    )
    inv_freq, magnitude = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    np.testing.assert_allclose(config.inv_freq(), inv_freq.double().numpy(), rtol=1e-5)
    assert config.rope_magnitude == pytest.approx(magnitude, rel=1e-7)
    if mscale:
        modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
        expected = modeling.yarn_apply_mscale(theirs.rope_parameters, config.qk_head_dim**-0.5)
        assert config.softmax_scale == pytest.approx(expected, rel=1e-7)


def test_linear_scaling_is_that_of_transformers(load):
    pytest.importorskip("torch")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    config = load(without(V3, "rope.scaling.type", "rope.scaling.yarn_log_multiplier"))
    theirs = transformers.DeepseekV3Config(
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 40.0}, qk_rope_head_dim=64
    )
    inv_freq, magnitude = rope_utils.ROPE_INIT_FUNCTIONS["linear"](theirs, "cpu")
    np.testing.assert_allclose(config.inv_freq(), inv_freq.double().numpy(), rtol=1e-6)
    assert config.rope_magnitude == magnitude


# What is refused ------------------------------------------------------------------------------------------------------


def test_unknown_architecture(load):
    with pytest.raises(PymlaError, match=r"model\.gguf: metadata general\.architecture is 'llama'"):
        load({}, arch="llama")


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
        "attention.kv_lora_rank",
        "attention.key_length",
        "expert_used_count",
        "expert_feed_forward_length",
        "rope.dimension_count",
    ],
)
def test_missing(load, key):
    with pytest.raises(PymlaError, match=rf"model\.gguf: metadata deepseek2\.{key} is missing"):
        load(without(V2_LITE, key))


@pytest.mark.parametrize("key", ["attention.key_length_mla", "attention.value_length_mla"])
def test_missing_mla(load, key):
    with pytest.raises(PymlaError, match=rf"deepseek2\.{key} is missing"):
        load(without(V3, key))


def test_two_heads_with_one_of_the_cache(load):
    two = {"attention.head_count": 2}
    assert load(V3 | two).num_attention_heads == 2
    with pytest.raises(PymlaError, match=r"deepseek2\.attention\.key_length_mla is missing"):
        load(without(V3, "attention.key_length_mla") | two)


def test_missing_groups_used(load):
    with pytest.raises(PymlaError, match="expert_group_used_count is missing"):
        load(without(V3, "expert_group_used_count"))


@pytest.mark.parametrize("key", [*V2, "nextn_predict_layers", "attention.key_length_mla"])
def test_wrong_type(load, key):
    wrong = 5 if isinstance(V2.get(key), str | bool) else "five"
    with pytest.raises(PymlaError, match=rf"model\.gguf: metadata deepseek2\.{key} is '?{wrong}"):
        load(V2 | {key: wrong})


@pytest.mark.parametrize("key", [key for key, value in V2.items() if type(value) is int])
@pytest.mark.parametrize("value", [-1, 2**40, [1, 2, 3]], ids=["negative", "huge", "array"])
def test_absurd_sizes(load, key, value):
    with pytest.raises(PymlaError, match=rf"model\.gguf: metadata deepseek2\.{key} is"):
        load(V2 | {key: value})


@pytest.mark.parametrize("key", [key for key, value in V2.items() if isinstance(value, float)])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_absurd_numbers(load, key, value):
    with pytest.raises(PymlaError, match=rf"model\.gguf: metadata deepseek2\.{key} is {value}"):
        load(V2 | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", 0),
        ("attention.head_count_kv", 2),
        ("attention.head_count_kv", 0),
        ("attention.layer_norm_rms_epsilon", 0.0),
        ("attention.temperature_scale", -0.1),
        ("attention.sliding_window", 4096),
        ("block_count", 0),
        ("block_count", 100000),
        ("expert_gating_func", 3),
        ("expert_gating_func", 4),
        ("expert_group_count", 7),
        ("expert_group_count", 161),
        ("expert_group_used_count", 0),
        ("expert_group_used_count", 9),
        ("expert_used_count", 0),
        ("expert_used_count", 161),
        ("expert_used_count", 61),  # three groups of twenty
        ("final_logit_softcapping", 30.0),
        ("leading_dense_block_count", 61),
        ("logit_scale", 0.5),
        ("nextn_predict_layers", 60),
        ("rope.dimension_count", 63),
        ("rope.dimension_count", 192),
        ("rope.freq_base", 1.0),
        ("rope.scale_linear", 4.0),
        ("rope.scaling.attn_factor", 0.9),
        ("rope.scaling.factor", 0.5),
        ("rope.scaling.original_context_length", 0),
        ("rope.scaling.type", "linear"),
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.yarn_beta_fast", 0.5),
        ("rope.scaling.yarn_ext_factor", 0.5),
    ],
)
def test_not_implemented(load, key, value):
    with pytest.raises(PymlaError) as caught:
        load(V2 | {key: value})
    message = str(caught.value)
    blamed = "expert_group_used_count is 3" if (key, value) == ("expert_used_count", 61) else key
    assert f"metadata deepseek2.{blamed}" in message
    assert "model.gguf: " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("keys", "neutral", "others"),
    [
        (
            (
                "attention.scale",
                "attention.clamp_kqv",
                "attention.max_alibi_bias",
                "attention.sliding_window",
                "attn_logit_softcapping",
                "router_logit_softcapping",
                "final_logit_softcapping",
            ),
            (0.0,),
            (1.0, 0.5),
        ),
        (("logit_scale", "embedding_scale", "residual_scale", "rope.scale_linear"), (0.0, 1.0), (2.0, 0.5)),
        (
            ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"),
            (1.0,),
            (0.0, 2.0),
        ),
    ],
    ids=["off", "off or one", "one"],
)
def test_keys_that_would_change_what_is_computed(load, keys, neutral, others):
    plain = load(V2)
    for key in keys:
        for value in neutral:
            assert load(V2 | {key: value}) == plain
        for value in others:
            with pytest.raises(PymlaError, match=rf"metadata deepseek2\.{key} is {value}; .* than {neutral[-1]:g}$"):
                load(V2 | {key: value})


LARGEST = 1 << 24
PLAIN_EXPERTS = without(V2, "expert_group_count", "expert_group_used_count")


@pytest.mark.parametrize(
    ("key", "accepted", "refused"),
    [
        ("attention.head_count", [1, 128, LARGEST], [0, LARGEST + 1]),
        ("attention.kv_lora_rank", [1, LARGEST], [0, LARGEST + 1]),
        ("attention.layer_norm_rms_epsilon", [1e-12, 0.99], [0.0, 1.0]),
        ("attention.temperature_scale", [0.0, 0.1, 9e8], [-0.1, 1e9]),
        ("attention.value_length", [1, LARGEST], [0, LARGEST + 1]),
        ("attention.q_lora_rank", [0, 1, LARGEST], [-1, LARGEST + 1]),
        ("block_count", [1, 2, 4096], [0, 4097]),
        ("context_length", [1, 1 << 31], [0, (1 << 31) + 1]),
        ("embedding_length", [1, LARGEST], [0, LARGEST + 1]),
        ("expert_count", [0, 6, 1 << 16], [5, (1 << 16) + 1]),
        ("expert_feed_forward_length", [1, LARGEST], [0, LARGEST + 1]),
        ("expert_gating_func", [0, 1, 2], [-1, 3]),
        ("expert_shared_count", [0, 1, 1 << 16], [-1, (1 << 16) + 1]),
        ("expert_used_count", [1, 160], [0, 161]),
        ("expert_weights_scale", [0.0, 1e-6, 1e6], [-1e-6]),
        ("feed_forward_length", [1, LARGEST], [0, LARGEST + 1]),
        ("leading_dense_block_count", [0, 1, 60], [-1, 61]),
        ("logit_scale", [0.0, 1.0], [0.5, 2.0]),
        ("nextn_predict_layers", [0, 59], [-1, 60, 4097]),
        ("rope.dimension_count", [2, 190], [0, 191, 192]),
        ("rope.freq_base", [1.5, 9e8], [1.0, 1e9]),
        ("rope.scaling.factor", [0.0, 1.0, 999_999.0], [0.99, 1e6]),
        ("rope.scaling.original_context_length", [1, 1 << 31], [0, (1 << 31) + 1]),
        ("rope.scaling.yarn_beta_fast", [1.0, 9e8], [0.99, 1e9]),
        ("rope.scaling.yarn_beta_slow", [0.5, 32.0], [0.0, 33.0]),
        ("rope.scaling.yarn_log_multiplier", [0.0, 9.5], [-0.1, 10.0]),
        ("vocab_size", [1, LARGEST], [0, LARGEST + 1]),
    ],
)
def test_limits(load, key, accepted, refused):
    # Without the keys whose limits follow from the one in question.
    others = {"attention.head_count": ("attention.head_count_kv",), "block_count": ("leading_dense_block_count",)}
    base = without(PLAIN_EXPERTS, *others.get(key, ()))
    for value in accepted:
        assert load(base | {key: value})
    for value in refused:
        with pytest.raises(PymlaError, match=r"model\.gguf: metadata deepseek2\..* is "):
            load(base | {key: value})


def test_groups_must_give_the_experts_that_are_used(load):
    groups = {"expert_count": 16, "expert_group_count": 4, "expert_group_used_count": 2}
    assert load(V2 | groups | {"expert_used_count": 8}).topk_group == 2
    with pytest.raises(PymlaError, match="expert_group_used_count is 2; groups of 4 experts cannot give 9"):
        load(V2 | groups | {"expert_used_count": 9})
    assert load(V2 | groups | {"expert_group_count": 2, "expert_group_used_count": 1}).n_group == 2
    for count in (0, 1):
        one = load(V2 | groups | {"expert_used_count": 9, "expert_group_count": count})
        assert (one.n_group, one.topk_group) == (1, 1)
    assert load(V3 | groups | {"expert_group_count": 8, "expert_used_count": 4}).n_group == 8  # groups of two


def test_what_yarn_reads(load):
    config = load(V2 | {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0})
    assert (config.yarn.beta_fast, config.yarn.beta_slow) == (16.0, 2.0)


def test_layers_in_front_of_the_experts(load):
    some = load(V2 | {"leading_dense_block_count": 58, "nextn_predict_layers": 1})
    assert (some.num_hidden_layers, some.first_k_dense_replace, some.n_routed_experts) == (59, 58, 160)
    for dense in (59, 60):  # the layer that predicts further tokens does not count
        none = load(V2 | {"leading_dense_block_count": dense, "nextn_predict_layers": 1})
        assert (none.num_hidden_layers, none.first_k_dense_replace, none.n_routed_experts) == (59, 59, 0)
        assert (none.num_experts_per_tok, none.n_shared_experts, none.moe_intermediate_size) == (0, 0, 0)
        assert (none.routed_scaling_factor, none.norm_topk_prob, none.scoring_func) == (1.0, False, "softmax")
        assert (none.n_group, none.topk_group, none.group_score) == (1, 1, "max")
    with pytest.raises(PymlaError, match="feed_forward_length is missing"):
        load(without(V2, "feed_forward_length"))
    assert load(V2 | {"leading_dense_block_count": 0, "feed_forward_length": 0}).intermediate_size == 0


def test_linear_scaling(load):
    """llama.cpp takes a factor without a type for linear scaling. With a multiplier it is no such scaling."""
    plain = without(V2, "rope.scaling.type", "rope.scaling.yarn_log_multiplier")
    for scaling in ({}, {"rope.scaling.type": "linear"}):
        config = load(plain | scaling)
        assert (config.yarn, config.rope_linear_factor, config.rope_magnitude) == (None, 40.0, 1.0)
        assert config.softmax_scale == pytest.approx(192**-0.5)
        np.testing.assert_allclose(config.inv_freq(), [10000 ** (-2 * i / 64) / 40 for i in range(32)], rtol=1e-15)
    with pytest.raises(PymlaError, match=r"type is linear; with factor 40 and yarn_log_multiplier 0.0707"):
        load(without(V2, "rope.scaling.type"))


def test_groups_of_one_expert(load):
    with pytest.raises(PymlaError, match="two or more"):
        load(V3 | {"expert_group_count": 256, "expert_group_used_count": 8})
    assert load(V2 | {"expert_group_count": 160, "expert_group_used_count": 8}).n_group == 160


# Indexers of sparse attention -----------------------------------------------------------------------------------------

V32 = (
    V3
    | MLA
    | {
        "attention.indexer.head_count": 64,
        "attention.indexer.key_length": 128,
        "attention.indexer.top_k": 2048,
    }
)


def sparse(load, arch="deepseek32", **changed):
    """The configuration of V3.2, with some keys of the indexer changed."""
    return load(V32 | {f"attention.indexer.{key}": value for key, value in changed.items()}, arch=arch)


def test_v3_2(load):
    config = sparse(load)
    assert config.architecture == "deepseek32"
    assert config.indexer == Indexer(heads=64, head_dim=128, top_k=2048, full=(True,) * 61)
    assert dataclasses.replace(config, architecture="deepseek2", indexer=None) == load(V3 | MLA)
    assert config.dense() == dataclasses.replace(config, indexer=None)
    assert load(V32).indexer is None  # deepseek2 has none, whatever its file says


def test_v3_2_with_a_layer_that_predicts_further_tokens(load):
    config = load(V32 | {"block_count": 62, "nextn_predict_layers": 1}, arch="deepseek32")
    assert (config.num_hidden_layers, config.num_nextn_predict_layers, len(config.indexer.full)) == (61, 1, 61)


def test_layers_that_share_choices(load):
    types = [True] * 3 + [False] * 58
    assert sparse(load, "glm-dsa", types=types).indexer.full == tuple(types)
    assert sparse(load, "glm-dsa").indexer == Indexer(64, 128, 2048, (True,) * 61, interleave=True)
    # GLM-5.2, by the length of its context.
    full = load(V32 | {"context_length": 1 << 20}, arch="glm-dsa").indexer.full
    assert [i for i, each in enumerate(full) if each] == [0, 1, 2, *range(6, 61, 4)]
    assert all(load(V32 | {"context_length": 1 << 20}, arch="deepseek32").indexer.full)


def test_glm_without_a_gating_function(load):
    assert load(without(V32, "expert_gating_func"), arch="glm-dsa").scoring_func == "sigmoid"
    assert load(without(V3, "expert_gating_func")).scoring_func == "softmax"


@pytest.mark.parametrize("key", ["head_count", "key_length", "top_k"])
def test_missing_sizes_of_the_indexer(load, key):
    with pytest.raises(PymlaError, match=rf"deepseek32\.attention\.indexer\.{key} is missing"):
        load(without(V32, f"attention.indexer.{key}"), arch="deepseek32")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"key_length": 32}, "is 32; a multiple of 32, and at least the 64 rotated numbers, is expected"),
        ({"key_length": 100}, "is 100; a multiple of 32"),
        ({"top_k": 0}, "is 0; a number from 1"),
        ({"types": [True] * 60}, "is of 60 layers; 61 are expected"),
        ({"types": [False] + [True] * 60}, "is false for layer 0; there is no choice before it that it could share"),
        ({"types": [2] * 61}, "is not a list of true and false"),
        ({"types": True}, "types is True, but an array is expected"),
    ],
)
def test_indexers_that_are_refused(load, changed, words):
    with pytest.raises(PymlaError, match=words):
        sparse(load, "glm-dsa", **changed)


def test_an_indexer_needs_low_rank_queries(load):
    with pytest.raises(PymlaError, match=r"q_lora_rank is 0; the indexer's queries come from the low-rank ones"):
        load(without(V32, "attention.q_lora_rank"), arch="deepseek32")


# Other families -------------------------------------------------------------------------------------------------------

MINICPM3 = {
    "block_count": 62,
    "context_length": 32768,
    "embedding_length": 2560,
    "feed_forward_length": 6400,
    "vocab_size": 73448,
    "attention.head_count": 40,
    "attention.head_count_kv": 40,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.q_lora_rank": 768,
    "attention.kv_lora_rank": 256,
    "attention.key_length": 96,
    "rope.dimension_count": 32,
}
PLM = {
    "block_count": 32,
    "context_length": 4096,
    "embedding_length": 2048,
    "feed_forward_length": 8192,
    "vocab_size": 151936,
    "attention.head_count": 16,
    "attention.head_count_kv": 16,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.kv_lora_rank": 512,
    "attention.key_length": 192,
    "attention.value_length": 128,
    "rope.dimension_count": 64,
    "rope.freq_base": 100000.0,
}


def test_minicpm3(load):
    config = load(MINICPM3, arch="minicpm3")
    assert (config.first_k_dense_replace, config.n_routed_experts, config.intermediate_size) == (62, 0, 6400)
    assert (config.q_lora_rank, config.kv_lora_rank) == (768, 256)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (64, 32, 64)
    assert (config.rope_interleave, config.hidden_act) == (False, "silu")
    assert (config.embedding_scale, config.logit_scale) == (12.0, 10.0)
    assert config.residual_scale == pytest.approx(1.4 / 62**0.5)
    assert (config.original_context_length, config.rope_magnitude) == (32768, 1.0)


def test_what_minicpm3_reads(load):
    """The keys of llama.cpp's older MiniCPM, which its converter leaves out for MiniCPM3."""
    scales = {"embedding_scale": 2.5, "residual_scale": 0.5, "logit_scale": 4.0, "rope.scaling.attn_factor": 1.5}
    config = load(MINICPM3 | scales | {"rope.scaling.original_context_length": 4096}, arch="minicpm3")
    assert (config.embedding_scale, config.residual_scale, config.logit_scale) == (2.5, 0.5, 4.0)
    assert (config.original_context_length, config.rope_magnitude) == (4096, 1.5)
    for key in scales:
        for value in (-1.0, math.nan):
            with pytest.raises(PymlaError, match=rf"minicpm3\.{key} is {value}"):
                load(MINICPM3 | {key: value}, arch="minicpm3")
    with pytest.raises(PymlaError, match=r"minicpm3\.attention\.clamp_kqv is 1\.0"):
        load(MINICPM3 | {"attention.clamp_kqv": 1.0}, arch="minicpm3")


def test_plm(load):
    config = load(PLM, arch="plm")
    assert (config.rope_interleave, config.hidden_act) == (True, "relu2")
    assert (config.q_lora_rank, config.qk_nope_head_dim, config.v_head_dim) == (0, 128, 128)
    assert config.first_k_dense_replace == 32
    with pytest.raises(PymlaError, match=r"plm\.embedding_scale is 12\.0"):
        load(PLM | {"embedding_scale": 12.0}, arch="plm")


def test_mistral4(load):
    """A softmax, groups by their two best experts, and a temperature that files leave out."""
    config = load(V2, arch="mistral4")
    assert (config.scoring_func, config.n_group, config.group_score) == ("softmax", 8, "top2")
    assert config.attention_temperature == AttentionTemperature(0.1, 4096)
    given = {"attention.temperature_scale": 0.5, "attention.temperature_length": 100}
    assert load(V2 | given, arch="mistral4").attention_temperature == AttentionTemperature(0.5, 100)
    assert load(V2 | {"attention.temperature_scale": 0.0}, arch="mistral4").attention_temperature is None


def test_the_size_of_a_value_has_a_default(load):
    """As in llama.cpp; a file whose heads have another size is refused for its tensors."""
    assert load(without(V2_LITE, "attention.value_length")).v_head_dim == 128
    assert load(V2_LITE | {"attention.value_length": 96}).v_head_dim == 96


def test_an_unknown_architecture(load):
    with pytest.raises(PymlaError, match=r"'llama', which pymla does not run; pymla runs deepseek2, .*minicpm3, .*plm"):
        load(V2, arch="llama")


# Attention temperature, arrays, and what else an architecture leaves open ---------------------------------------------


def test_attention_temperature(load):
    scale = {"attention.temperature_scale": 0.1}
    given = load(V3 | scale | {"attention.temperature_length": 8192}).attention_temperature
    assert given == AttentionTemperature(pytest.approx(0.1), 8192)
    assert load(V3).attention_temperature is None
    assert load(V3 | {"attention.temperature_length": 8192}).attention_temperature is None
    assert load(V3 | scale).attention_temperature.length == 4096  # the original context
    with pytest.raises(PymlaError, match=r"attention\.temperature_length is missing"):
        load(V3 | scale | {"rope.scaling.type": "none"})
    with pytest.raises(PymlaError, match=r"attention\.temperature_length is 0"):
        load(V3 | scale | {"attention.temperature_length": 0})


def test_sizes_as_arrays(load):
    """As llama.cpp takes them: a number for each of block_count layers, those that predict further tokens included."""
    one = load(V2)
    arrays = {
        "attention.head_count": [128] * 60,
        "attention.head_count_kv": [128] * 60,
        "feed_forward_length": [12288] + [7] * 59,
        "expert_feed_forward_length": [0] + [1536] * 59,
    }
    assert load(V2 | arrays) == one
    further = {"nextn_predict_layers": 1, "block_count": 61}
    assert load(V2 | further | {"expert_feed_forward_length": [0] + [1536] * 59 + [99]}).moe_intermediate_size == 1536


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("expert_feed_forward_length", [0] + [1536] * 58 + [768], "is an array of 768 to 1536; pymla runs layers"),
        ("expert_feed_forward_length", [1536] * 59, "is an array; one number is expected, or 60, one for each layer"),
        ("expert_feed_forward_length", [0] * 60, "is 0; a number from 1"),
        ("expert_feed_forward_length", [1536.0] * 60, "is an array; one number is expected"),
        ("attention.head_count", [128] * 59 + [64], "is an array of 64 to 128"),
    ],
)
def test_arrays_that_are_refused(load, key, values, words):
    with pytest.raises(PymlaError, match=rf"model\.gguf: metadata deepseek2\.{key} {words}"):
        load(V2 | {key: values})


@pytest.mark.parametrize("name", NOT_RUN)
def test_architectures_that_do_not_run_are_refused_with_the_reason(load, name):
    with pytest.raises(PymlaError, match=rf"general\.architecture is '{name}', which pymla does not run, because it"):
        load(V3, arch=name)


@pytest.mark.parametrize(("kind", "words"), [("adapter", "a LoRA adapter"), ("imatrix", "an importance matrix")])
def test_files_that_hold_no_model(load, kind, words):
    with pytest.raises(PymlaError, match=f"metadata general.type is '{kind}': the file holds {words}"):
        load(V3, general={"general.type": kind})
    assert load(V3, general={"general.type": "model"}) == load(V3)
