"""A Hugging Face folder's config.json, and its other JSON files, with the type of every value checked."""

import json
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np

from pymla.errors import PymlaError
from pymla.files.checkpoint import read_json
from pymla.make.model_metadata import Shape
from pymla.models.metadata import MAX_CONTEXT, MAX_SIZE
from pymla.printable import shown

#: Value of scoring_func where config.json has none, by the class that reads it.
ARCHITECTURES = {
    "DeepseekV2ForCausalLM": "softmax",
    "DeepseekV3ForCausalLM": "sigmoid",
    "DeepseekV32ForCausalLM": "sigmoid",
    "GlmMoeDsaForCausalLM": "sigmoid",
}
#: GGUF's names of the architectures with an indexer; the others are deepseek2.
_SPARSE = {"DeepseekV32ForCausalLM": "deepseek32", "GlmMoeDsaForCausalLM": "glm-dsa"}

_TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
_F32_MAX = float(np.finfo(np.float32).max)


class Values:
    """The object in a JSON file."""

    def __init__(self, path: Path, optional: bool = False):
        self.path = path
        self._values = {} if optional and not path.exists() else read_json(path)

    def refuse(self, key: str, value: Any, reason: str) -> NoReturn:
        raise PymlaError(f"{self.path}: {key} is {_json(value)}; {reason}")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None, among: dict | None = None) -> Any:
        """A value of one of some types, or the default where the key is absent or null."""
        value = (self._values if among is None else among).get(key)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:
            self.refuse(key, value, f"a value of type {' or '.join(each.__name__ for each in kinds)} is expected")
        return value

    def size(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        """An integer. Without a default the key must be there."""
        value = self.get(key, int, default)
        if value is None:
            raise PymlaError(f"{self.path}: {key} is missing")
        if not minimum <= value <= maximum:
            self.refuse(key, value, f"a number from {minimum} to {maximum} is expected")
        return value

    @overload
    def number(self, key: str, default: float, among: dict | None = None) -> float: ...

    @overload
    def number(self, key: str, default: None = None, among: dict | None = None) -> float | None: ...

    def number(self, key: str, default: float | None = None, among: dict | None = None) -> float | None:
        """A number that float32 holds, as GGUF has them; an integer will do."""
        value = self.get(key, (float, int), default, among)
        if value is not None and not -_F32_MAX <= value <= _F32_MAX:
            self.refuse(key, value, "a number that float32 holds is expected")
        return value


class HubConfig(Values):
    """config.json of a model of one of `ARCHITECTURES`."""

    def __init__(self, path: Path):
        super().__init__(path)
        architectures = self._values.get("architectures")
        architecture = architectures[0] if isinstance(architectures, list) and architectures else architectures
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            self.refuse("architectures", architecture, f"{' and '.join(ARCHITECTURES)} are converted")
        self.sparse = _SPARSE.get(architecture)
        self.scoring_func = self.get("scoring_func", str, ARCHITECTURES[architecture])
        if self.scoring_func not in ("softmax", "sigmoid"):
            self.refuse("scoring_func", self.scoring_func, "softmax or sigmoid is expected")
        self.topk_method = self.get("topk_method", str)
        if self.topk_method not in (None, *_TOPK_METHODS):
            self.refuse("topk_method", self.topk_method, f"{', '.join(_TOPK_METHODS)} are converted")
        for key, kind, only in (
            ("hidden_act", str, "silu"),
            ("attention_bias", bool, False),
            ("mlp_bias", bool, False),
            ("moe_layer_freq", int, 1),
            ("rope_interleave", bool, True),
        ):
            self.require(key, kind, only)
        self.rope = self._rope()

    def require(self, key: str, kind: type | tuple[type, ...], only: Any, among: dict | None = None) -> None:
        """Raise PymlaError unless a key is absent or has its only value that can be converted."""
        value = self.get(key, kind, only, among)
        if value != only:
            self.refuse(key, value, f"only {json.dumps(only)} is converted")

    def fp8_block(self) -> tuple[int, int]:
        """Rows and columns of a float8 tensor that share a scale."""
        quantisation = self.get("quantization_config", dict)
        if quantisation is None:
            return 128, 128
        method = quantisation.get("quant_method")
        if method != "fp8":
            self.refuse("quantization_config.quant_method", method, "only fp8 is converted")
        block = quantisation.get("weight_block_size", [128, 128])
        if not (isinstance(block, list) and len(block) == 2 and all(_is_size(size) for size in block)):
            self.refuse("quantization_config.weight_block_size", block, f"two sizes from 1 to {MAX_SIZE} are expected")
        return block[0], block[1]

    @property
    def dense_layers(self) -> int:
        """Leading layers without experts."""
        layers = self.size("num_hidden_layers")
        if not self.experts:
            return layers
        return min(self.size("first_k_dense_replace", 0, 0), layers)

    @property
    def experts(self) -> int:
        return self.size("n_routed_experts", 0, 0)

    @property
    def context_length(self) -> int:
        return self.size("max_position_embeddings", maximum=MAX_CONTEXT)

    def shape(self, name: str) -> Shape:
        """Sizes and switches of the model, which is called `name`."""
        size, experts, yarn = self.size, self.experts, "factor" in self.rope
        # V2's "greedy" chooses among all experts, and ignores groups.
        grouped = experts and size("n_group", 1) > 1 and self.topk_method != "greedy"
        return Shape(
            name=name,
            hidden_size=size("hidden_size"),
            num_hidden_layers=size("num_hidden_layers"),
            intermediate_size=size("intermediate_size"),
            moe_intermediate_size=size("moe_intermediate_size", size("intermediate_size")),
            n_routed_experts=experts,
            num_experts_per_tok=size("num_experts_per_tok") if experts else 0,
            n_shared_experts=size("n_shared_experts", 0, 0),
            num_attention_heads=size("num_attention_heads"),
            vocab_size=size("vocab_size"),
            first_k_dense_replace=self.dense_layers,
            q_lora_rank=size("q_lora_rank", 0, 0),
            kv_lora_rank=size("kv_lora_rank"),
            qk_nope_head_dim=size("qk_nope_head_dim"),
            qk_rope_head_dim=size("qk_rope_head_dim"),
            v_head_dim=size("v_head_dim"),
            routed_scaling_factor=self.number("routed_scaling_factor", 1.0),
            norm_topk_prob=self.get("norm_topk_prob", bool, False),
            scoring_func=self.scoring_func,
            n_group=size("n_group") if grouped else 1,
            topk_group=size("topk_group") if grouped else 1,
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            rope_theta=self.rope["rope_theta"],
            context_length=self.context_length,
            yarn_factor=self.rope["factor"] if yarn else 1.0,
            yarn_original=self.rope["original"] if yarn else 0,
            mscale_all_dim=self.rope["mscale_all_dim"] if yarn else 1.0,
            # transformers takes 0 for its default, which is GGUF's, too.
            beta_fast=(yarn and self.rope["beta_fast"]) or None,
            beta_slow=(yarn and self.rope["beta_slow"]) or None,
            tie_word_embeddings=self.get("tie_word_embeddings", bool, False),
            temperature_scale=self.rope["temperature"] if yarn else 0.0,
            temperature_length=self.rope["original"] if yarn else 0,
            **self._indexer(),
        )

    def _indexer(self) -> dict[str, Any]:
        """The fields of the indexer of sparse attention, and the architecture."""
        if self.sparse is None:
            return {}
        types = self.get("indexer_types", list)
        layers = self.size("num_hidden_layers")
        if types is not None and not (len(types) == layers and all(each in ("full", "shared") for each in types)):
            self.refuse("indexer_types", types, f"full or shared is expected for each of {layers} layers")
        return {
            "architecture": self.sparse,
            "index_topk": self.size("index_topk"),
            "index_n_heads": self.size("index_n_heads"),
            "index_head_dim": self.size("index_head_dim"),
            "indexer_types": types and tuple(types),
        }

    def _rope(self) -> dict[str, Any]:
        """Rope's parameters as transformers 5 names them, from older files, too."""
        rope = self.get("rope_parameters", dict) or self.get("rope_scaling", dict) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        theta = self.number("rope_theta", self.number("rope_theta", 10000.0), among=rope)
        self.require("partial_rotary_factor", (float, int), 1.0, among=rope)
        if kind == "default":
            return {"rope_theta": theta}
        if kind != "yarn":
            self.refuse("rope_type", kind, "yarn and default are converted")
        yarn: dict[str, Any] = {"rope_theta": theta, "factor": self.number("factor", among=rope)}
        yarn["original"] = self.get("original_max_position_embeddings", int, among=rope)
        for key, value in yarn.items():
            if value is None:
                raise PymlaError(f"{self.path}: {key} of the rope parameters is missing, which yarn needs")
        if not 1 <= yarn["original"] <= MAX_CONTEXT:
            self.refuse("original_max_position_embeddings", yarn["original"], f"1 to {MAX_CONTEXT} is expected")
        for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            yarn[key] = self.number(key, among=rope)
        if yarn["mscale"] != yarn["mscale_all_dim"] or not yarn["mscale"]:
            equal = _json(yarn["mscale_all_dim"])
            self.refuse("mscale", yarn["mscale"], f"it must equal mscale_all_dim, which is {equal}, and not be 0")
        yarn["temperature"] = self.number("llama_4_scaling_beta", 0.0, among=rope)
        self.require("truncate", bool, True, among=rope)
        if rope.get("attention_factor") is not None:
            self.refuse("attention_factor", rope["attention_factor"], "GGUF cannot hold it for this architecture")
        return yarn


def _json(value: Any) -> str:
    """A JSON value for a message, as the file writes it."""
    return "an object" if isinstance(value, dict) else shown(value, write=json.dumps)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_SIZE
