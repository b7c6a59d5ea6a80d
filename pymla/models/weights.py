"""The tensors of a model, by layer, under their GGUF names: views of the mapped file wherever its layout allows, or
copies in the memory of a GPU.

Three layouts of ``W_k_b`` and ``W_v_b`` exist in files: ``attn_kv_b`` alone (before April 2025), ``attn_k_b`` and
``attn_v_b`` (llama.cpp since), and all three (ik_llama.cpp, with a two-dimensional ``attn_k_b``). The engine works with
the rows of ``attn_kv_b``, in its absorbed form as well: what it saves in reading pays for multiplying by the transpose.
Where a file has ``attn_k_b`` alone, which is the transpose, it is transposed back at load.
"""

from dataclasses import dataclass

import numpy as np

from pymla import ggml
from pymla.models.placement import Placement
from pymla.models.tensors import find, layer_tensors, outer_tensors
from pymla.tensor import QTensor


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
        specs = {spec.field: spec for spec in outer_tensors(config, file.tensors)}
        token_embd = take.matrix(specs["token_embd"])
        layers = []
        for i, (backend, experts) in enumerate(zip(placement.layers, placement.experts, strict=True)):
            layers.append(_layer(take.to(backend), take.to(experts), config, i))
            if progress:
                progress(i + 1, config.num_hidden_layers)
        take = take.to(placement.output)
        if "output" in specs:
            output = take.matrix(specs["output"])
        elif placement.output is placement.embedding:
            output = token_embd
        else:
            output = take.matrix(specs["token_embd"])
        return cls(token_embd, take.vector(specs["output_norm"]), output, layers)


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

    def find(self, spec):
        """A tensor in the file, which is to be read."""
        self.file.check_unchanged()
        return find(self.file, spec)

    def mapped(self, spec):
        """A matrix in the file."""
        info = self.find(spec)
        return QTensor(info.qtype, info.data.reshape(*info.shape[:-1], ggml.row_bytes(info.qtype, info.shape[-1])))

    def matrix(self, spec):
        w = self.mapped(spec)
        return QTensor(w.qtype, self.put(w.data))

    def vector(self, spec):
        return self.put(self.find(spec).data.view(np.float32))


def _layer(take, take_experts, config, index):
    """A layer; `take_experts` for its routed experts."""
    specs = {spec.field: spec for spec in layer_tensors(config, index, take.file.tensors)}
    tensors = dict.fromkeys(Layer.__dataclass_fields__)
    tensors["attn_k_b"], tensors["attn_v_b"] = _kv_b(take, config, specs)
    for field in specs.keys() - {"attn_kv_b", "attn_k_b", "attn_v_b", "ffn_gate_up_exps"}:
        spec = specs[field]
        taker = take_experts if spec.part == "experts" else take
        tensors[field] = taker.vector(spec) if spec.is_vector else taker.matrix(spec)
    if "ffn_gate_up_exps" in specs:
        both, inner = take_experts.matrix(specs["ffn_gate_up_exps"]), config.moe_intermediate_size
        tensors["ffn_gate_exps"] = QTensor(both.qtype, both.data[:, :inner])
        tensors["ffn_up_exps"] = QTensor(both.qtype, both.data[:, inner:])
    return Layer(**tensors)


def _kv_b(take, config, specs):
    """``W_k_b`` and ``W_v_b``, each H matrices of rank columns, from any of the three layouts."""
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    if "attn_kv_b" in specs:
        kv_b = take.mapped(specs["attn_kv_b"])
        by_head = kv_b.data.reshape(heads, nope + config.v_head_dim, -1)
        k_b, v_b = QTensor(kv_b.qtype, by_head[:, :nope]), QTensor(kv_b.qtype, by_head[:, nope:])
    else:
        k_b, v_b = (take.mapped(specs[field]) for field in ("attn_k_b", "attn_v_b"))
        k_b, v_b = (QTensor(w.qtype, w.data.reshape(heads, -1, w.data.shape[-1])) for w in (k_b, v_b))
        k_b = _transpose(k_b)
    return QTensor(k_b.qtype, take.put(k_b.data)), QTensor(v_b.qtype, take.put(v_b.data))


def _transpose(w):
    """Transposed matrices, read-only. Float types stay what they are; quantised ones become F16, which keeps more bits
    than their blocks have, at half the size of F32."""
    from pymla.reference.quant import dequantise, quantise

    qtype = w.qtype if w.qtype not in ggml.QUANTISED else ggml.F16
    data = np.stack([quantise(dequantise(matrix, w.qtype).T, qtype) for matrix in w.data])
    data.flags.writeable = False
    return QTensor(qtype, data)
