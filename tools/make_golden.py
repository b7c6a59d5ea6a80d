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

from pymla import ggml
from pymla.files import gguf_writer
from pymla.files.gguf_writer import NewTensor
from pymla.make.model_metadata import FILE_TYPES, model_metadata

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

#: Names of modules in transformers' models of the architectures that `convert` does not know, and those of tensors.
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.q_proj": "attn_q",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
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
    """A Hugging Face directory: configuration, safetensors and the synthetic tokenizer.

    The tensors of another class than DeepSeek's are those of DeepSeek-V3, and are saved as such a checkpoint.
    """
    import tokenizers

    if shape.name in CLASSES:
        _save_as_v3(model, shape, directory)
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


def _save_as_v3(model, shape: Shape, directory: Path):
    """The language model of a model, as a checkpoint of DeepSeek-V3."""
    from safetensors.torch import save_file

    others = ["model.vision_tower.", "model.mm_projector."] + ["lm_head."] * shape.tie_word_embeddings
    state = {
        name.replace("model.language_model.", "model."): value.contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith(tuple(others))
    }
    save_file(state, directory / "model.safetensors")
    config = hf_config(dataclasses.replace(shape, name="", scoring_func="sigmoid")).to_dict()
    config |= {"architectures": ["DeepseekV3ForCausalLM"], "scoring_func": shape.scoring_func}
    config |= {"rope_parameters": _rope_parameters(shape)}
    (directory / "config.json").write_text(json.dumps(config))


def to_gguf(model, shape: Shape, path: Path, **options) -> Path:
    """Convert a transformers model; `options` are convert's, where it knows the architecture."""
    from pymla.make.convert import convert

    if shape.architecture not in ("deepseek2", "deepseek32", "glm-dsa"):
        return write_gguf(model, shape, path)
    with tempfile.TemporaryDirectory() as directory:
        save(model, shape, Path(directory))
        convert(directory, path, **{"qtype": "f32", "pre": "deepseek-llm", "name": shape.name} | options)
    return path


def write_gguf(model, shape: Shape, path: Path) -> Path:
    """Write a transformers model as a file of float32, in the layout "kv_b"."""
    arrays = {_tensor_name(name): value.numpy() for name, value in model.state_dict().items()}
    if shape.tie_word_embeddings:
        del arrays["output.weight"]
    for name, factors in zip(("long", "short"), shape.rope_factors or (), strict=False):
        arrays[f"rope_factors_{name}.weight"] = np.array(factors, np.float32)
    tensors = [
        NewTensor(name, array.shape, ggml.F32, lambda array=array: iter([array])) for name, array in arrays.items()
    ]
    metadata = model_metadata(shape, "kv_b", FILE_TYPES[ggml.F32]) | synthetic_tokenizer(shape.vocab_size)
    gguf_writer.write(path, shape.architecture, metadata, tensors)
    return path


def _tensor_name(name: str) -> str:
    """The name in GGUF of a tensor of transformers."""
    module = name.removesuffix(".weight")
    if module in _OUTER:
        return f"{_OUTER[module]}.weight"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_OF_LAYER[rest]}.weight"


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
