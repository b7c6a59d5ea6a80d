"""Golden files: tiny random models with the logits that transformers computes for them.

Needs torch and transformers. The tests read what it writes and need neither, so both are imported where they are used.
"""

import dataclasses
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
from make_model import Shape, synthetic_tokenizer

SEED = 20
_SMALL = Shape(
    name="",
    hidden_size=64,
    num_hidden_layers=3,
    intermediate_size=96,
    moe_intermediate_size=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=1,
    num_attention_heads=4,
    vocab_size=288,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    context_length=128,
)
_YARN = {"yarn_factor": 4.0, "yarn_original": 32}

#: One model for each way a real one is built. Only DeepSeek V3's class scores experts by sigmoid.
SHAPES = {
    "v2-lite": dataclasses.replace(
        _SMALL, name="v2-lite", n_routed_experts=12, n_shared_experts=2, mscale_all_dim=0.707, **_YARN
    ),
    "v2": dataclasses.replace(
        _SMALL,
        name="v2",
        q_lora_rank=32,
        routed_scaling_factor=16.0,
        n_group=4,
        topk_group=2,
        mscale_all_dim=0.707,
        **_YARN,
    ),
    "v3": dataclasses.replace(
        _SMALL,
        name="v3",
        q_lora_rank=32,
        scoring_func="sigmoid",
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        n_group=4,
        topk_group=2,
        **_YARN,
    ),
    "moonlight": dataclasses.replace(
        _SMALL,
        name="moonlight",
        scoring_func="sigmoid",
        routed_scaling_factor=2.446,
        norm_topk_prob=True,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        num_attention_heads=3,
        n_routed_experts=10,
    ),
    # Its long factors are for longer sequences than the model has.
    "minicpm3": dataclasses.replace(
        _SMALL,
        name="minicpm3",
        architecture="minicpm3",
        moe_intermediate_size=0,
        n_routed_experts=0,
        num_experts_per_tok=0,
        n_shared_experts=0,
        first_k_dense_replace=3,
        num_attention_heads=2,
        q_lora_rank=48,
        rms_norm_eps=1e-5,
        yarn_original=128,
        rope_factors=(tuple(1.1 * 1.2**i for i in range(16)), tuple(1 + 0.05 * i for i in range(16))),
        tie_word_embeddings=True,
    ),
    "mistral4": dataclasses.replace(
        _SMALL,
        name="mistral4",
        architecture="mistral4",
        first_k_dense_replace=0,
        q_lora_rank=48,
        norm_topk_prob=True,
        temperature_scale=0.1,
        temperature_length=32,
        **_YARN,
    ),
}

#: mistral-common's names of modules outside the layers and inside, by those of transformers.
_MISTRAL_OUTER = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
_MISTRAL_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_a_norm",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a_with_mqa",
    "self_attn.kv_a_layernorm": "attention.kv_a_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.gate": "gate",
    "mlp.shared_experts.gate_proj": "shared_experts.w1",
    "mlp.shared_experts.down_proj": "shared_experts.w2",
    "mlp.shared_experts.up_proj": "shared_experts.w3",
}
_SPARSE = dataclasses.replace(
    _SMALL,
    q_lora_rank=32,
    scoring_func="sigmoid",
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
    n_routed_experts=8,
    num_experts_per_tok=3,
    index_topk=24,
    index_n_heads=16,  # of few heads no score may be above 0, and equal ones leave the choice open
    index_head_dim=64,
)
#: Models with an indexer; the long prompt has more tokens than it chooses.
SPARSE_SHAPES = {
    "v3.2": dataclasses.replace(_SPARSE, name="v3.2", architecture="deepseek32", n_group=4, topk_group=2, **_YARN),
    "glm-5": dataclasses.replace(
        _SPARSE,
        name="glm-5",
        architecture="glm-dsa",
        num_hidden_layers=4,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        indexer_types=("full", "shared", "shared", "full"),
    ),
}


#: transformers' classes of models, by a shape's name, where they are not those of DeepSeek.
CLASSES = {
    "GLM-4.7-Flash": "Glm4MoeLite",
    "Kimi-K2.5": "Kimi_K25",
    "Mistral-Large-3": "Mistral4",
    "Youtu-LLM-2B": "Youtu",
}


