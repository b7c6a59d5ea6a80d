"""The kernels that a model launches on the GPU: those of its matrices' types, of its cache, its sizes and its forms of
attention. A program compiles these and no others. Twin of `pymla.cpu.needed`.

A kernel that is missing here would be compiled when it is first launched, in the middle of a text: a test generates
with models of all kinds in the simulator and finds none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pymla import ggml
from pymla.cuda import NAME, attention, moe, norm, quant, rope, sampling
from pymla.cuda.runtime.jit import Kernel, compile_all
from pymla.pages import CACHE_TYPES, HADAMARD_TYPES


def compile_for(
    model: Any,
    progress: Callable[[int, int, str], object] | None = None,
    warn: Callable[[str], object] | None = None,
) -> None:
    """Compile the kernels of a model for the device, or load them from the cache.

    Parameters
    ----------
    model : Model
        With its `placement`, `weights`, `cache`, `config` and `mla`.
    progress : callable(done, total, name), optional
        Told of each kernel that has to be compiled.
    warn : callable(message), optional
        Told once what is wrong with the cache.
    """
    compile_all(kernels(model), progress, warn)


def kernels(model: Any) -> list[Kernel]:
    """The kernels of a model on the GPU, each once."""
    place, weights = model.placement, model.weights
    found, inputs = [], set()
    if any(map(_is_gpu, place.layers)):
        found += norm.kernels() + rope.kernels(model.config)
    for on, experts, layer, cache in model.placed_layers:
        if _is_gpu(experts) and layer.ffn_gate_exps is not None:
            types = _types(layer, "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
            found += moe.experts_kernels(*types)
            inputs |= set(types)
        if _is_gpu(on):
            ungated = layer.ffn_gate is None and layer.ffn_up is not None
            types = _types(layer, *_MATRICES, *(_UNGATED if ungated else ()))
            for qtype in types:
                found += quant.matmul_kernels(qtype)
            if layer.ffn_gate_inp is not None:
                found += moe.router_kernels()
            if layer.ffn_gate is not None:
                dense = _types(layer, "ffn_gate", "ffn_up", "ffn_down")
                found += moe.ffn_kernels(*dense)
                inputs |= set(dense)
            if ungated:
                found += moe.relu_squared_kernels()
            found += _attention(model, layer, cache)
            inputs |= {*types, layer.attn_k_b.qtype, layer.attn_v_b.qtype}
    if _is_gpu(place.embedding):
        found += quant.embedding_rows_kernels(weights.token_embd.qtype)
    if _is_gpu(place.output):
        found += [*norm.kernels(), *sampling.kernels(), *quant.matmul_kernels(weights.output.qtype)]
        inputs.add(weights.output.qtype)
    if weights.nextn is not None:
        matrices = _nextn_matrices(weights.nextn, place)
        if _is_gpu(place.embedding):
            found += quant.embedding_rows_kernels(weights.nextn.embed_tokens.qtype)
        types = [w.qtype for backend, w in matrices if _is_gpu(backend)]
        for qtype in types:
            found += quant.matmul_kernels(qtype)
        inputs |= set(types)
    found += quant.activation_kernels(inputs)
    return list(dict.fromkeys(found))


def _is_gpu(backend: Any) -> bool:
    """Whether a part of the model is on the GPU."""
    return backend.NAME == NAME


#: Matrices of a layer that `quant.matmul` multiplies, and those of a network without a gate.
_MATRICES = (
    *("attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_output", "ffn_gate_inp"),
    *("indexer_attn_q_b", "indexer_attn_k", "indexer_proj"),
)
_UNGATED = "ffn_up", "ffn_down"


def _nextn_matrices(nextn: Any, place: Any) -> list[tuple[Any, Any]]:
    """The matrices of a nextn block outside its layer, with their backends."""
    return [(place.layers[-1], nextn.eh_proj), (place.output, nextn.shared_head_head)]


def _types(layer: Any, *names: str) -> list[int]:
    return [tensor.qtype for tensor in (getattr(layer, name) for name in names) if tensor is not None]


def _attention(model: Any, layer: Any, cache: Any) -> list[Kernel]:
    """The kernels of a layer's attention in the model's mode."""
    config, types, matrices = model.config, tuple(rows.qtype for rows in cache[:2]), (layer.attn_k_b, layer.attn_v_b)
    k_b, v_b = (w.qtype for w in matrices)
    latent, expanded = (config.kv_lora_rank, config.qk_rope_head_dim), (config.qk_head_dim, config.v_head_dim)
    if model.mla == "0":
        return attention.full_kernels(types, expanded, k_b, v_b)
    found = attention.absorbed_kernels(types, latent, k_b, v_b, materialised=model.mla == "2")
    if model.mla != "1":
        found += attention.expanded_kernels(types, expanded, k_b, v_b)
    if config.indexer:
        found += attention.sparse_kernels(types, latent)
    if layer.has_indexer:
        indexer = config.indexer
        found += norm.layer_norm_kernels()
        found += attention.indexer_kernels(cache.index_keys.qtype, indexer.head_dim, indexer.heads)
    return found


def everything(qtypes: Iterable[int] = ggml.SUPPORTED) -> dict[str, Kernel]:
    """Every kernel for some types of matrices, for all cache types and DeepSeek's sizes, by name: these are what
    reports and tests compile."""
    from pymla.cuda import limits  # only those who measure need it

    found = [
        *norm.kernels(),
        *norm.layer_norm_kernels(),
        *rope.kernels(None),
        *sampling.kernels(),
        *limits.kernels(),
        *moe.router_kernels(),
        *moe.relu_squared_kernels(),
    ]
    found += quant.activation_kernels(qtypes)
    for qtype in qtypes:
        found += quant.matmul_kernels(qtype) + quant.embedding_rows_kernels(qtype)
        found += quant.matmul_heads_transposed_kernels(qtype) + moe.experts_kernels(qtype, qtype, qtype)
    found += moe.experts_kernels(*MIXED_TYPES)
    float_types = ggml.F32, ggml.F32
    for qtype in CACHE_TYPES.values():
        latent_types = qtype, ggml.F16 if ggml.BLOCK_SIZE[qtype] > 1 else qtype
        for materialised in (False, True):
            found += attention.absorbed_kernels(latent_types, LATENT_SIZES, *float_types, materialised)
        found += attention.sparse_kernels(latent_types, LATENT_SIZES)
        found += attention.expanded_kernels(latent_types, EXPANDED_SIZES, *float_types)
        if qtype not in HADAMARD_TYPES:
            found += attention.full_kernels((qtype, qtype), EXPANDED_SIZES, *float_types)
            for heads in INDEX_HEADS:
                found += attention.indexer_kernels(qtype, INDEX_WIDTH, heads)
    return {each.__name__: each for each in found}


#: Types of gate, up and down as some files mix them.
MIXED_TYPES = ggml.Q4_0, ggml.Q8_0, ggml.Q4_0
#: Sizes of DeepSeek's models: of ``c_kv`` and ``k_pe``, and of a key and a value of a head.
LATENT_SIZES, EXPANDED_SIZES = (512, 64), (192, 128)
#: Numbers of a key of the indexer, and its heads in DeepSeek-V3.2 and in GLM-5.
INDEX_WIDTH, INDEX_HEADS = 128, (64, 32)
