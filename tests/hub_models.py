"""Hugging Face folders of every architecture that `pymla convert` knows: tiny, random, named and laid out as published.

They are written without transformers. `tools/golden_converted.py` gives them to llama.cpp's converter.
"""

import base64
import struct
from typing import NamedTuple

import numpy as np
from hub import CODER, GLM, LITE, TOKENIZER_CONFIG, V2, V3, V32, bf16, safetensors, shapes, tokenizer_json, write_json

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.05}
_PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_NO_GROUPS = {"n_group": 1, "topk_group": 1}
_VISION = {"vision_config": {"hidden_size": 16, "num_hidden_layers": 1}}


class Model(NamedTuple):
    """A published model in small."""

    config: dict  # config.json, or params.json
    sizes: dict  # of its language model, as config.json has them
    names: str = "plain"  # how tensors are named: see `_stored_name`
    nextn: int = 0  # layers that predict further tokens
    tokenizer: str = "bpe"  # see `_TOKENIZERS`
    file: str = "config.json"


def _plain(config, **options):
    return Model(config, config, **options)


def _multimodal(architecture, model_type, text, **options):
    config = {"architectures": [architecture], "model_type": model_type, "text_config": text, **_VISION}
    return Model(config | {"tie_word_embeddings": False}, text, **options)


_V2 = V2 | {"scoring_func": "softmax"}
_V3 = V3 | {"scoring_func": "sigmoid", "num_nextn_predict_layers": 1}
_GLM_TOKENS = {"bos_token_id": None, "eos_token_id": [282, 284, 285], "pad_token_id": 282}
_KIMI = _V3 | _NO_GROUPS | {"model_type": "kimi_k2", "num_nextn_predict_layers": 0, "bos_token_id": 270}
_KIMI |= {"eos_token_id": 271, "pad_token_id": 299}
_MOONLIGHT = _KIMI | _PLAIN_ROPE | {"q_lora_rank": None, "model_type": "deepseek_v3"}
_MISTRAL_ROPE = {"rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0}
_MISTRAL_ROPE |= {"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64}
_MISTRAL_ROPE |= {"llama_4_scaling_beta": 0.1, "partial_rotary_factor": 1 / 3}
_MISTRAL_4 = V2 | _NO_GROUPS
_MISTRAL_4 |= {"model_type": "mistral4", "rope_parameters": _MISTRAL_ROPE}
_MISTRAL_4 |= {"norm_topk_prob": True, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0}
_MISTRAL_4 = {key: value for key, value in _MISTRAL_4.items() if key not in ("topk_method", "architectures")}

#: Sizes of a model without experts.
_DENSE = {key: value for key, value in V2.items() if not key.startswith(("moe", "n_", "num_experts", "topk", "routed"))}
_DENSE |= _PLAIN_ROPE | {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}
del _DENSE["first_k_dense_replace"], _DENSE["norm_topk_prob"]
_MINICPM3 = _DENSE | {
    "architectures": ["MiniCPM3ForCausalLM"],
    "model_type": "minicpm3",
    "v_head_dim": 32,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "long_factor": [1 + 0.5 * i for i in range(8)],
        "short_factor": [1 + 0.25 * i for i in range(8)],
        "original_max_position_embeddings": 256,
    },
}
_PLM = _DENSE | {"architectures": ["PLMForCausalLM"], "model_type": "plm", "hidden_act": "relu2", "q_lora_rank": None}
_YOUTU = _DENSE | {"architectures": ["YoutuForCausalLM"], "model_type": "youtu", "rope_interleave": True}

#: params.json of Mistral-Large-3, and the same sizes under the names of config.json.
_MISTRAL_3 = _V2 | _NO_GROUPS | {"model_type": "mistral_large_3", "n_shared_experts": 1}
_PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "hidden_dim": 96,
    "n_heads": 2,
    "n_kv_heads": 2,
    "norm_eps": 1e-6,
    "vocab_size": 300,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tied_embeddings": False,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 96,
    "llama_4_scaling": {"original_max_position_embeddings": 64, "beta": 0.1},
    "yarn": {
        "original_max_position_embeddings": 64,
        "factor": 4.0,
        "apply_scale": False,
        "beta": 32.0,
        "alpha": 1.0,
    },
    "moe": {
        "expert_parallel": 1,
        "first_k_dense_replace": 1,
        "route_every_n": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
        "routed_scale": 1.0,
        "expert_hidden_dim": 32,
        "num_shared_experts": 1,
    },
    "vision_encoder": {"hidden_size": 16, "num_hidden_layers": 1},
}

