"""A Hugging Face folder's config.json: what it says of a model, with the type of every value checked."""

import math
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pymla.make import mistral_params
from pymla.make.json_values import Values
from pymla.make.model_metadata import ARCHITECTURE, DENSE, Shape
from pymla.make.rope_parameters import Rope, read_rope
from pymla.models.metadata import MAX_CONTEXT
from pymla.models.minicpm3 import BASE_WIDTH, DEPTH_SCALE, EMBEDDING_SCALE


class Family(NamedTuple):
    """What a transformers class says by its name, and no key of config.json."""

    architecture: str = ARCHITECTURE  # as GGUF names it
    scoring_func: str = "sigmoid"  # where config.json has none
    hidden_act: str = "silu"
    tied: bool = False  # whether the embeddings are the output matrix, where config.json does not say it
    #: Whether layers that predict further tokens (nextn) are kept by default, as llama.cpp's converter does.
    keeps_nextn: bool = False
    #: Special tokens by the name of their key, where no file of the tokenizer names them; llama.cpp's choice.
    special: MappingProxyType[str, str] = MappingProxyType({})


_GLM_TOKENS = MappingProxyType({"bos": "[gMASK]", "unk": "<|endoftext|>"})

#: By the class that config.json names.
CLASSES = {
    "DeepseekV2ForCausalLM": Family(scoring_func="softmax"),
    "DeepseekV3ForCausalLM": Family(),  # R1, Kimi-K2, Moonlight, GigaChat3, Kanana-2 and JoyAI-LLM, too
    "DeepseekV32ForCausalLM": Family("deepseek32", keeps_nextn=True),
    "Glm4MoeLiteForCausalLM": Family(keeps_nextn=True, special=_GLM_TOKENS),  # GLM-4.7-Flash
    "GlmMoeDsaForCausalLM": Family("glm-dsa", keeps_nextn=True, special=_GLM_TOKENS),  # GLM-5
    "KimiVLForConditionalGeneration": Family(),
    "KimiK25ForConditionalGeneration": Family(),
    "Kimi_K25ForConditionalGeneration": Family(),  # as transformers 5 names it
    "YoutuForCausalLM": Family(tied=True),
    "MiniCPM3ForCausalLM": Family("minicpm3", tied=True),
    "PLMForCausalLM": Family("plm", hidden_act="relu2", tied=True),
    "Mistral3ForConditionalGeneration": Family("mistral4", scoring_func="softmax"),
    "Mistral4ForCausalLM": Family("mistral4", scoring_func="softmax"),
    mistral_params.CLASS: Family(scoring_func="softmax"),  # Mistral-Large-3
}

_TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