#: The same of other architectures than deepseek2, by their names.
CLASSES_OF_FAMILIES = {
    "deepseek32": "DeepseekV32",
    "glm-dsa": "GlmMoeDsa",
    "minicpm3": "MiniCPM3",
    "mistral4": "Mistral4",
}


def hf_class(shape: Shape) -> str:
    """The name of transformers' classes for a shape, without Config or ForCausalLM at its end."""
    if shape.architecture in CLASSES_OF_FAMILIES:
        return CLASSES_OF_FAMILIES[shape.architecture]
    return CLASSES.get(shape.name) or ("DeepseekV3" if shape.scoring_func == "sigmoid" else "DeepseekV2")


def hf_config(shape: Shape):
    """transformers' configuration of a shape."""
    import transformers

    family = hf_class(shape)
    if family == "Kimi_K25":
        return _with_vision(shape)
    config_class = getattr(transformers, f"{family}Config")
    names = {field.name for field in dataclasses.fields(config_class)}
    tokenizer = synthetic_tokenizer(shape.vocab_size)
    values = dataclasses.asdict(shape) | {
        "num_key_value_heads": shape.num_attention_heads,
        "q_lora_rank": shape.q_lora_rank or None,
        "first_k_dense_replace": shape.dense_layers,
        "indexer_types": list(shape.indexer_types) if shape.indexer_types else None,
        "mlp_layer_types": [
            "dense" if layer < shape.dense_layers else "sparse" for layer in range(shape.num_hidden_layers)
        ],
        "max_position_embeddings": shape.context_length,
        "rope_parameters": _rope_parameters(shape),
        "bos_token_id": tokenizer["tokenizer.ggml.bos_token_id"],
        "eos_token_id": tokenizer["tokenizer.ggml.eos_token_id"],
        "topk_method": "greedy" if shape.n_group == 1 else "group_limited_greedy",
    }
    only = {"num_mtp_layers": 0} if family == "DeepseekV3" else {}
    values = {name: value for name, value in values.items() if name in names} | only
    return config_class(**values, attn_implementation="eager")


def _rope_parameters(shape: Shape) -> dict:
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_factors:
        long, short = map(list, shape.rope_factors)
        rope |= {
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": short,
            "original_max_position_embeddings": shape.yarn_original,
            "attention_factor": shape.attention_factor,
        }
    if shape.yarn_factor > 1:
        rope |= {
            "rope_type": "yarn",
            "factor": shape.yarn_factor,
            "original_max_position_embeddings": shape.yarn_original,
            "beta_fast": shape.beta_fast,
            "beta_slow": shape.beta_slow,
            "mscale": shape.mscale_all_dim,
            "mscale_all_dim": shape.mscale_all_dim,
        }
    if shape.temperature_scale:
        rope["llama_4_scaling_beta"] = shape.temperature_scale
    return rope


def _with_vision(shape: Shape):
    """The configuration of a model that sees, whose language model is DeepSeek-V3's class."""
    from transformers import Kimi_K25Config

    text = hf_config(dataclasses.replace(shape, name="text"))
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 1}
    return Kimi_K25Config(
        text_config=text,
        vision_config=vision,
        projection_hidden_size=16,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )


def random_model(shape: Shape, seed: int):
    """transformers' float32 model with weights that matter: unit activations, clear expert choices, uneven norms."""
    import torch
    import transformers

    family = hf_class(shape)
    suffix = "ForConditionalGeneration" if family == "Kimi_K25" else "ForCausalLM"
    model = getattr(transformers, family + suffix)(hf_config(shape)).eval()
    generator = torch.Generator().manual_seed(seed)
    biases = {name: value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")}
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *biases.items()]:
            noise = torch.randn(value.shape, generator=generator)
            if name in biases:
                value.copy_(0.3 * noise)
            elif value.ndim == 1:
                value.copy_((not name.endswith(".bias")) + 0.2 * noise)
            elif "embed_tokens" in name:
                value.copy_(noise)
            else:
                gain = 3 if "mlp.gate." in name else 1.5
                value.copy_(gain * noise / value.shape[-1] ** 0.5)
    return model