MODELS = {
    "V2-Lite": _plain(LITE | {"scoring_func": "softmax"}),
    "V2": _plain(_V2),
    "V3": _plain(_V3, nextn=1),
    "V3.2": _plain(V32 | {"scoring_func": "sigmoid", "num_nextn_predict_layers": 1}, nextn=1),
    "GLM-4.7-Flash": _plain(
        V3
        | _NO_GROUPS
        | _PLAIN_ROPE
        | _GLM_TOKENS
        | {
            "architectures": ["Glm4MoeLiteForCausalLM"],
            "model_type": "glm4_moe_lite",
            "num_nextn_predict_layers": 1,
            "mlp_layer_types": ["dense", "sparse"],
        },
        nextn=1,
        tokenizer="glm",
    ),
    "GLM-5": _plain(
        GLM | _NO_GROUPS | _PLAIN_ROPE | _GLM_TOKENS | {"scoring_func": "sigmoid", "num_nextn_predict_layers": 1},
        nextn=1,
        tokenizer="glm",
    ),
    "Kimi-K2": _plain(_KIMI, tokenizer="tiktoken"),
    "Kimi-K2.5": _multimodal("KimiK25ForConditionalGeneration", "kimi_k25", _KIMI, names="kimi", tokenizer="tiktoken"),
    "Kimi-VL": _multimodal("KimiVLForConditionalGeneration", "kimi_vl", _MOONLIGHT, names="kimi", tokenizer="tiktoken"),
    "Moonlight": _plain(_MOONLIGHT, tokenizer="tiktoken"),
    "Mistral-Large-3": Model(_PARAMS, _MISTRAL_3, names="mistral", tokenizer="tekken", file="params.json"),
    "Mistral-Small-4": _multimodal("Mistral3ForConditionalGeneration", "mistral3", _MISTRAL_4, names="stacked"),
    "MiniCPM3": _plain(_MINICPM3, tokenizer="sentencepiece"),
    "PLM": _plain(_PLM),
    "Youtu-LLM": _plain(_YOUTU),
}


def language_weights(model, seed=0):
    """Tensors of the language model by transformers' names, without the prefix ``model.``: values that bfloat16 holds
    exactly. Layers that predict further tokens are behind the others."""
    c = model.sizes
    layers = c["num_hidden_layers"]
    types = c.get("indexer_types") or ["full"] * layers
    dense = c.get("first_k_dense_replace", layers + model.nextn)
    found = shapes(
        {"moe_intermediate_size": 0}
        | c
        | {"num_hidden_layers": layers + model.nextn, "first_k_dense_replace": dense}
        | {"indexer_types": [*types, *["full"] * model.nextn]}
        # The helper gives every other type a bias of experts.
        | {"model_type": "deepseek_v3" if "noaux_tc" in c.get("topk_method", "") else "deepseek_v2"}
    )
    if c["model_type"] == "plm":
        found = {name: shape for name, shape in found.items() if "gate_proj" not in name}
    if c.get("tie_word_embeddings"):
        del found["lm_head.weight"]
    for layer in range(layers, layers + model.nextn):
        found |= _nextn(f"model.layers.{layer}.", c["hidden_size"], c["vocab_size"])
    rng = np.random.default_rng(seed)
    values = {name: bf16(rng.normal(0, 0.3, shape).astype(np.float32)) for name, shape in found.items()}
    return {name.removeprefix("model."): value for name, value in values.items()}


