"""The tensors that a model consists of: their GGUF names, their shapes, and the part of the model that each belongs to.

One table for all: files are checked by it (`pymla.engine.filecheck`), weights are loaded by it
(`pymla.models.weights`), and costs and memory are computed from it (`pymla.engine.costs`, `pymla.engine.planning`).
Names are those of llama.cpp's converter.
"""

import math
import re
from collections.abc import Container, Iterator
from typing import NamedTuple

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile, TensorInfo
from pymla.models.config import Indexer, ModelConfig

#: Fields of `Weights` that divide rope's frequencies (LongRoPE), which a file has or has not.
ROPE_FACTORS = ("rope_factors_long", "rope_factors_short")


def transposed_type(qtype: int, columns: int) -> int:
    """The type of a matrix of `columns` columns that is the transpose of one of type `qtype`, whose blocks lie across
    its rows. Float types stay as they are. Others become Q8_0, which prompts multiply on integers as they do the blocks
    of files that need no transposition, or F16 where 32 does not divide the columns."""
    if qtype in ggml.FLOATS:
        return qtype
    return ggml.F16 if columns % ggml.BLOCK_SIZE[ggml.Q8_0] else ggml.Q8_0


class TensorSpec(NamedTuple):
    """A tensor that a model needs."""

    name: str  # in the file
    shapes: tuple[tuple[int, ...], ...]  # any of these, NumPy order
    field: str  # of `Weights`, `Layer` or `NextnWeights`; attn_kv_b and ffn_gate_up_exps hold two of their fields
    #: Of the model: "embedding", "output", "layer", "experts", which a router chooses from, or "rope", whose
    #: frequencies are computed on the host.
    part: str = "layer"
    layer: int = 0

    @property
    def stem(self) -> str:
        """The name without its layer and without ``.weight`` or ``.bias``."""
        return self.name.removeprefix(f"blk.{self.layer}.").rpartition(".")[0]

    @property
    def weights(self) -> int:
        """The count of the tensor's numbers."""
        return math.prod(self.shapes[0])

    @property
    def is_vector(self) -> bool:
        """Whether it is a norm or a bias, which are float32."""
        return len(self.shapes[0]) == 1

    @property
    def is_norm(self) -> bool:
        """Whether it is the weight of a norm."""
        return self.stem.endswith("_norm") and not self.is_bias

    @property
    def is_bias(self) -> bool:
        """Whether it is a bias, of a norm or of the experts' choice; one may well be zero."""
        return self.name.endswith(".bias")

    @property
    def is_router(self) -> bool:
        """Whether its product scores the experts."""
        return self.stem == "ffn_gate_inp"


def model_tensors(config: ModelConfig, names: Container[str] = ()) -> list[TensorSpec]:
    """All tensors of a model.

    Parameters
    ----------
    config : ModelConfig
    names : of the tensors that a file holds
        They decide where there are several ways: whether the output matrix is a tensor or the embedding again, the
        layout of ``W_k_b`` and ``W_v_b`` (`pymla.models.weights`), gate and up of experts in one tensor or in two,
        whether experts have a bias, and whether rope's frequencies have factors.
    """
    layers = (spec for index in range(config.num_hidden_layers) for spec in layer_tensors(config, index, names))
    embedding, *output = outer_tensors(config, names)
    return [embedding, *layers, *output]


