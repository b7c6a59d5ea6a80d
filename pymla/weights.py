"""The tensors of a model, by layer, under their GGUF names: views of the mapped file wherever its layout allows, or
copies in the memory of a GPU.

Three layouts of ``W_k_b`` and ``W_v_b`` exist in files: ``attn_kv_b`` alone (before April 2025), ``attn_k_b`` and
``attn_v_b`` (llama.cpp since), and all three (ik_llama.cpp, with a two-dimensional ``attn_k_b``). The engine works with
the rows of ``attn_kv_b``, in its absorbed form as well: what it saves in reading pays for multiplying by the transpose.
Where a file has ``attn_k_b`` alone, which is the transpose, it is transposed back at load.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.backends import Placement
from pymla.errors import PymlaError


class QTensor(NamedTuple):
    """A matrix, or several of one shape, in ggml blocks. A NamedTuple, so that Numba kernels take it as it is."""

    qtype: int  # ggml type id
    data: np.ndarray  # uint8 (rows, row_bytes), or (matrices, rows, row_bytes); on a GPU a DeviceArray

    def rows(self, start, stop):
        """Some rows of a matrix, without a copy."""
        return QTensor(self.qtype, self.data[start:stop])

    def by_rows(self, count):
        """A matrix as several of `count` rows, without a copy."""
        return QTensor(self.qtype, self.data.reshape(-1, count, self.data.shape[1]))

    def by_columns(self, count):
        """A matrix as several of `count` columns, whole blocks, without a copy."""
        parts = self.data.reshape(len(self.data), -1, ggml.row_bytes(self.qtype, count))
        return QTensor(self.qtype, parts.swapaxes(0, 1))


@dataclass(frozen=True)
class Layer:
    """A layer's tensors, each in the memory of its backend; None where the model has no such tensor. Norms and biases
    are float32 vectors."""

    attn_norm: np.ndarray
    attn_q: QTensor | None
    attn_q_a: QTensor | None
    attn_q_a_norm: np.ndarray | None
    attn_q_b: QTensor | None
    attn_kv_a_mqa: QTensor
    attn_kv_a_norm: np.ndarray
    attn_k_b: QTensor  # H matrices of nope rows and rank columns
    attn_v_b: QTensor  # H matrices of v rows and rank columns
    attn_output: QTensor
    ffn_norm: np.ndarray
    ffn_gate: QTensor | None  # a dense layer's, or the shared experts'
    ffn_up: QTensor | None
    ffn_down: QTensor | None
    ffn_gate_inp: QTensor | None  # the router
    exp_probs_b: np.ndarray | None
    ffn_gate_exps: QTensor | None
    ffn_up_exps: QTensor | None
    ffn_down_exps: QTensor | None


@dataclass(frozen=True)
class Weights:
    """All tensors of a model."""

    token_embd: QTensor
    output_norm: np.ndarray
    output: QTensor
    layers: list[Layer]

    @classmethod
    def from_gguf(cls, file, config, progress=None, placement=None, uploading=None):
        """Find, check and lay out the tensors.

        Parameters
        ----------
        file : ModelFile
        config : ModelConfig
        progress : callable(done, total), optional
            Layers; the transposition of ``attn_k_b`` takes some time.
        placement : Placement, optional
            In whose memory each tensor shall lie; by default all in the host's.
        uploading : callable(done), optional
            Bytes that are on their way to the memory of a GPU.

        Raises
        ------
        PymlaError
            A tensor is missing, has another shape than the metadata says, or a type that is not implemented; or a
            GPU's memory is full.
        """
        from pymla import reference

        placement = placement or Placement.on(reference, config.num_hidden_layers)
        take = _Taker(file, placement.embedding, _Total(uploading))
        embedding = (config.vocab_size, config.hidden_size)
        token_embd = take.matrix("token_embd.weight", embedding)
        layers = []
        for i, (backend, experts) in enumerate(zip(placement.layers, placement.experts, strict=True)):
            layers.append(_layer(take.to(backend), take.to(experts), config, i))
            if progress:
                progress(i + 1, config.num_hidden_layers)
        take = take.to(placement.output)
        if take.has("output.weight"):
            output = take.matrix("output.weight", embedding)
        elif placement.output is placement.embedding:
            output = token_embd
        else:
            output = take.matrix("token_embd.weight", embedding)
        return cls(token_embd, take.vector("output_norm.weight", config.hidden_size), output, layers)


class _Total:
    """Adds up the progress of one copy after the other."""

    def __init__(self, report):
        self._before, self._report = 0, report

    def __call__(self, done, total):
        if self._report:
            self._report(self._before + done)
        if done == total:
            self._before += total


class _Taker:
    """Tensors of a file, checked, in the memory of a backend.

    Parameters
    ----------
    file : ModelFile
    backend : module
    progress : callable(done, total)
        Bytes of a tensor that is copied.
    """

    def __init__(self, file, backend, progress):
        self.file, self._backend, self._progress = file, backend, progress

    def to(self, backend):
        """The same for another backend."""
        return _Taker(self.file, backend, self._progress)

    def put(self, array):
        """An array in the backend's memory."""
        return self._backend.memory.to_device(array, self._progress)

    def has(self, name):
        return name in self.file.tensors

    def tensor(self, name, *shapes):
        """A tensor that has one of `shapes`."""
        info = self.file.tensors.get(name)
        if info is None:
            raise PymlaError(
                f"{self.file.path}: tensor {name} is missing; convert the model again or take another file"
            )
        if info.qtype not in ggml.SUPPORTED:
            names = ", ".join(ggml.NAME[t] for t in ggml.SUPPORTED)
            raise PymlaError(
                f"{info.path}: tensor {name} has type {ggml.NAME[info.qtype]}, which pymla does not run; "
                f"it runs {names}"
            )
        if info.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise PymlaError(f"{info.path}: tensor {name} has shape {list(info.shape)}, expected {expected}")
        return info

    def mapped(self, name, *shapes):
        """A matrix in the file."""
        info = self.tensor(name, *shapes)
        return QTensor(info.qtype, info.data.reshape(*info.shape[:-1], ggml.row_bytes(info.qtype, info.shape[-1])))

    def matrix(self, name, *shapes):
        w = self.mapped(name, *shapes)
        return QTensor(w.qtype, self.put(w.data))

    def vector(self, name, size):
        info = self.tensor(name, (size,))
        if info.qtype != ggml.F32:
            raise PymlaError(f"{info.path}: tensor {name} has type {ggml.NAME[info.qtype]}, expected F32")
        return self.put(info.data.view(np.float32))