def _nextn(prefix, hidden, vocab):
    matrices = {"eh_proj": (hidden, 2 * hidden), "embed_tokens": (vocab, hidden), "shared_head.head": (vocab, hidden)}
    sizes = matrices | dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (hidden,))
    return {f"{prefix}{module}.weight": shape for module, shape in sizes.items()}


def stored_weights(model, seed=0):
    """The tensors of the checkpoint."""
    weights = language_weights(model, seed)
    if model.names == "stacked":
        weights = stacked(weights, model.sizes["n_routed_experts"])
    found = {_stored_name(name, model.names): value for name, value in weights.items()}
    if model.names != "plain":
        other = np.ones((8, 8), np.float32)
        towers = {
            "kimi": ("vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.weight"),
            "stacked": ("model.vision_tower.patch_conv.weight", "model.multi_modal_projector.linear_1.weight"),
            "mistral": ("vision_encoder.patch_conv.weight", "vision_language_adapter.w_in.weight"),
        }
        found |= dict.fromkeys(towers[model.names], other)
    return found


def stacked(weights, experts):
    """Weights with the experts of a layer in the tensors that transformers 5 holds them in."""
    rest = {name: value for name, value in weights.items() if ".experts." not in name}
    for prefix in sorted({name.partition(".experts.")[0] for name in weights if ".experts." in name}):

        def stack(part, prefix=prefix):
            return np.stack([weights[f"{prefix}.experts.{i}.{part}_proj.weight"] for i in range(experts)])

        rest[f"{prefix}.experts.gate_up_proj"] = np.concatenate([stack("gate"), stack("up")], axis=1)
        rest[f"{prefix}.experts.down_proj"] = stack("down")
    return rest


def _stored_name(name, style):
    """A name as checkpoints have it: with prefixes, or as mistral-common has it."""
    if style == "mistral":
        return _mistral_name(name)
    inner = name if name == "lm_head.weight" else f"model.{name}"
    if style == "kimi":
        return f"language_model.{inner}"
    return inner.replace("model.", "model.language_model.", 1) if style == "stacked" else inner


def _mistral_name(name):
    outer = {"embed_tokens": "tok_embeddings", "lm_head": "output"}
    module, _, rest = name.partition(".")
    if module != "layers":
        return f"{outer.get(module, module)}.{rest}"
    for old, new in (
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_a_layernorm", "attention.q_a_norm"),
        ("self_attn.kv_a_layernorm", "attention.kv_a_norm"),
        ("self_attn.q_a_proj", "attention.wq_a"),
        ("self_attn.q_b_proj", "attention.wq_b"),
        ("self_attn.kv_a_proj_with_mqa", "attention.wkv_a_with_mqa"),
        ("self_attn.kv_b_proj", "attention.wkv_b"),
        ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate.", "gate."),
        ("mlp.experts", "experts"),
        ("mlp.shared_experts", "shared_experts"),
        ("mlp.", "feed_forward."),
        ("gate_proj", "w1"),
        ("down_proj", "w2"),
        ("up_proj", "w3"),
    ):
        name = name.replace(old, new)
    return name


def glm_tokenizer(folder):
    """Byte-level BPE with the special tokens of GLM."""
    tokenizer = tokenizer_json(CODER)
    names = ("<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>")
    added = [
        {"id": 282 + i, "content": name, "special": True, "normalized": False, "single_word": False}
        | {"lstrip": False, "rstrip": False}
        for i, name in enumerate(names)
    ]
    tokenizer["added_tokens"] = tokenizer["added_tokens"][2:] + added
    write_json(folder / "tokenizer.json", _in_vocabulary(tokenizer))
    settings = {"eos_token": names[0], "pad_token": names[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", settings)


def _in_vocabulary(tokenizer):
    """A tokenizer.json whose added tokens are in its vocabulary, too: otherwise the tokenizers package, which
    llama.cpp's converter asks, gives them ids of its own."""
    tokenizer["model"]["vocab"] |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    return tokenizer


def bpe_tokenizer(folder):
    write_json(folder / "tokenizer.json", _in_vocabulary(tokenizer_json(CODER)))
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | {"tokenizer_class": "PreTrainedTokenizerFast"})


#: Byte pairs in the order of their ranks, behind the 256 bytes.
PAIRS = (b" a", b"th", b"the", b"in", b"er", b" the", b"an", b"\xd0\xbd", b"  ", b"    ", b"ing", b"12", b"on", b"ion")


def ranks():
    return {token: rank for rank, token in enumerate([*(bytes((byte,)) for byte in range(256)), *PAIRS])}


def tiktoken_tokenizer(folder):
    """Kimi's: byte pairs, then special tokens, of which some have names."""
    lines = (base64.b64encode(token) + b" %d" % rank for token, rank in ranks().items())
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    names = {270: "[BOS]", 271: "[EOS]", 272: "<|im_end|>", 298: "[UNK]", 299: "[PAD]"}
    decoder = {str(i): {"content": name, "special": True} for i, name in names.items()}
    settings = {"added_tokens_decoder": decoder, "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": "{{ messages[0]['content'] }}"})