def outer_tensors(config: ModelConfig, names: Container[str] = ()) -> list[TensorSpec]:
    """The embedding, and the tensors behind the last layer; arguments as for `model_tensors`."""
    embedding = (config.vocab_size, config.hidden_size)
    specs = [
        TensorSpec("token_embd.weight", (embedding,), "token_embd", "embedding"),
        TensorSpec("output_norm.weight", ((config.hidden_size,),), "output_norm", "output"),
    ]
    if "output.weight" in names:
        specs.append(TensorSpec("output.weight", (embedding,), "output", "output"))
    factors = (config.qk_rope_head_dim // 2,)
    for field in ROPE_FACTORS:
        if f"{field}.weight" in names:
            specs.append(TensorSpec(f"{field}.weight", (factors,), field, "rope"))
    return specs


def layer_tensors(config: ModelConfig, index: int, names: Container[str] = ()) -> list[TensorSpec]:
    """The tensors of a layer, in the order in which it uses them; arguments as for `model_tensors`."""
    blk, hidden = _Block(index), config.hidden_size
    specs = [*_attention(blk, config, names)]
    if config.indexer and has_indexer(config, index, names):
        specs += _indexer(blk, config, config.indexer)
    specs.append(blk.weight("ffn_norm", (hidden,)))
    if index < config.first_k_dense_replace or not config.n_routed_experts:
        return [*specs, *_ffn(blk, "", config.intermediate_size, hidden, gated=config.hidden_act == "silu")]
    specs += _experts(blk, config, names)
    if config.n_shared_experts:
        specs += _ffn(blk, "_shexp", config.n_shared_experts * config.moe_intermediate_size, hidden)
    return specs


def nextn_tensors(config: ModelConfig, index: int, names: Container[str] = ()) -> list[TensorSpec]:
    """The tensors of a layer that predicts further tokens (nextn): those of a layer, behind a projection of the token's
    embedding and the hidden state, and where a file has them an embedding, a norm and an output matrix of its own.

    Such a layer lies behind those that run, and `pymla.models.nextn` runs the first of them. Arguments as for
    `layer_tensors`.
    """
    blk, hidden, vocabulary = _Block(index), config.hidden_size, (config.vocab_size, config.hidden_size)
    shapes = {"eh_proj": (hidden, 2 * hidden), "enorm": (hidden,), "hnorm": (hidden,)}
    own = [blk.weight(field, shape, stem=f"nextn.{field}") for field, shape in shapes.items()]
    optional = [
        blk.weight("embed_tokens", vocabulary, stem="nextn.embed_tokens", part="embedding"),
        blk.weight("shared_head_head", vocabulary, stem="nextn.shared_head_head", part="output"),
        blk.weight("shared_head_norm", (hidden,), stem="nextn.shared_head_norm", part="output"),
    ]
    own += [spec for spec in optional if spec.name in names]
    return [*own, *layer_tensors(config, index, names)]


def has_indexer(config: ModelConfig, index: int, names: Container[str] = ()) -> bool:
    """Whether a layer has an indexer of its own. One behind those that run (nextn) may attend to all positions, which
    its tensors tell."""
    if config.indexer is None:
        return False
    full = config.indexer.full
    return full[index] if index < len(full) else _Block(index).name("indexer.proj") in names


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, by its name; None for the embedding and what is behind the last layer."""
    match = re.match(r"blk\.(\d{1,9})\.", name)
    return int(match[1]) if match else None


class _Block(NamedTuple):
    """Names of a layer's tensors."""

    layer: int

    def name(self, stem: str, suffix: str = "weight") -> str:
        return f"blk.{self.layer}.{stem}.{suffix}"

    def weight(self, field: str, *shapes: tuple[int, ...], stem: str = "", part: str = "layer") -> TensorSpec:
        return TensorSpec(self.name(stem or field), shapes, field, part, self.layer)


def _attention(blk: _Block, config: ModelConfig, names: Container[str]) -> Iterator[TensorSpec]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    yield blk.weight("attn_norm", (hidden,))
    if config.q_lora_rank:
        yield blk.weight("attn_q_a", (config.q_lora_rank, hidden))
        yield blk.weight("attn_q_a_norm", (config.q_lora_rank,))
        yield blk.weight("attn_q_b", (queries, config.q_lora_rank))
    else:
        yield blk.weight("attn_q", (queries, hidden))
    yield blk.weight("attn_kv_a_mqa", (rank + config.qk_rope_head_dim, hidden))
    yield blk.weight("attn_kv_a_norm", (rank,))
    nope, v = config.qk_nope_head_dim, config.v_head_dim
    if blk.name("attn_k_b") in names and blk.name("attn_kv_b") not in names:
        yield blk.weight("attn_k_b", (heads, rank, nope), (heads * rank, nope))
        yield blk.weight("attn_v_b", (heads, v, rank), (heads * v, rank))
    else:
        yield blk.weight("attn_kv_b", (heads * (nope + v), rank))
    yield blk.weight("attn_output", (hidden, heads * v))


def _indexer(blk: _Block, config: ModelConfig, indexer: Indexer) -> Iterator[TensorSpec]:
    """The indexer of sparse attention."""
    hidden, heads, size = config.hidden_size, indexer.heads, indexer.head_dim
    yield blk.weight("indexer_attn_q_b", (heads * size, config.q_lora_rank), stem="indexer.attn_q_b")
    yield blk.weight("indexer_attn_k", (size, hidden), stem="indexer.attn_k")
    yield blk.weight("indexer_k_norm", (size,), stem="indexer.k_norm")
    yield TensorSpec(blk.name("indexer.k_norm", "bias"), ((size,),), "indexer_k_norm_bias", "layer", blk.layer)
    yield blk.weight("indexer_proj", (heads, hidden), stem="indexer.proj")


def _experts(blk: _Block, config: ModelConfig, names: Container[str]) -> Iterator[TensorSpec]:
    """The router and the routed experts."""
    experts, inner, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    yield blk.weight("ffn_gate_inp", (experts, hidden))
    bias = blk.name("exp_probs_b", "bias")
    if bias in names:
        yield TensorSpec(bias, ((experts,),), "exp_probs_b", "layer", blk.layer)
    if blk.name("ffn_gate_up_exps") in names:
        yield blk.weight("ffn_gate_up_exps", (experts, 2 * inner, hidden), part="experts")
    else:
        yield blk.weight("ffn_gate_exps", (experts, inner, hidden), part="experts")
        yield blk.weight("ffn_up_exps", (experts, inner, hidden), part="experts")
    yield blk.weight("ffn_down_exps", (experts, hidden, inner), part="experts")


def _ffn(blk: _Block, suffix: str, inner: int, hidden: int, gated: bool = True) -> Iterator[TensorSpec]:
    """A dense feed-forward network, or the shared experts."""
    if gated:
        yield blk.weight("ffn_gate", (inner, hidden), stem=f"ffn_gate{suffix}")
    yield blk.weight("ffn_up", (inner, hidden), stem=f"ffn_up{suffix}")
    yield blk.weight("ffn_down", (hidden, inner), stem=f"ffn_down{suffix}")


def is_run(qtype: int) -> bool:
    """Whether tensors of a type can be loaded."""
    return ggml.plain_type(qtype) in ggml.SUPPORTED


def find(file: ModelFile, spec: TensorSpec) -> TensorInfo:
    """The tensor of a file that a model needs.

    Raises
    ------
    PymlaError
        It is missing, or of a type or a shape with which it cannot run.
    """
    info = file.tensors.get(spec.name)
    if info is None:
        raise PymlaError(f"{file.path}: tensor {spec.name} is missing; convert the model again or take another file")
    if not is_run(info.qtype):
        raise PymlaError(
            f"{info.path}: tensor {spec.name} has type {ggml.NAME[info.qtype]}, which pymla does not run; "
            "take another file of the model, or quantise it again: "
            f"pymla runs {', '.join(ggml.NAME[t] for t in ggml.SUPPORTED if t >= 0)}, and the same in interleaved rows"
        )
    columns, block = info.shape[-1], ggml.BLOCK_SIZE[ggml.plain_type(info.qtype)]
    if columns % block:
        raise PymlaError(
            f"{info.path}: tensor {spec.name} has type {ggml.NAME[info.qtype]} and rows of {columns} weights; pymla "
            f"runs this type with multiples of {block}; take another file of the model, or quantise it again"
        )
    if info.shape not in spec.shapes:
        expected = " or ".join(str(list(shape)) for shape in spec.shapes)
        raise PymlaError(f"{info.path}: tensor {spec.name} has shape {list(info.shape)}, expected {expected}")
    if spec.is_vector and info.qtype != ggml.F32:
        raise PymlaError(f"{info.path}: tensor {spec.name} has type {ggml.NAME[info.qtype]}, expected F32")
    return info
