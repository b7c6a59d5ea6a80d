"""The kernels that a model launches on the processor: those of its matrices' types, of its cache and of its forms of
attention. A program compiles these and no others.

A kernel that is missing here would be compiled when it is first launched, in the middle of a text.
`tests/test_needed.py` generates with models of all kinds and looks for such kernels.
"""

from pymla.cpu import attention, moe, norm, quant, rope
from pymla.cpu.runtime import compiling, polling


def compile_for(model, progress=None, warn=None):
    """Compile the kernels that a `pymla.engine.model.Model` launches on the processor, or load them from the cache.

    Parameters
    ----------
    progress : callable(done, total, name), optional
        Told of each kernel that has to be compiled.
    warn : callable(message), optional
        Told once what is wrong with the cache.
    """
    compiling.compile_all([each.compiled for each in kernels(model)], progress, warn)


def kernels(model):
    """The kernels of a model on the processor, each once, those that take longest first."""
    from pymla import cpu

    place, weights = model.placement, model.weights
    found, inputs = [*polling.FUNCTIONS], set()
    if cpu in place.layers:
        found += norm.kernels() + rope.kernels(model.config)
    for backend, experts, layer, cache in model.placed_layers:
        if experts is cpu and layer.ffn_gate_exps is not None:
            types = _types(layer, "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
            found += moe.experts_kernels(*types)
            inputs |= set(types)
        if backend is cpu:
            ungated = layer.ffn_gate is None and layer.ffn_up is not None
            types = _types(layer, *_MATRICES, *(_UNGATED if ungated else ()))
            for qtype in types:
                found += quant.matmul_kernels(qtype)
            if layer.ffn_gate is not None:
                found += moe.ffn_kernels(*_types(layer, "ffn_gate", "ffn_up", "ffn_down"))
            if ungated:
                found += moe.relu_squared_kernels()
            found += _attention(model, layer, cache)
            inputs |= {*types, layer.attn_k_b.qtype, layer.attn_v_b.qtype}
    if place.embedding is cpu:
        found += quant.embedding_rows_kernels(weights.token_embd.qtype)
    if place.output is cpu:
        found += [*norm.kernels(), *quant.matmul_kernels(weights.output.qtype)]
        inputs.add(weights.output.qtype)
    if weights.nextn is not None:
        matrices = _nextn_matrices(weights.nextn, place)
        if place.embedding is cpu:
            found += quant.embedding_rows_kernels(weights.nextn.embed_tokens.qtype)
        types = [w.qtype for backend, w in matrices if backend is cpu]
        for qtype in types:
            found += quant.matmul_kernels(qtype)
        inputs |= set(types)
    found += quant.activation_kernels(inputs)
    return sorted(dict.fromkeys(found), key=_is_short)


def _nextn_matrices(nextn, place):
    """The matrices of a nextn block outside its layer, with their backends."""
    return [(place.layers[-1], nextn.eh_proj), (place.output, nextn.shared_head_head)]


def _types(layer, *names):
    return [tensor.qtype for tensor in (getattr(layer, name) for name in names) if tensor is not None]


#: Matrices of a layer that `quant.matmul` multiplies, and those of a network without a gate.
_MATRICES = (
    *("attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_output", "ffn_gate_inp"),
    *("indexer_attn_q_b", "indexer_attn_k", "indexer_proj"),
)
_UNGATED = "ffn_up", "ffn_down"


def _attention(model, layer, cache):
    """The kernels of a layer's attention in the model's mode."""
    types = *(rows.qtype for rows in cache[:2]), layer.attn_k_b.qtype, layer.attn_v_b.qtype
    if model.mla == "0":
        return attention.full_kernels(*types)
    found = attention.absorbed_kernels(*types, materialised=model.mla == "2")
    if model.mla != "1":
        found += attention.expanded_kernels(*types, exact=model.cache.exact)
    if model.config.indexer:
        found += attention.sparse_kernels(*types[:2])
    if layer.has_indexer:
        found += norm.layer_norm_kernels() + attention.choose_kernels(cache.index_keys.qtype)
    return found


def _is_short(kernel):
    """Whether a kernel is compiled quickly: gemm and attention take several times as long as other kernels."""
    long = "panels", "pages", "absorbed_rows", "expanded_rows", "full_rows", "sparse_rows"
    return not any(word in kernel.__name__ for word in long)
