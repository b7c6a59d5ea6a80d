"""Hugging Face DeepSeek V2 and V3 checkpoints to GGUF files.

Tensor names, metadata keys and values are those of llama.cpp's ``convert_hf_to_gguf.py`` (``conversion/deepseek.py``,
class DeepseekV2Model) for the layout "split", those of ik_llama.cpp's for "all", and those that llama.cpp wrote before
April 2025 for "kv_b". The file is written piece by piece: memory holds some rows of one tensor, or one layer's kv_b.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import LlamaFileType
from tokenizers import Tokenizer, normalizers

from pymla import ggml
from pymla.checkpoint import Checkpoint, read_json
from pymla.errors import PymlaError
from pymla.reference.quant import quantise
from pymla.textfile import decode, unmarked
from pymla.tokenizer import PRE_TOKENIZERS

LAYOUTS = ("kv_b", "split", "all")

#: Types of the matrices, as named on the command line, with the number that ``general.file_type`` gives them.
QTYPES = {
    "f32": (ggml.F32, LlamaFileType.ALL_F32),
    "f16": (ggml.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (ggml.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (ggml.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (ggml.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}

#: Value of scoring_func where config.json has none, by the class that reads it.
ARCHITECTURES = {"DeepseekV2ForCausalLM": "softmax", "DeepseekV3ForCausalLM": "sigmoid"}

# What gguf.SpecialVocab reads of a checkpoint's folder.
_TOKENIZER_FILES = ("*.json", "*.jinja", "additional_chat_templates/*.jinja")

# Where pre-tokenizers differ: line ends, indentation, digits in rows, Chinese, Japanese and Korean beside Latin text,
# accents, symbols, contractions, punctuation beside letters. The accent written apart shows a normaliser.
_PROBE = (
    "def f(x_1):\n    return  x*3333 + 12.5e-10\r\n\n\n \t\n  I'm sure, we'LL see: 'it's'!!  \n"
    "在apple工作1314151天～ 「東京」はひらがなカタカナ、한국어도 됩니다。 нещо на Български Ça été e\u0301 ΑΒΓ\n"
    '$100 ^_^ <tag/>#!/bin/sh (a)[b]{c} 3.3 3..3 ½ ² Ⅷ ٣٤ 🚀 👩\u200d🚀 \u00a0x\u3000y\u2003z ----==== `"""` end   '
)
_USER_DEFINED = gguf.TokenType.USER_DEFINED
_PIECE_WEIGHTS = 1 << 22
_F16_MAX = 65504.0


class Conversion(NamedTuple):
    """What `convert` did."""

    path: Path
    nbytes: int
    notes: tuple[str, ...]  # what a user should know: tensors kept in another type, layers left out


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]  # NumPy order, columns last
    qtype: int
    pieces: Callable[[], Iterator[np.ndarray]]  # its rows in order, float32 (rows, columns)

    @property
    def nbytes(self) -> int:
        return ggml.row_bytes(self.qtype, self.shape[-1]) * math.prod(self.shape[:-1])


def convert(
    folder: str | Path,
    path: str | Path,
    *,
    qtype: str = "q8_0",
    layout: str = "kv_b",
    pre: str | None = None,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write a checkpoint as a GGUF file. The file appears under its name when it is complete.

    Norms, biases and the router stay F32. With "q4_0" the output matrix (the embeddings, where the two are one) is
    Q8_0: there an error of 4 bits costs most. A matrix whose columns are no multiple of the block becomes F16.

    Parameters
    ----------
    folder : Hugging Face folder: config.json, tokenizer.json, safetensors in one file or several; float8 weights with
        scales per block (as DeepSeek V3 is published) are read, too
    path : the GGUF file to write
    qtype : type of the matrices: "f32", "f16", "bf16", "q8_0" or "q4_0"
    layout : how W_kv_b is stored: "kv_b" (whole; llama.cpp before April 2025, ik_llama.cpp), "split" (k_b and v_b;
        llama.cpp since) or "all" (all three; ik_llama.cpp)
    pre : name of the pre-tokenizer; found out by default
    name : the model's name in the metadata; the folder's by default
    progress : called with (bytes written, bytes in all)

    Returns
    -------
    Conversion

    Raises
    ------
    PymlaError
        An unknown type or layout; a folder that is not such a checkpoint, is incomplete or damaged, or says something
        that GGUF cannot; not enough free disk.
    """
    if layout not in LAYOUTS:
        raise PymlaError(f"unknown layout {layout!r}; choose {', '.join(LAYOUTS)}")
    if qtype not in QTYPES:
        raise PymlaError(f"unknown type {qtype!r}; choose {', '.join(QTYPES)}")
    folder, path = Path(folder), Path(path)
    config = _Config(folder / "config.json")
    plan = _Plan(config, Checkpoint(folder, config.fp8_block()), layout, QTYPES[qtype][0])
    tensors = list(plan.tensors())
    plan.check_leftovers()
    total = sum(tensor.nbytes for tensor in tensors)
    _check_space(path, total)
    partial_path = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(partial_path, "deepseek2")
    writer.add_type("model")
    writer.add_name(name or folder.resolve().name)
    _add_metadata(writer, config, layout)
    writer.add_file_type(QTYPES[qtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, folder, config.size("vocab_size"), pre)
    try:
        _write(writer, tensors, total, progress)
        partial_path.replace(path)
    except OSError as error:
        raise PymlaError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        writer.close()
        partial_path.unlink(missing_ok=True)
    return Conversion(path, path.stat().st_size, tuple(plan.notes))


class _Config:
    """config.json with the type of every value checked."""

    def __init__(self, path: Path):
        self.path = path
        self._values = read_json(path)
        architectures = self._values.get("architectures")
        architecture = architectures[0] if isinstance(architectures, list) and architectures else architectures
        if architecture not in ARCHITECTURES:
            self.refuse("architectures", architectures, f"{' and '.join(ARCHITECTURES)} are converted")
        self.scoring_func = self.get("scoring_func", str, ARCHITECTURES[architecture])
        if self.scoring_func not in ("softmax", "sigmoid"):
            self.refuse("scoring_func", self.scoring_func, "softmax or sigmoid is expected")
        for key, kind, only in (
            ("hidden_act", str, "silu"),
            ("attention_bias", bool, False),
            ("mlp_bias", bool, False),
            ("moe_layer_freq", int, 1),
            ("rope_interleave", bool, True),
        ):
            if self.get(key, kind, only) != only:
                self.refuse(key, self._values[key], f"only {json.dumps(only)} is converted")
        self.rope = self._rope()

    def refuse(self, key: str, value: Any, reason: str):
        raise PymlaError(f"{self.path}: {key} is {json.dumps(value)}; {reason}")

    def get(self, key: str, kind: type, default: Any = None, among: dict | None = None) -> Any:
        """A value, or the default where the key is absent or null. An integer will do for a float."""
        value = (self._values if among is None else among).get(key)
        if value is None:
            return default
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            self.refuse(key, value, f"a value of type {kind.__name__} is expected")
        return value

    def size(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """An integer. Without a default the key must be there."""
        value = self.get(key, int, default)
        if value is None:
            raise PymlaError(f"{self.path}: {key} is missing")
        if value < minimum:
            self.refuse(key, value, f"at least {minimum} is expected")
        return value

    def fp8_block(self) -> tuple[int, int]:
        """Rows and columns of a float8 tensor that share a scale."""
        quantisation = self.get("quantization_config", dict)
        if quantisation is None:
            return 128, 128
        if quantisation.get("quant_method") != "fp8":
            self.refuse("quantization_config", quantisation, "only quant_method fp8 is converted")
        block = quantisation.get("weight_block_size", [128, 128])
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
            self.refuse("quantization_config.weight_block_size", block, "two sizes are expected")
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

    def _rope(self) -> dict[str, Any]:
        """Rope's parameters as transformers 5 names them, from older files, too."""
        rope = self.get("rope_parameters", dict) or self.get("rope_scaling", dict) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        theta = self.get("rope_theta", float, self.get("rope_theta", float, 10000.0), among=rope)
        if kind == "default":
            return {"rope_theta": theta}
        if kind != "yarn":
            self.refuse("rope_type", kind, "yarn and default are converted")
        yarn = {"rope_theta": theta, "factor": self.get("factor", float, among=rope)}
        yarn["original"] = self.get("original_max_position_embeddings", int, among=rope)
        for key, value in yarn.items():
            if value is None:
                raise PymlaError(f"{self.path}: {key} of the rope parameters is missing, which yarn needs")
        for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            yarn[key] = self.get(key, float, among=rope)
        if yarn["mscale"] != yarn["mscale_all_dim"] or not yarn["mscale"]:
            self.refuse("mscale", yarn["mscale"], f"it must equal mscale_all_dim {yarn['mscale_all_dim']}, not be 0")
        if rope.get("attention_factor") is not None:
            self.refuse("attention_factor", rope["attention_factor"], "GGUF cannot hold it for this architecture")
        return yarn


def _add_metadata(w: gguf.GGUFWriter, config: _Config, layout: str) -> None:
    size = config.size
    w.add_block_count(size("num_hidden_layers"))
    w.add_context_length(size("max_position_embeddings"))
    w.add_embedding_length(size("hidden_size"))
    w.add_feed_forward_length(size("intermediate_size"))
    w.add_head_count(size("num_attention_heads"))
    w.add_layer_norm_rms_eps(config.get("rms_norm_eps", float, 1e-6))
    w.add_leading_dense_block_count(config.dense_layers)
    w.add_vocab_size(size("vocab_size"))
    if q_lora_rank := size("q_lora_rank", 0, 0):
        w.add_q_lora_rank(q_lora_rank)
    rank, rope_dim = size("kv_lora_rank"), size("qk_rope_head_dim")
    head_dim, v_head_dim = size("qk_nope_head_dim") + rope_dim, size("v_head_dim")
    w.add_kv_lora_rank(rank)
    if layout == "split":
        w.add_head_count_kv(1)
        w.add_key_length(rank + rope_dim)
        w.add_value_length(rank)
        w.add_key_length_mla(head_dim)
        w.add_value_length_mla(v_head_dim)
    else:
        w.add_head_count_kv(size("num_attention_heads"))
        w.add_key_length(head_dim)
        w.add_value_length(v_head_dim)
    _add_experts(w, config)
    w.add_rope_dimension_count(rope_dim)
    w.add_rope_freq_base(config.rope["rope_theta"])
    if "factor" in config.rope:
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(config.rope["factor"])
        w.add_rope_scaling_orig_ctx_len(config.rope["original"])
        w.add_rope_scaling_yarn_log_mul(0.1 * config.rope["mscale_all_dim"])
        if config.rope["beta_fast"] is not None:
            w.add_rope_scaling_yarn_beta_fast(config.rope["beta_fast"])
        if config.rope["beta_slow"] is not None:
            w.add_rope_scaling_yarn_beta_slow(config.rope["beta_slow"])


def _add_experts(w: gguf.GGUFWriter, config: _Config) -> None:
    # llama.cpp wants both keys of a dense model, too.
    w.add_expert_shared_count(config.size("n_shared_experts", 0, 0))
    w.add_expert_feed_forward_length(config.size("moe_intermediate_size", config.size("intermediate_size")))
    if not config.experts:
        return
    w.add_expert_count(config.experts)
    w.add_expert_used_count(config.size("num_experts_per_tok"))
    w.add_expert_weights_scale(config.get("routed_scaling_factor", float, 1.0))
    w.add_expert_weights_norm(config.get("norm_topk_prob", bool, False))
    w.add_expert_gating_func(gguf.ExpertGatingFuncType[config.scoring_func.upper()])
    # V2's "greedy" chooses among all experts, whatever the groups.
    if config.size("n_group", 1) > 1 and config.get("topk_method", str) != "greedy":
        w.add_expert_group_count(config.size("n_group"))
        w.add_expert_group_used_count(config.size("topk_group"))


class _Plan:
    """Which tensors the file gets, and where their rows come from. Every tensor of the checkpoint is accounted for."""

    def __init__(self, config: _Config, checkpoint: Checkpoint, layout: str, qtype: int):
        self.config, self.checkpoint, self.layout, self.qtype = config, checkpoint, layout, qtype
        self.notes: list[str] = []
        self._used: set[str] = set()

    def tensors(self) -> Iterator[_Tensor]:
        """All tensors in llama.cpp's order."""
        config, hidden, vocab = self.config, self.config.size("hidden_size"), self.config.size("vocab_size")
        tied = config.get("tie_word_embeddings", bool, False)
        output_type = ggml.Q8_0 if self.qtype == ggml.Q4_0 else self.qtype
        yield self._matrix(
            "token_embd.weight", "model.embed_tokens.weight", vocab, hidden, output_type if tied else self.qtype
        )
        yield self._vector("output_norm.weight", "model.norm.weight", hidden)
        if tied:
            self._used.add("lm_head.weight")
        else:
            yield self._matrix("output.weight", "lm_head.weight", vocab, hidden, output_type)
        for layer in range(config.size("num_hidden_layers")):
            yield from self._attention(f"blk.{layer}.", f"model.layers.{layer}.")
            blk, mlp = f"blk.{layer}.", f"model.layers.{layer}.mlp."
            if layer < config.dense_layers:
                yield from self._ffn(blk, mlp, "", config.size("intermediate_size"))
            else:
                yield from self._experts(blk, mlp)

    def check_leftovers(self) -> None:
        """Raise PymlaError for a tensor that `tensors` did not take, unless it belongs to a further layer (nextn)."""
        layers = self.config.size("num_hidden_layers")
        nextn = set()
        for name in sorted(self.checkpoint.names - self._used):
            parts = name.split(".")
            if name.startswith("model.layers.") and parts[2].isdecimal() and int(parts[2]) >= layers:
                nextn.add(int(parts[2]))
            elif not name.endswith("rotary_emb.inv_freq"):
                raise PymlaError(f"{self.checkpoint.folder}: tensor {name} is not one of this architecture's")
        if nextn:
            self.notes.append(f"layers {', '.join(map(str, sorted(nextn)))} predict further tokens and are left out")

    def _attention(self, blk: str, hf: str) -> Iterator[_Tensor]:
        size = self.config.size
        hidden, heads, rank = size("hidden_size"), size("num_attention_heads"), size("kv_lora_rank")
        rope_dim, v_head_dim = size("qk_rope_head_dim"), size("v_head_dim")
        queries = heads * (size("qk_nope_head_dim") + rope_dim)
        q_lora_rank = size("q_lora_rank", 0, 0)
        attn = hf + "self_attn."
        yield self._vector(blk + "attn_norm.weight", hf + "input_layernorm.weight", hidden)
        if q_lora_rank:
            yield self._matrix(blk + "attn_q_a.weight", attn + "q_a_proj.weight", q_lora_rank, hidden)
            yield self._vector(blk + "attn_q_a_norm.weight", attn + "q_a_layernorm.weight", q_lora_rank)
            yield self._matrix(blk + "attn_q_b.weight", attn + "q_b_proj.weight", queries, q_lora_rank)
        else:
            yield self._matrix(blk + "attn_q.weight", attn + "q_proj.weight", queries, hidden)
        yield self._matrix(blk + "attn_kv_a_mqa.weight", attn + "kv_a_proj_with_mqa.weight", rank + rope_dim, hidden)
        yield self._vector(blk + "attn_kv_a_norm.weight", attn + "kv_a_layernorm.weight", rank)
        yield from self._kv_b(blk, attn + "kv_b_proj.weight", heads, size("qk_nope_head_dim"), v_head_dim, rank)
        yield self._matrix(blk + "attn_output.weight", attn + "o_proj.weight", hidden, heads * v_head_dim)
        yield self._vector(blk + "ffn_norm.weight", hf + "post_attention_layernorm.weight", hidden)

    def _kv_b(self, blk: str, source: str, heads: int, nope: int, v: int, rank: int) -> Iterator[_Tensor]:
        whole = self._matrix(blk + "attn_kv_b.weight", source, heads * (nope + v), rank)
        if self.layout != "split":
            yield whole
        if self.layout == "kv_b":
            return

        def k_b():
            by_head = self.checkpoint.read(source).reshape(heads, nope + v, rank)
            yield np.ascontiguousarray(by_head[:, :nope].transpose(0, 2, 1)).reshape(heads * rank, nope)

        def v_b():
            by_head = self.checkpoint.read(source).reshape(heads, nope + v, rank)
            yield by_head[:, nope:].reshape(heads * v, rank)

        # ik_llama.cpp wants them as matrices.
        flat = self.layout == "all"
        k_shape = (heads * rank, nope) if flat else (heads, rank, nope)
        v_shape = (heads * v, rank) if flat else (heads, v, rank)
        k_name, v_name = blk + "attn_k_b.weight", blk + "attn_v_b.weight"
        yield _Tensor(k_name, k_shape, self._fitting(k_name, nope, self.qtype), k_b)
        yield _Tensor(v_name, v_shape, self._fitting(v_name, rank, self.qtype), v_b)

    def _ffn(self, blk: str, mlp: str, suffix: str, width: int) -> Iterator[_Tensor]:
        """A dense network, or with suffix "_shexp" the shared experts."""
        hidden = self.config.size("hidden_size")
        yield self._matrix(f"{blk}ffn_gate{suffix}.weight", mlp + "gate_proj.weight", width, hidden)
        yield self._matrix(f"{blk}ffn_up{suffix}.weight", mlp + "up_proj.weight", width, hidden)
        yield self._matrix(f"{blk}ffn_down{suffix}.weight", mlp + "down_proj.weight", hidden, width)

    def _experts(self, blk: str, mlp: str) -> Iterator[_Tensor]:
        size, experts = self.config.size, self.config.experts
        hidden, width, shared = size("hidden_size"), size("moe_intermediate_size"), size("n_shared_experts", 0, 0)
        yield self._matrix(blk + "ffn_gate_inp.weight", mlp + "gate.weight", experts, hidden, ggml.F32)
        bias = mlp + "gate.e_score_correction_bias"
        if bias in self.checkpoint.names:
            yield self._vector(blk + "exp_probs_b.bias", bias, experts)
        fused = f"{mlp}experts.gate_up_proj" in self.checkpoint.names
        yield from (self._fused_experts if fused else self._single_experts)(blk, mlp + "experts.", hidden, width)
        if shared:
            yield from self._ffn(blk, mlp + "shared_experts.", "_shexp", shared * width)

    def _single_experts(self, blk: str, hf: str, hidden: int, width: int) -> Iterator[_Tensor]:
        """Experts stored one by one, as DeepSeek publishes them."""
        for part, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            sources = [f"{hf}{expert}.{part}_proj.weight" for expert in range(self.config.experts)]
            for source in sources:
                self._take(source, (rows, columns))
            spans = [(source, 0, rows) for source in sources]
            yield self._stacked(f"{blk}ffn_{part}_exps.weight", spans, rows, columns)

    def _fused_experts(self, blk: str, hf: str, hidden: int, width: int) -> Iterator[_Tensor]:
        """Experts stored in one tensor, gate above up, as transformers 5 holds them."""
        experts = self.config.experts
        gate_up, down = hf + "gate_up_proj", hf + "down_proj"
        self._take(gate_up, (experts, 2 * width, hidden))
        self._take(down, (experts, hidden, width))
        starts = range(0, experts * 2 * width, 2 * width)
        gates = [(gate_up, start, start + width) for start in starts]
        ups = [(gate_up, start + width, start + 2 * width) for start in starts]
        yield self._stacked(blk + "ffn_gate_exps.weight", gates, width, hidden)
        yield self._stacked(blk + "ffn_up_exps.weight", ups, width, hidden)
        yield self._stacked(blk + "ffn_down_exps.weight", [(down, 0, experts * hidden)], hidden, width)

    def _stacked(self, name: str, spans: list[tuple[str, int, int]], rows: int, columns: int) -> _Tensor:
        shape = (self.config.experts, rows, columns)
        return _Tensor(name, shape, self._fitting(name, columns, self.qtype), partial(self._rows, spans, columns))

    def _matrix(self, name: str, source: str, rows: int, columns: int, qtype: int | None = None) -> _Tensor:
        self._take(source, (rows, columns))
        qtype = self._fitting(name, columns, self.qtype if qtype is None else qtype)
        return _Tensor(name, (rows, columns), qtype, partial(self._rows, [(source, 0, rows)], columns))

    def _vector(self, name: str, source: str, size: int) -> _Tensor:
        self._take(source, (size,))
        return _Tensor(name, (size,), ggml.F32, partial(self._rows, [(source, 0, 1)], size))

    def _take(self, source: str, shape: tuple[int, ...]) -> None:
        self.checkpoint.expect(source, shape)
        self._used.add(source)

    def _rows(self, spans: list[tuple[str, int, int]], columns: int) -> Iterator[np.ndarray]:
        """Rows of several tensors one after the other, a few at a time."""
        step = max(1, _PIECE_WEIGHTS // columns)
        for source, start, stop in spans:
            for first in range(start, stop, step):
                yield self.checkpoint.rows(source, first, min(first + step, stop))

    def _fitting(self, name: str, columns: int, qtype: int) -> int:
        if columns % ggml.BLOCK_SIZE[qtype] == 0:
            return qtype
        self.notes.append(f"{name} is F16: {columns} columns are no multiple of {ggml.NAME[qtype]}'s block")
        return ggml.F16


def _write(writer: gguf.GGUFWriter, tensors: list[_Tensor], total: int, progress) -> None:
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    done = 0
    for tensor in tensors:
        for piece in tensor.pieces():
            if tensor.qtype == ggml.F16 and np.abs(piece).max() > _F16_MAX:
                raise PymlaError(f"{tensor.name} holds {np.abs(piece).max():g}, too large for F16; take bf16 or f32")
            blocks = quantise(piece, tensor.qtype)
            file.write(blocks.data)
            done += blocks.nbytes
            if progress is not None:
                progress(done, total)
        writer.write_padding(file, tensor.nbytes)


def _check_space(path: Path, needed: int) -> None:
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise PymlaError(f"{path}: cannot be written ({error.strerror})") from error
    if needed > free:
        raise PymlaError(f"{path}: needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB free")


def _add_tokenizer(w: gguf.GGUFWriter, folder: Path, vocab_size: int, pre: str | None) -> None:
    """Tokens, merges, special tokens and chat template, as llama.cpp's converter writes a byte-level BPE."""
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) and model.get("type") == "BPE" else None
    added = tokenizer.get("added_tokens", [])
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise PymlaError(f"{path}: no byte-pair encoding; other tokenizers are not converted")
    try:
        entries = {token_id: (token, gguf.TokenType.NORMAL) for token, token_id in vocab.items()}
        for token in added:
            content, special = token["content"], token["special"] or _looks_special(token["content"])
            # llama.cpp compares a user-defined token with the text as it stands.
            entry = (content, gguf.TokenType.CONTROL) if special else (content.replace("▁", " "), _USER_DEFINED)
            entries[token["id"]] = entry
        lowest, highest = min(entries), max(entries)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PymlaError(f"{path}: damaged vocabulary ({error!r}); download it again") from error
    if lowest < 0 or highest >= vocab_size:
        raise PymlaError(f"{path}: has token ids {lowest} to {highest}; config.json's vocab_size is {vocab_size}")
    tokens, types = zip(*(entries.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(vocab_size)), strict=True)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre or _detect_pre(path))
    w.add_token_list(tokens)
    w.add_token_types(types)
    try:
        with unmarked(folder, _TOKENIZER_FILES) as readable:
            gguf.SpecialVocab(readable, load_merges=True, n_vocab=vocab_size).add_to_gguf(w, quiet=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise PymlaError(f"{folder}: special tokens cannot be read from the tokenizer's files ({error})") from error


def _looks_special(token: str) -> bool:
    """Whether it is a control token by its looks: DeepSeek's files do not flag all of theirs."""
    return token.startswith(("<|", "<｜")) and token.endswith(("|>", "｜>"))


def _detect_pre(path: Path) -> str:
    """Name of the pre-tokenizer that cuts a telling text as the file's own does, or that leads to the same tokens.

    The second is for files that say the same differently: DeepSeek's take numbers apart digit by digit, llama.cpp's
    deepseek-llm leaves them whole, and no merge of that vocabulary joins digits.
    """
    try:
        tokenizer = Tokenizer.from_str(decode(path.read_bytes(), path))
        own = tokenizer.pre_tokenizer
        pieces = own.pre_tokenize_str(_PROBE) if own else None
        ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    except Exception as error:  # the tokenizers package raises nothing more precise
        raise PymlaError(f"{path}: cannot be read by the tokenizers package ({error})") from error
    tokenizer.normalizer = normalizers.Sequence([])  # llama.cpp's have none
    same_ids = []
    for name, pre_tokenizer in PRE_TOKENIZERS.items():
        tokenizer.pre_tokenizer = pre_tokenizer
        if tokenizer.encode(_PROBE, add_special_tokens=False).ids == ids:
            if pre_tokenizer.pre_tokenize_str(_PROBE) == pieces:
                return name
            same_ids.append(name)
    if not same_ids:
        raise PymlaError(f"{path}: its pre-tokenizer is none of {', '.join(PRE_TOKENIZERS)}; name one with --pre")
    return same_ids[0]
