"""params.json, the configuration of Mistral's own files, in the keys of a Hugging Face config.json.

Mistral publishes large models for its package mistral-common: ``params.json``, ``consolidated*.safetensors`` and
``tekken.json``. The meaning of the keys is that of vLLM (``transformers_utils/configs/mistral.py``) and of llama.cpp's
converter (``conversion/mistral.py``, class MistralMoeModel). Names of tensors: `pymla.make.checkpoint_names`.
"""

from pathlib import Path
from typing import Any

from pymla.make.json_values import Values

NAME = "params.json"

#: Class that stands for such a file in `pymla.make.hub_config.CLASSES`; transformers has none.
CLASS = "MistralMoe"

#: Keys of config.json by those of params.json. Other keys have one name in both.
_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "activation": "hidden_act",
}
#: The same of the object "moe".
_MOE_KEYS = {
    "route_every_n": "moe_layer_freq",
    "first_k_dense_replace": "first_k_dense_replace",
    "num_experts_per_tok": "num_experts_per_tok",
    "num_experts": "n_routed_experts",
    "expert_hidden_dim": "moe_intermediate_size",
    "routed_scale": "routed_scaling_factor",
    "num_shared_experts": "n_shared_experts",
    "num_expert_groups": "n_group",
    "num_expert_groups_per_tok": "topk_group",
}
#: Of YaRN. mistral-common's names are those of the paper's bounds: alpha is the slow one.
_YARN_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta": "beta_fast",
    "alpha": "beta_slow",
}
_CONTEXT_LENGTH = 128_000


def configuration(path: Path) -> Path:
    """The file that describes the weights of a folder: the params.json beside the config.json `path` where that is
    absent, or where all weights are in files for mistral-common."""
    params = path.with_name(NAME)
    if not params.exists():
        return path
    weights = [each.name for each in path.parent.glob("*.safetensors")]
    theirs = all(name.startswith("consolidated") for name in weights)
    return params if theirs or not path.exists() else path


def as_hub_config(params: Values, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a params.json under the keys of a config.json.

    Parameters
    ----------
    params : the file, for the types of nested values and for errors
    values : all that it holds
    """
    moe = params.get("moe", dict)
    if moe is None:
        params.refuse("moe", None, "only models with latent attention and experts are converted")
    found = values | _renamed(values, _KEYS) | _renamed(moe, _MOE_KEYS)
    found |= {"architectures": [CLASS], "norm_topk_prob": True, "rope_parameters": _rope(params)}
    found.setdefault("max_position_embeddings", _CONTEXT_LENGTH)
    if params.get("quantization", dict):
        found["quantization_config"] = _quantisation(params)
    return found


def _renamed(values: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    return {new: values[old] for old, new in keys.items() if old in values}


def _rope(params: Values) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": params.number("rope_theta", 10000.0)}
    yarn = params.get("yarn", dict)
    if not yarn:
        if params.get("llama_4_scaling", dict):
            params.refuse("yarn", None, "llama_4_scaling without it is not converted")
        return rope
    # With it, cos and sin would be scaled, too.
    params.require("apply_scale", bool, False, among=yarn)
    temperature = params.get("llama_4_scaling", dict, {})
    # llama.cpp writes 0.1 for the logarithm's factor of such a model, which mscale_all_dim 1 stands for.
    rope |= {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0} | _renamed(yarn, _YARN_KEYS)
    return rope | {"llama_4_scaling_beta": params.number("beta", 0.0, among=temperature)}


def _quantisation(params: Values) -> dict[str, Any]:
    """The quantisation as transformers says it: float8 with one scale for a tensor."""
    params.require("qformat_weight", str, "fp8_e4m3", among=params.get("quantization", dict))
    return {"quant_method": "fp8", "weight_block_size": None}