def _layer(take, take_experts, config, index):
    blk = f"blk.{index}."
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    tensors = dict.fromkeys(Layer.__dataclass_fields__)
    tensors |= {
        "attn_norm": take.vector(blk + "attn_norm.weight", hidden),
        "attn_kv_a_mqa": take.matrix(blk + "attn_kv_a_mqa.weight", (rank + config.qk_rope_head_dim, hidden)),
        "attn_kv_a_norm": take.vector(blk + "attn_kv_a_norm.weight", rank),
        "attn_output": take.matrix(blk + "attn_output.weight", (hidden, heads * config.v_head_dim)),
        "ffn_norm": take.vector(blk + "ffn_norm.weight", hidden),
    }
    if config.q_lora_rank:
        tensors["attn_q_a"] = take.matrix(blk + "attn_q_a.weight", (config.q_lora_rank, hidden))
        tensors["attn_q_a_norm"] = take.vector(blk + "attn_q_a_norm.weight", config.q_lora_rank)
        tensors["attn_q_b"] = take.matrix(blk + "attn_q_b.weight", (queries, config.q_lora_rank))
    else:
        tensors["attn_q"] = take.matrix(blk + "attn_q.weight", (queries, hidden))
    tensors["attn_k_b"], tensors["attn_v_b"] = _kv_b(take, config, blk)
    if index < config.first_k_dense_replace:
        tensors |= _ffn(take, blk, "", config.intermediate_size, hidden)
    else:
        tensors |= _experts(take, take_experts, config, blk)
    return Layer(**tensors)


