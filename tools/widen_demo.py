"""A model that computes what the demo model computes, with rows that blocks of 256 weights divide.

The demo model's rows have 64, 128 or 256 weights, so that K-quants and IQ types do not fit most of them. Here neurons
of experts and of shared experts, and the components of low-rank queries and of latent rows, are repeated, and
each of the columns that read one of them becomes several, which add up to it (Chen et al., "Net2Net", arXiv:1511.05641,
section 2.2). The shares are random, so that no two columns of a block are alike. Weights are float32, and the layout is
kv_b, which llama.cpp and ik_llama.cpp load at any size.

    python tools/widen_demo.py wide.gguf
"""

import math
import sys
from pathlib import Path

import numpy as np
from gguf import Keys

from pymla import ggml
from pymla.engine.loading import demo_path
from pymla.files import gguf_writer
from pymla.files.gguf_reader import ModelFile
from pymla.files.gguf_writer import NewTensor
from pymla.reference.quant import dequantise

#: Weights of a row, or a part of that.
BLOCK = 256

#: Tensors whose first rows, and tensors whose columns, are the components that are widened, by stem; and the key of
#: their number.
_WIDENED = (
    (("attn_q_a", "attn_q_a_norm"), ("attn_q_b",), Keys.Attention.Q_LORA_RANK),
    (("attn_kv_a_mqa", "attn_kv_a_norm"), ("attn_kv_b",), Keys.Attention.KV_LORA_RANK),
    (("ffn_gate_exps", "ffn_up_exps"), ("ffn_down_exps",), Keys.LLM.EXPERT_FEED_FORWARD_LENGTH),
    (("ffn_gate_shexp", "ffn_up_shexp"), ("ffn_down_shexp",), Keys.LLM.EXPERT_FEED_FORWARD_LENGTH),
)


def widened(weights: np.ndarray, stem: str, sizes: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    """The weights of a tensor in the wider model.

    Parameters
    ----------
    weights : float32 (..., rows, columns), or (n,) of a norm
    stem : of the tensor's name
    sizes : how many components there are, by the keys of `_WIDENED`
    """
    for writers, readers, key in _WIDENED:
        size = sizes[key]
        times = BLOCK // math.gcd(size, BLOCK)
        if stem in writers:
            axis = 0 if weights.ndim == 1 else -2
            components, rest = np.split(weights, [size], axis)
            return np.concatenate([*[components] * times, rest], axis)
        if stem in readers:
            shares = rng.uniform(0.5, 1.5, (times, size)).astype(np.float32)
            return np.concatenate([weights * share for share in shares / shares.sum(0)], -1)
    return weights


def write(path: Path, source: Path) -> None:
    """Write the wider model of a GGUF file in the layout kv_b."""
    file, rng = ModelFile.open(source), np.random.default_rng(0)
    arch = file.get(Keys.General.ARCHITECTURE, str)
    keys = {key: key.format(arch=arch) for *_, key in _WIDENED}
    sizes = {key: file.get(name, int) for key, name in keys.items()}
    wider = {keys[key]: math.lcm(size, BLOCK) for key, size in sizes.items()}
    tensors = []
    for tensor in file.tensors.values():
        rows = tensor.data.reshape(-1, ggml.row_bytes(tensor.qtype, tensor.shape[-1]))
        stem = tensor.name.removesuffix(".weight").rpartition(".")[2]
        made = widened(dequantise(rows, tensor.qtype).reshape(tensor.shape), stem, sizes, rng)
        tensors.append(NewTensor(tensor.name, made.shape, ggml.F32, lambda made=made: [np.ascontiguousarray(made)]))
    metadata = {**file.metadata, **wider, Keys.General.FILE_TYPE: 0}
    del metadata[Keys.General.ARCHITECTURE]
    gguf_writer.write(path, arch, metadata, tensors)


if __name__ == "__main__":
    write(Path(sys.argv[1]), demo_path())
