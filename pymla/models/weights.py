"""The tensors of a model, by layer, under their GGUF names: views of the mapped file wherever its layout and its types
allow, or copies in the memory of a GPU. Interleaved rows become plain ones (`pymla.models.interleaved`).

Three layouts of ``W_k_b`` and ``W_v_b`` exist in files: ``attn_kv_b`` alone (before April 2025), ``attn_k_b`` and
``attn_v_b`` (llama.cpp since), and all three (ik_llama.cpp, with a two-dimensional ``attn_k_b``). The engine works with
the rows of ``attn_kv_b`` in both forms of attention: reading one matrix less pays for multiplying by the transpose.
Where a file has ``attn_k_b`` alone, which is the transpose, it is transposed back at load.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pymla import reference
from pymla.backend import Array, Progress
from pymla.files.gguf_reader import ModelFile
from pymla.models.config import ModelConfig
from pymla.models.placement import Placement
from pymla.models.tensor_loading import TensorLoader, TotalProgress
from pymla.models.tensors import (
    ROPE_FACTORS,
    TensorSpec,
    layer_tensors,
    nextn_tensors,
    outer_tensors,
    transposed_type,
)
from pymla.tensor import QTensor

#: A tensor, or None where the model has no such tensor. `ModelConfig` tells which, and a type checker cannot know.
Maybe = Any

#: Matrices of a feed-forward network: gate, up and down.
Swiglu = tuple[QTensor, QTensor, QTensor]


@dataclass(frozen=True)
class Layer:
    """The tensors of a layer, each in the memory of its backend. Norms and biases are float32 vectors."""

    attn_norm: Array
    attn_q: Maybe
    attn_q_a: Maybe
    attn_q_a_norm: Maybe
    attn_q_b: Maybe
    attn_kv_a_mqa: QTensor
    attn_kv_a_norm: Array
    attn_k_b: QTensor  # H matrices of nope rows and rank columns
    attn_v_b: QTensor  # H matrices of v rows and rank columns
    attn_output: QTensor
    indexer_attn_q_b: Maybe  # of sparse attention, where the layer chooses positions
    indexer_attn_k: Maybe
    indexer_k_norm: Maybe
    indexer_k_norm_bias: Maybe
    indexer_proj: Maybe
    ffn_norm: Array
    ffn_gate: Maybe  # of a dense layer, or of the shared experts
    ffn_up: Maybe
    ffn_down: Maybe
    ffn_gate_inp: Maybe  # the router
    exp_probs_b: Maybe
    ffn_gate_exps: Maybe
    ffn_up_exps: Maybe
    ffn_down_exps: Maybe

    @property
    def has_indexer(self) -> bool:
        """Whether it chooses positions to attend to; otherwise it attends to all, or to those chosen before."""
        return self.indexer_proj is not None

    @property
    def ffn(self) -> Swiglu:
        """The network of a dense layer."""
        return self.ffn_gate, self.ffn_up, self.ffn_down

    @property
    def shared(self) -> Swiglu | None:
        """The shared experts, as one network; None where there are none."""
        return None if self.ffn_gate is None else self.ffn

    @property
    def experts(self) -> Swiglu:
        """The routed experts: E matrices each."""
        return self.ffn_gate_exps, self.ffn_up_exps, self.ffn_down_exps


@dataclass(frozen=True)
class NextnWeights:
    """The tensors of a block that predicts a further token (nextn). Where the file has none of its own, the embedding,
    the norm and the output matrix are the model's."""

    enorm: Array
    hnorm: Array
    eh_proj: QTensor  # of 2 * hidden columns: for the embedding, then for the hidden state
    embed_tokens: QTensor
    layer: Layer
    shared_head_norm: Array
    shared_head_head: QTensor