def tekken_tokenizer(folder, special=30):
    """Mistral's: special tokens, of which the file names none, then byte pairs."""
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for token, rank in ranks().items()
    ]
    config = {
        "pattern": r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+|\s+",
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": special + len(vocab),
        "default_num_special_tokens": special,
        "version": "v3",
    }
    write_json(folder / "tekken.json", {"config": config, "vocab": vocab, "type": "Tekken", "version": 1})
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")


def _varint(number):
    found = b""
    while number > 127:
        found, number = found + bytes((number & 127 | 128,)), number >> 7
    return found + bytes((number,))


def _field(number, value):
    """A field of a protocol buffer: a message or a text, a float, or an integer."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


#: Text, score and kind of the tokens of a SentencePiece model: 1 normal, 2 unknown, 3 control, 6 a byte.
PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
PIECES += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
PIECES += [(text, -float(i), 1) for i, text in enumerate(["▁a", "th", "the", "▁", *"athebn", "н"])]


def sentencepiece_bytes(pieces=PIECES, normaliser="identity", dummy_prefix=True):
    """A tokenizer.model."""
    found = b"".join(_field(1, _field(1, text) + _field(2, score) + _field(3, kind)) for text, score, kind in pieces)
    # BPE, which falls back to bytes; blanks stay as they are.
    trainer = _field(3, 2) + _field(35, 1)
    normaliser = _field(1, normaliser) + _field(3, int(dummy_prefix)) + _field(4, 0) + _field(5, 1)
    return found + _field(2, trainer) + _field(3, normaliser)


def sentencepiece_tokenizer(folder):
    """MiniCPM3's: a tokenizer.model with added tokens in two files."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes())
    write_json(folder / "added_tokens.json", {"<|tool|>": 280, "a▁b": 281})
    decoder = {
        "1": {"content": "<s>", "special": True},
        "2": {"content": "</s>", "special": True},
        "282": {"content": "<|im_end|>", "special": False},
        "283": {"content": "x▁y", "special": False},
    }
    settings = {"added_tokens_decoder": decoder, "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    write_json(folder / "tokenizer_config.json", settings | {"add_eos_token": False, "chat_template": "{{ 1 }}"})


_TOKENIZERS = {
    "bpe": bpe_tokenizer,
    "glm": glm_tokenizer,
    "tiktoken": tiktoken_tokenizer,
    "tekken": tekken_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
}


def write_folder(folder, name):
    """The folder of a model of `MODELS`."""
    model = MODELS[name]
    folder.mkdir()
    config = model.config
    if model.tokenizer == "sentencepiece":
        config = config | {"bos_token_id": 1, "eos_token_id": [2, 282]}
    write_json(folder / model.file, config)
    if model.file != "config.json":  # llama.cpp's converter wants one, of which it uses nothing
        write_json(folder / "config.json", {"architectures": ["MistralLarge3ForCausalLM"]})
    weights = "consolidated.safetensors" if model.names == "mistral" else "model.safetensors"
    safetensors(folder / weights, stored_weights(model))
    _TOKENIZERS[model.tokenizer](folder)
    write_json(folder / "generation_config.json", SAMPLING)
    return folder