def logits(model, ids) -> np.ndarray:
    """Logits of every position, float32 (T, V)."""
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(ids, np.int64))[None]).logits[0].float().numpy()


def prompts(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """Token ids: a single token, a short prompt, one past the original context length."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, shape.vocab_size, n, np.int32) for name, n in (("one", 1), ("short", 9), ("long", 100))
    }


def choices(model, ids, noise: float = 0.0) -> list[np.ndarray]:
    """Experts, and positions to attend to, that are chosen for every token in each layer, with relative `noise` on the
    embeddings."""
    import torch

    chosen = []
    generator = torch.Generator().manual_seed(0)

    def disturb(_module, _inputs, output):
        return output * (1 + noise * torch.randn(output.shape, generator=generator))

    def record(_module, _inputs, output):
        chosen.append(np.sort(output[2].numpy(), axis=-1))

    def record_positions(_module, _inputs, output):
        positions = output[0].numpy()  # with any others behind them where a token sees fewer
        seen = positions <= np.arange(len(positions))[:, None]
        chosen.append(np.sort(np.where(seen, positions, -1), axis=-1))

    modules = list(model.named_modules())
    hooks = [module.register_forward_hook(record) for name, module in modules if name.endswith("mlp.gate")]
    hooks += [m.register_forward_hook(record_positions) for name, m in modules if name.endswith("self_attn.indexer")]
    hooks.append(model.get_input_embeddings().register_forward_hook(disturb))
    try:
        logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return chosen


def choices_are_clear(model, ids, noise: float = 1e-5) -> bool:
    """Whether rounding cannot change which experts and positions are chosen, so that another engine must choose the
    same."""
    exact, disturbed = choices(model, ids), choices(model, ids, noise)
    return all(np.array_equal(a, b) for a, b in zip(exact, disturbed, strict=True))


def clear_model(shape: Shape, seed: int):
    """The first model from `seed` on whose choices are clear for all prompts, and its seed."""
    for candidate in range(seed, seed + 100):
        model = random_model(shape, candidate)
        if all(choices_are_clear(model, ids) for ids in prompts(shape, candidate).values()):
            return model, candidate
    raise RuntimeError(f"{shape.name}: no model with clear choices from seed {seed} on")


def save(model, shape: Shape, directory: Path):
    """A Hugging Face directory: configuration, safetensors and the synthetic tokenizer. Mistral-Large-3 is saved as
    Mistral publishes it."""
    import tokenizers

    if shape.name == "Mistral-Large-3":
        _save_consolidated(model, shape, directory)
    elif hf_class(shape) == "Kimi_K25":
        _save_kimi(model, directory)
    else:
        model.save_pretrained(directory)
    metadata = synthetic_tokenizer(shape.vocab_size)
    tokens = metadata["tokenizer.ggml.tokens"]
    bos, eos = (tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos"))
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens) if not token.startswith("[PAD")}
    bpe = tokenizers.models.BPE(vocab, merges)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in (bos, eos)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"add_bos_token": True, "add_eos_token": False, "bos_token": bos, "eos_token": eos, "pad_token": eos}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _save_kimi(model, directory: Path):
    """A checkpoint of a model that sees. transformers 5.24 itself would give the layers of the language model the name
    of those of the vision tower."""
    from safetensors.torch import save_file

    model.config.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": [type(model).__name__]}))
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, directory / "model.safetensors")


def _save_consolidated(model, shape: Shape, directory: Path):
    """A checkpoint for mistral-common: params.json and tensors by that package's names."""
    from safetensors.torch import save_file

    save_file(dict(_consolidated(model.state_dict())), directory / "consolidated.safetensors")
    (directory / "params.json").write_text(json.dumps(_params(shape)))


def _params(shape: Shape) -> dict:
    """The params.json of a shape."""
    sizes = ("vocab_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {name: getattr(shape, name) for name in sizes} | {
        "dim": shape.hidden_size,
        "n_layers": shape.num_hidden_layers,
        "n_heads": shape.num_attention_heads,
        "n_kv_heads": shape.num_attention_heads,
        "hidden_dim": shape.intermediate_size,
        "norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": shape.context_length,
        "tied_embeddings": shape.tie_word_embeddings,
        "yarn": {
            "factor": shape.yarn_factor,
            "original_max_position_embeddings": shape.yarn_original,
            "beta": shape.beta_fast,
            "alpha": shape.beta_slow,
            "apply_scale": False,
        },
        "llama_4_scaling": {
            "beta": shape.temperature_scale,
            "original_max_position_embeddings": shape.temperature_length,
        },
        "moe": {
            "first_k_dense_replace": shape.first_k_dense_replace,
            "route_every_n": 1,
            "num_experts": shape.n_routed_experts,
            "num_experts_per_tok": shape.num_experts_per_tok,
            "num_expert_groups": shape.n_group,
            "num_expert_groups_per_tok": shape.topk_group,
            "routed_scale": shape.routed_scaling_factor,
            "expert_hidden_dim": shape.moe_intermediate_size,
            "num_shared_experts": shape.n_shared_experts,
        },
    }


def _consolidated(state):
    """Names and values of a model's tensors as mistral-common has them."""
    for name, value in state.items():
        module = name.removesuffix(".weight")
        if module in _MISTRAL_OUTER:
            yield f"{_MISTRAL_OUTER[module]}.weight", value
            continue
        layer, _, inner = module.removeprefix("model.layers.").partition(".")
        if inner in _MISTRAL_LAYER:
            yield f"layers.{layer}.{_MISTRAL_LAYER[inner]}.weight", value
            continue
        parts = ("w2",) if inner.endswith("down_proj") else ("w1", "w3")
        for expert, matrix in enumerate(value):
            for part, weights in zip(parts, matrix.chunk(len(parts)), strict=True):
                yield f"layers.{layer}.experts.{expert}.{part}.weight", weights.contiguous()


def to_gguf(model, shape: Shape, path: Path, **options) -> Path:
    """Convert a transformers model; `options` are convert's."""
    from pymla.make.convert import convert

    with tempfile.TemporaryDirectory() as directory:
        save(model, shape, Path(directory))
        convert(directory, path, **{"qtype": "f32", "pre": "deepseek-llm", "name": shape.name} | options)
    return path


def make_golden(name: str, out: Path, seed: int) -> dict:
    """Write ``NAME.gguf`` and ``NAME.npz`` (ids and logits of every prompt); return their provenance."""
    shape = (SHAPES | SPARSE_SHAPES)[name]
    model, used_seed = clear_model(shape, seed)
    to_gguf(model, shape, out / f"{name}.gguf")
    arrays = {}
    for prompt, ids in prompts(shape, used_seed).items():
        arrays[f"{prompt}_ids"] = ids
        arrays[f"{prompt}_logits"] = logits(model, ids)
    np.savez_compressed(out / f"{name}.npz", **arrays)
    return {"seed": used_seed, "class": type(model).__name__, "shape": dataclasses.asdict(shape)}


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parents[1] / "tests" / "golden",
    help="Folder to write to.  [default: tests/golden]",
)
@click.option("--seed", default=SEED, show_default=True)
@click.option("--name", "names", multiple=True, type=click.Choice(list(SHAPES | SPARSE_SHAPES)), help="[default: all]")
def main(out, seed, names):
    """Write the golden models, their logits and provenance.json, in which models that are not written stay."""
    import torch
    import transformers

    out.mkdir(parents=True, exist_ok=True)
    provenance = {
        "command": " ".join(["python tools/make_golden.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "computed": "float32, eager attention, on the CPU",
    }
    path = out / "provenance.json"
    kept = json.loads(path.read_text())["models"] if names else {}
    written = {name: provenance | make_golden(name, out, seed) for name in names or SHAPES | SPARSE_SHAPES}
    path.write_text(json.dumps({"models": kept | written}, indent=1) + "\n")


if __name__ == "__main__":
    main()