class HubConfig(Values):
    """config.json of a model of one of `CLASSES`, or the params.json beside it that describes the weights.

    Values of the language model of a model that also sees, which are in an object "text_config", count as if they stood
    at the top.

    Attributes
    ----------
    family : Family
    rope : Rope
    """

    def __init__(self, path: Path):
        super().__init__(mistral_params.configuration(path))
        if self.path.name == mistral_params.NAME:
            self._values = mistral_params.as_hub_config(self, self._values)
        self.family = self._family()
        self._values = self._values | self.get("text_config", dict, {})
        self._check_variant()
        self.rope = self._rope()

    @property
    def architecture(self) -> str:
        """GGUF's name of the architecture."""
        return self.family.architecture

    @property
    def sparse(self) -> bool:
        """Whether an indexer chooses the positions that are attended to."""
        return self.architecture in ("deepseek32", "glm-dsa")

    @property
    def dense_layers(self) -> int:
        """Leading layers without experts."""
        layers = self.size("num_hidden_layers")
        if not self.experts:
            return layers
        kinds = self.get("mlp_layer_types", list)
        if kinds is None or self.get("first_k_dense_replace", int) is not None:
            return min(self.size("first_k_dense_replace", 0, 0), layers)
        dense = kinds.count("dense")
        if len(kinds) != layers or kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
            self.refuse("mlp_layer_types", kinds, f"dense and then sparse ones are expected, for {layers} layers")
        return dense

    @property
    def experts(self) -> int:
        return 0 if self.architecture in DENSE else self.size("n_routed_experts", 0, 0)

    @property
    def context_length(self) -> int:
        return self.size("max_position_embeddings", maximum=MAX_CONTEXT)

    @property
    def v_head_dim(self) -> int:
        """The size of a head of values, which MiniCPM3's files may leave out."""
        if self.architecture != "minicpm3":
            return self.size("v_head_dim")
        return self.size("v_head_dim", self.size("hidden_size") // self.size("num_attention_heads"))

    @property
    def indexer_types(self) -> tuple[str, ...] | None:
        """Of each layer, "full" if it has an indexer of its own, "shared" if not; None: all have one."""
        types, layers = self.get("indexer_types", list), self.size("num_hidden_layers")
        if types is None:
            return None
        if len(types) != layers or not all(each in ("full", "shared") for each in types):
            self.refuse("indexer_types", types, f"full or shared is expected for each of {layers} layers")
        return tuple(types)

    @property
    def tied(self) -> bool:
        """Whether the embeddings are the output matrix, too."""
        return bool(self.get("tie_word_embeddings", bool, self.family.tied))

    def shape(self, name: str, nextn_layers: int = 0) -> Shape:
        """Sizes and switches of the model, which is called `name` and has `nextn_layers` behind its own layers."""
        size, experts = self.size, self.experts
        # V2's "greedy" chooses among all experts, and ignores groups.
        grouped = experts and size("n_group", 1) > 1 and self.topk_method != "greedy"
        return Shape(
            name=name,
            architecture=self.architecture,
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
            v_head_dim=self.v_head_dim,
            routed_scaling_factor=self.number("routed_scaling_factor", 1.0),
            norm_topk_prob=self.get("norm_topk_prob", bool, False),
            scoring_func=self.scoring_func,
            n_group=size("n_group") if grouped else 1,
            topk_group=size("topk_group") if grouped else 1,
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            context_length=self.context_length,
            tie_word_embeddings=self.tied,
            num_nextn_predict_layers=nextn_layers,
            **self._rope_fields(),
            **(self._indexer_fields() if self.sparse else {}),
            **(self._scale_fields() if self.architecture == "minicpm3" else {}),
        )

    def _family(self) -> Family:
        architectures = self._values.get("architectures")
        name = architectures[0] if isinstance(architectures, list) and architectures else architectures
        if not isinstance(name, str) or name not in CLASSES:
            self.refuse("architectures", name, f"{', '.join(CLASSES)} are converted")
        if name == "Mistral3ForConditionalGeneration":
            # Its other language models have no latent attention.
            model_type = self.get("text_config", dict, {}).get("model_type")
            if model_type != "mistral4":
                self.refuse("text_config.model_type", model_type, "only mistral4 is converted")
        return CLASSES[name]

    def _check_variant(self) -> None:
        """Read what decides between variants, and refuse those that GGUF cannot hold."""
        self.scoring_func = self.get("scoring_func", str, self.family.scoring_func)
        if self.scoring_func not in ("softmax", "sigmoid"):
            self.refuse("scoring_func", self.scoring_func, "softmax or sigmoid is expected")
        self.topk_method = self.get("topk_method", str)
        if self.topk_method not in (None, *_TOPK_METHODS):
            self.refuse("topk_method", self.topk_method, f"{', '.join(_TOPK_METHODS)} are converted")
        for key, kind, only in (
            ("hidden_act", str, self.family.hidden_act),
            ("attention_bias", bool, False),
            ("mlp_bias", bool, False),
            ("moe_layer_freq", int, 1),
            ("rope_interleave", bool, True),
        ):
            self.require(key, kind, only)

    def _rope(self) -> Rope:
        rope_dim = self.size("qk_rope_head_dim")
        # transformers turns a part of the head in Mistral 4, and has a head apart that is turned in the others.
        head_dim = rope_dim + (self.size("qk_nope_head_dim") if self.architecture == "mistral4" else 0)
        return read_rope(self, rope_dim, head_dim, self.context_length, self.architecture == "minicpm3")

    def _rope_fields(self) -> dict[str, Any]:
        """The fields of RoPE, YaRN, LongRoPE and the attention temperature."""
        fields: dict[str, Any] = {"rope_theta": self.rope.theta}
        if yarn := self.rope.yarn:
            fields |= {
                "yarn_factor": yarn.factor,
                "yarn_original": yarn.original,
                "mscale_all_dim": yarn.mscale_all_dim,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "temperature_scale": yarn.temperature,
                "temperature_length": yarn.original,
            }
        elif long := self.rope.long:
            fields |= {
                "rope_factors": (long.long, long.short),
                "yarn_original": long.original,
                "attention_factor": long.attention_factor,
            }
        return fields

    def _indexer_fields(self) -> dict[str, Any]:
        """The fields of the indexer of sparse attention."""
        return {
            "index_topk": self.size("index_topk"),
            "index_n_heads": self.size("index_n_heads"),
            "index_head_dim": self.size("index_head_dim"),
            "indexer_types": self.indexer_types,
        }

    def _scale_fields(self) -> dict[str, Any]:
        """MiniCPM3's factors. A null means none, as in transformers."""
        layers, hidden = self.size("num_hidden_layers"), self.size("hidden_size")
        depth = self.number("scale_depth", self._default("scale_depth", DEPTH_SCALE, math.sqrt(layers)))
        base = self.size("dim_model_base", self._default("dim_model_base", BASE_WIDTH, hidden))
        return {
            "embedding_scale": self.number("scale_emb", EMBEDDING_SCALE),
            "residual_scale": depth / math.sqrt(layers),
            "logit_scale": hidden / base,
        }

    def _default(self, key: str, absent: Any, null: Any) -> Any:
        """What a key stands for that has no value: it is absent, or null."""
        return null if key in self._values else absent
