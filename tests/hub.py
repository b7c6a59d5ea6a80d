"""Hugging Face folders with tiny checkpoints, made by hand."""

import json

import numpy as np

from pymla.text.byte_alphabet import CHARACTERS

YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16,
    "beta_slow": 2.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 96,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "routed_scaling_factor": 16,
    "topk_method": "group_limited_greedy",
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": False,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_parameters": YARN,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
V3 = V2 | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "rope_interleave": True,
}
V32 = V3 | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_topk": 20,
    "index_n_heads": 3,
    "index_head_dim": 32,
}
#: Its last layer shares the choice of the first.
GLM = V32 | {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "indexer_types": ["full", "shared"],
}
LITE = V2 | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}


def shapes(c):
    """Tensors of a checkpoint, named and shaped as Hugging Face has them."""
    hidden, heads, rank, width = (
        c["hidden_size"],
        c["num_attention_heads"],
        c["kv_lora_rank"],
        c["moe_intermediate_size"],
    )
    nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    found = {
        "model.embed_tokens.weight": (c["vocab_size"], hidden),
        "lm_head.weight": (c["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }

    def mlp(prefix, size):
        found.update({f"{prefix}{part}_proj.weight": (size, hidden) for part in ("gate", "up")})
        found[prefix + "down_proj.weight"] = (hidden, size)

    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attn = layer + "self_attn."
        found[layer + "input_layernorm.weight"] = found[layer + "post_attention_layernorm.weight"] = (hidden,)
        if c["q_lora_rank"]:
            found[attn + "q_a_proj.weight"] = (c["q_lora_rank"], hidden)
            found[attn + "q_a_layernorm.weight"] = (c["q_lora_rank"],)
            found[attn + "q_b_proj.weight"] = (heads * (nope + rope), c["q_lora_rank"])
        else:
            found[attn + "q_proj.weight"] = (heads * (nope + rope), hidden)
        found[attn + "kv_a_proj_with_mqa.weight"] = (rank + rope, hidden)
        found[attn + "kv_a_layernorm.weight"] = (rank,)
        found[attn + "kv_b_proj.weight"] = (heads * (nope + v), rank)
        found[attn + "o_proj.weight"] = (hidden, heads * v)
        if "index_topk" in c and (c.get("indexer_types") or ["full"] * (i + 1))[i] == "full":
            index_heads, size = c["index_n_heads"], c["index_head_dim"]
            found[attn + "indexer.wq_b.weight"] = (index_heads * size, c["q_lora_rank"])
            found[attn + "indexer.wk.weight"] = (size, hidden)
            found[attn + "indexer.k_norm.weight"] = found[attn + "indexer.k_norm.bias"] = (size,)
            found[attn + "indexer.weights_proj.weight"] = (index_heads, hidden)
        if i < c["first_k_dense_replace"]:
            mlp(layer + "mlp.", c["intermediate_size"])
            continue
        found[layer + "mlp.gate.weight"] = (c["n_routed_experts"], hidden)
        if c["model_type"] != "deepseek_v2":
            found[layer + "mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
        for expert in range(c["n_routed_experts"]):
            mlp(f"{layer}mlp.experts.{expert}.", width)
        mlp(layer + "mlp.shared_experts.", c["n_shared_experts"] * width)
    return found


def random_weights(c, seed=0):
    """Values that bfloat16 holds exactly."""
    rng = np.random.default_rng(seed)
    return {name: bf16(rng.normal(0, 0.3, shape).astype(np.float32)) for name, shape in shapes(c).items()}


def bf16(x):
    return (x.view(np.uint32) & 0xFFFF0000).view(np.float32)


def safetensors(path, tensors, dtype="F32"):
    """Write a safetensors file. `tensors` maps a name to float32 values, or to a pair of type and bytes."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        if isinstance(value, tuple):
            kind, value = value
            raw = value.tobytes()
        else:
            kind = dtype
            raw = {
                "F32": lambda x: x,
                "F16": lambda x: x.astype(np.float16),
                "F64": lambda x: x.astype(np.float64),
                "BF16": lambda x: (x.view(np.uint32) >> 16).astype(np.uint16),
            }[dtype](value).tobytes()
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def tokenizer_json(pre_tokenizers):
    letters = CHARACTERS
    merges = [("Ġ", "a"), ("t", "h"), ("th", "e"), ("1", "2"), (letters[0xD0], letters[0xBD]), ("Ċ", "Ċ")]
    merges += [("3", "3"), ("33", "3"), ("Ġ", "Ġ"), ("ĠĠ", "Ġ"), ("!", "!"), (":", "Ċ")]
    vocab = {letters[byte]: byte for byte in range(256)}
    vocab |= {left + right: 258 + i for i, (left, right) in enumerate(merges)}
    added = [("<｜begin▁of▁sentence｜>", 256, True), ("<｜end▁of▁sentence｜>", 257, True)]
    added += [("<｜fim▁hole｜>", 280, False), ("a▁word", 281, False)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": not special,
                "special": special,
            }
            for content, token_id, special in added
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                *pre_tokenizers,
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in merges],
        },
    }


TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"},
    "eos_token": "<｜end▁of▁sentence｜>",
    "chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
}
#: As the tokenizer.json of deepseek-coder has it: digits one by one, not by a regular expression.
CODER = [
    *(split(pattern) for pattern in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")),
    {"type": "Digits", "individual_digits": True},
]


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def hub_folder(folder, config, weights, dtype="F32", files=1):
    """A folder as the Hugging Face hub has it."""
    folder.mkdir()
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", tokenizer_json(CODER))
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    if files == 1:
        safetensors(folder / "model.safetensors", weights, dtype)
        return folder
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    where = {name: names[i % files] for i, name in enumerate(weights)}
    for file in names:
        safetensors(folder / file, {name: weights[name] for name in weights if where[name] == file}, dtype)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    return folder