@dataclass(frozen=True)
class Weights:
    """All tensors of a model."""

    token_embd: QTensor
    output_norm: Array  # divided by `ModelConfig.logit_scale`
    output: QTensor
    layers: list[Layer]
    rope_factors_long: Maybe = None  # float32 (R / 2,), in the mapped file, as the next one
    rope_factors_short: Maybe = None
    nextn: NextnWeights | None = None

    @classmethod
    def from_gguf(
        cls,
        file: ModelFile,
        config: ModelConfig,
        progress: Progress | None = None,
        placement: Placement | None = None,
        uploading: Callable[[int], object] | None = None,
        nextn: bool = False,
    ) -> "Weights":
        """Find, check and lay out the tensors.

        Parameters
        ----------
        file : ModelFile
        config : ModelConfig
        progress : callable(done, total), optional
            Told of layers; the transposition of ``attn_k_b`` takes some time.
        placement : Placement, optional
            In whose memory each tensor shall lie; by default all in the host's.
        uploading : callable(done), optional
            Told of bytes that are on their way to the memory of a GPU.
        nextn : bool
            Whether the first block that predicts further tokens is loaded, too. It goes to the backends of the last
            layer, its own embedding and output matrix to those of the model's.

        Raises
        ------
        PymlaError
            A tensor is missing, has another shape than the metadata says, or a type that is not implemented; or a
            GPU's memory is full.
        """
        placement = placement or Placement.on(reference, config.num_hidden_layers)
        loader = TensorLoader(file, placement.embedding, TotalProgress(uploading))
        specs = {spec.field: spec for spec in outer_tensors(config, file.tensors)}
        token_embd = loader.matrix(specs["token_embd"])
        layers = []
        for i, (backend, experts) in enumerate(zip(placement.layers, placement.experts, strict=True)):
            layers.append(_layer(loader.to(backend), loader.to(experts), config, i))
            if progress:
                progress(i + 1, config.num_hidden_layers)
        loader = loader.to(placement.output)
        if "output" in specs:
            output = loader.matrix(specs["output"])
        elif placement.output is placement.embedding:
            output = token_embd
        else:
            output = loader.matrix(specs["token_embd"])
        # Logits that are divided by a number come from a norm that is.
        output_norm = loader.vector(specs["output_norm"], config.logit_scale)
        long, short = (loader.numbers(specs[field]) if field in specs else None for field in ROPE_FACTORS)
        weights = cls(token_embd, output_norm, output, layers, long, short)
        return replace(weights, nextn=_nextn(loader, config, placement, weights)) if nextn else weights


def _nextn(loader: TensorLoader, config: ModelConfig, placement: Placement, model: Weights) -> NextnWeights:
    """The first block behind a model's layers."""
    index = config.num_hidden_layers
    specs = {spec.field: spec for spec in nextn_tensors(config, index, loader.file.tensors)}
    at_input, at_output = loader.to(placement.embedding), loader.to(placement.output)
    here, experts = loader.to(placement.layers[-1]), loader.to(placement.experts[-1])
    own = "embed_tokens", "shared_head_norm", "shared_head_head"
    embedding, norm, head = (specs.get(field) for field in own)
    return NextnWeights(
        enorm=here.vector(specs["enorm"]),
        hnorm=here.vector(specs["hnorm"]),
        eh_proj=here.matrix(specs["eh_proj"]),
        embed_tokens=at_input.matrix(embedding) if embedding else model.token_embd,
        layer=_layer(here, experts, config, index),
        shared_head_norm=at_output.vector(norm) if norm else model.output_norm,
        shared_head_head=at_output.matrix(head) if head else model.output,
    )


def _layer(loader: TensorLoader, experts: TensorLoader, config: ModelConfig, index: int) -> Layer:
    """A layer; `experts` loads its routed experts."""
    specs = {spec.field: spec for spec in layer_tensors(config, index, loader.file.tensors)}
    tensors: dict[str, Any] = dict.fromkeys(Layer.__dataclass_fields__)
    tensors["attn_k_b"], tensors["attn_v_b"] = _kv_b(loader, config, specs)
    for field in specs.keys() - {"attn_kv_b", "attn_k_b", "attn_v_b", "ffn_gate_up_exps"}:
        spec = specs[field]
        own = experts if spec.part == "experts" else loader
        tensors[field] = own.vector(spec) if spec.is_vector else own.matrix(spec)
    if "ffn_gate_up_exps" in specs:
        both, inner = experts.matrix(specs["ffn_gate_up_exps"]), config.moe_intermediate_size
        tensors["ffn_gate_exps"] = QTensor(both.qtype, both.data[:, :inner])
        tensors["ffn_up_exps"] = QTensor(both.qtype, both.data[:, inner:])
    return Layer(**tensors)


def _kv_b(loader: TensorLoader, config: ModelConfig, specs: dict[str, TensorSpec]) -> tuple[QTensor, QTensor]:
    """``W_k_b`` and ``W_v_b``, H matrices of rank columns each, from any of the three layouts."""
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    if "attn_kv_b" in specs:
        kv_b = loader.mapped(specs["attn_kv_b"])
        by_head = kv_b.data.reshape(heads, nope + config.v_head_dim, -1)
        k_b, v_b = QTensor(kv_b.qtype, by_head[:, :nope]), QTensor(kv_b.qtype, by_head[:, nope:])
    else:
        k_b, v_b = (loader.mapped(specs[field]) for field in ("attn_k_b", "attn_v_b"))
        k_b, v_b = (QTensor(w.qtype, w.data.reshape(heads, -1, w.data.shape[-1])) for w in (k_b, v_b))
        k_b = _transpose(k_b)
    return loader.put(k_b), loader.put(v_b)


def _transpose(w: QTensor) -> QTensor:
    """Transposed matrices, read-only (`transposed_type`)."""
    qtype = transposed_type(w.qtype, w.data.shape[1])
    quantise, dequantise = reference.quant.quantise, reference.quant.dequantise
    data = np.stack([quantise(dequantise(matrix, w.qtype).T, qtype) for matrix in w.data])
    data.flags.writeable = False
    return QTensor(qtype, data)