def _ffn(take, blk, suffix, inner, hidden):
    return {
        "ffn_gate": take.matrix(f"{blk}ffn_gate{suffix}.weight", (inner, hidden)),
        "ffn_up": take.matrix(f"{blk}ffn_up{suffix}.weight", (inner, hidden)),
        "ffn_down": take.matrix(f"{blk}ffn_down{suffix}.weight", (hidden, inner)),
    }


def _experts(take, routed, config, blk):
    experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    tensors = {
        "ffn_gate_inp": take.matrix(blk + "ffn_gate_inp.weight", (experts, hidden)),
        "ffn_down_exps": routed.matrix(blk + "ffn_down_exps.weight", (experts, hidden, inner)),
    }
    if take.has(blk + "exp_probs_b.bias"):
        tensors["exp_probs_b"] = take.vector(blk + "exp_probs_b.bias", experts)
    if take.has(blk + "ffn_gate_up_exps.weight"):
        both = routed.matrix(blk + "ffn_gate_up_exps.weight", (experts, 2 * inner, hidden))
        tensors["ffn_gate_exps"] = QTensor(both.qtype, both.data[:, :inner])
        tensors["ffn_up_exps"] = QTensor(both.qtype, both.data[:, inner:])
    else:
        tensors["ffn_gate_exps"] = routed.matrix(blk + "ffn_gate_exps.weight", (experts, inner, hidden))
        tensors["ffn_up_exps"] = routed.matrix(blk + "ffn_up_exps.weight", (experts, inner, hidden))
    if config.n_shared_experts:
        tensors |= _ffn(take, blk, "_shexp", config.n_shared_experts * inner, hidden)
    elif take.has(blk + "ffn_gate_shexp.weight"):
        raise PymlaError(
            f"{take.file.path}: tensor {blk}ffn_gate_shexp.weight is there, but metadata expert_shared_count says that "
            "no expert is shared; convert the model again"
        )
    return tensors


def _kv_b(take, config, blk):
    """``W_k_b`` and ``W_v_b``, each H matrices of rank columns, from any of the three layouts."""
    heads, rank, nope, v = (
        config.num_attention_heads,
        config.kv_lora_rank,
        config.qk_nope_head_dim,
        config.v_head_dim,
    )
    if take.has(blk + "attn_k_b.weight") and not take.has(blk + "attn_kv_b.weight"):
        k_b = take.mapped(blk + "attn_k_b.weight", (heads, rank, nope), (heads * rank, nope))
        v_b = take.mapped(blk + "attn_v_b.weight", (heads, v, rank), (heads * v, rank))
        k_b, v_b = (QTensor(w.qtype, w.data.reshape(heads, -1, w.data.shape[-1])) for w in (k_b, v_b))
        k_b = _transpose(k_b)
    else:
        kv_b = take.mapped(blk + "attn_kv_b.weight", (heads * (nope + v), rank))
        by_head = kv_b.data.reshape(heads, nope + v, -1)
        k_b, v_b = QTensor(kv_b.qtype, by_head[:, :nope]), QTensor(kv_b.qtype, by_head[:, nope:])
    return QTensor(k_b.qtype, take.put(k_b.data)), QTensor(v_b.qtype, take.put(v_b.data))


def _transpose(w):
    """Transposed matrices, read-only. Float types stay what they are; quantised ones become F16, which keeps more bits
    than their blocks have, at half the size of F32."""
    from pymla.reference.quant import dequantise, quantise

    qtype = w.qtype if w.qtype not in ggml.QUANTISED else ggml.F16
    data = np.stack([quantise(dequantise(matrix, w.qtype).T, qtype) for matrix in w.data])
    data.flags.writeable = False
    return QTensor(qtype, data)
