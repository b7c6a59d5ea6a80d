"""Hugging Face DeepSeek V2 and V3 checkpoints to GGUF files.

Tensor names, metadata keys and values are those of llama.cpp's ``convert_hf_to_gguf.py`` (``conversion/deepseek.py``,
class DeepseekV2Model) for the layout "split", those of ik_llama.cpp's for "all", and those that llama.cpp wrote before
April 2025 for "kv_b". The file is written piece by piece: memory holds some rows of one tensor, or one layer's kv_b.
"""

import copy
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import LlamaFileType

from pymla import ggml
from pymla.engine.filecheck import examine
from pymla.errors import PymlaError
from pymla.files import outputs
from pymla.files.checkpoint import Checkpoint
from pymla.files.gguf_reader import ModelFile
from pymla.make.hub_config import HubConfig
from pymla.make.hub_tokenizer import END_KEYS, HubTokenizer, read_tokenizer
from pymla.models.config import ModelConfig
from pymla.reference.quant import dequantise, quantise
from pymla.text.tokenizer import Tokenizer

LAYOUTS = ("kv_b", "split", "all")

#: Types of the matrices, as named on the command line, with the number that ``general.file_type`` gives them.
QTYPES = {
    "f32": (ggml.F32, LlamaFileType.ALL_F32),
    "f16": (ggml.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (ggml.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (ggml.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (ggml.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}

_PIECE_WEIGHTS = 1 << 22
# Files of a Hugging Face folder that hold a model.
_SOURCES = (".safetensors", ".json", ".jinja")


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
        An unknown type or layout; a folder that is not such a checkpoint, is incomplete or damaged, says something
        that GGUF cannot, or makes a file that would not load; a weight that the type cannot hold; an output that cannot
        be written or is read, or not enough free disk.
    """
    _check_arguments(qtype, layout, pre, name)
    folder, path = Path(folder), Path(path)
    config = HubConfig(folder / "config.json")
    plan = _Plan(config, Checkpoint(folder, config.fp8_block()), layout, QTYPES[qtype][0])
    outputs.check({"the output": path}, (each for each in folder.iterdir() if each.suffix in _SOURCES))
    tensors = list(plan.tensors())
    plan.check_leftovers()
    total = sum(tensor.nbytes for tensor in tensors)
    _check_space(path, total)
    tokenizer = read_tokenizer(config, pre)
    metadata = _metadata(config, tokenizer, layout, QTYPES[qtype][1], name or folder.resolve().name)
    with outputs.replacing(path) as part:
        # What is wrong with the metadata shows now, and not hours later.
        with _opened(part, metadata, ()):
            pass
        _check_loads(part, folder)
        with _opened(part, metadata, tensors) as writer:
            _write(writer, tensors, folder, total, progress)
        loaded = _check_loads(part, folder)
    plan.notes += tokenizer.notes
    plan.notes += [
        f"token {i}, {tokenizer.tokens[i]!r:.60}, ends a text, too, and GGUF has no key for it; give it as `stop`"
        for i in tokenizer.ends[len(END_KEYS) :]
        if i not in loaded.eos_ids
    ]
    return Conversion(path, path.stat().st_size, tuple(plan.notes))


def _check_arguments(qtype, layout, pre, name) -> None:
    if layout not in LAYOUTS:
        raise PymlaError(f"unknown layout {layout!r}; choose {', '.join(LAYOUTS)}")
    if not isinstance(qtype, str) or qtype not in QTYPES:
        raise PymlaError(f"unknown type {qtype!r} as `qtype`; choose {', '.join(QTYPES)}")
    for argument, value in (("pre", pre), ("name", name)):
        if not isinstance(value, str | None):
            raise PymlaError(f"`{argument}` is {value!r}; a string is expected")


def _metadata(config: HubConfig, tokenizer: HubTokenizer, layout: str, file_type: int, name: str) -> gguf.GGUFWriter:
    """A writer with all metadata, and without a file."""
    writer = gguf.GGUFWriter(None, "deepseek2")
    writer.add_type("model")
    # A folder's name may hold bytes that are not Unicode.
    writer.add_name(name.encode(errors="replace").decode())
    _add_metadata(writer, config, layout)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokenizer.add_to(writer)
    for key, value in writer.kv_data[0].items():
        _check_text(config.path.parent, key, value.value)
    return writer


def _check_text(folder: Path, key: str, value: Any) -> None:
    """Raise PymlaError for text that JSON can hold and UTF-8 cannot: halves of characters."""
    for text in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
        if isinstance(text, str) and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise PymlaError(f"{folder}: {key} has {text!r:.60}, which is not valid Unicode") from error


def _add_metadata(w: gguf.GGUFWriter, config: HubConfig, layout: str) -> None:
    size = config.size
    w.add_block_count(size("num_hidden_layers"))
    w.add_context_length(config.context_length)
    w.add_embedding_length(size("hidden_size"))
    w.add_feed_forward_length(size("intermediate_size"))
    w.add_head_count(size("num_attention_heads"))
    w.add_layer_norm_rms_eps(config.number("rms_norm_eps", 1e-6))
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
        # transformers takes 0 for its default, which is GGUF's, too.
        if config.rope["beta_fast"]:
            w.add_rope_scaling_yarn_beta_fast(config.rope["beta_fast"])
        if config.rope["beta_slow"]:
            w.add_rope_scaling_yarn_beta_slow(config.rope["beta_slow"])


def _add_experts(w: gguf.GGUFWriter, config: HubConfig) -> None:
    # llama.cpp wants both keys of a dense model, too.
    w.add_expert_shared_count(config.size("n_shared_experts", 0, 0))
    w.add_expert_feed_forward_length(config.size("moe_intermediate_size", config.size("intermediate_size")))
    if not config.experts:
        return
    w.add_expert_count(config.experts)
    w.add_expert_used_count(config.size("num_experts_per_tok"))
    w.add_expert_weights_scale(config.number("routed_scaling_factor", 1.0))
    w.add_expert_weights_norm(config.get("norm_topk_prob", bool, False))
    w.add_expert_gating_func(gguf.ExpertGatingFuncType[config.scoring_func.upper()])
    # V2's "greedy" chooses among all experts, whatever the groups.
    if config.size("n_group", 1) > 1 and config.topk_method != "greedy":
        w.add_expert_group_count(config.size("n_group"))
        w.add_expert_group_used_count(config.size("topk_group"))


class _Plan:
    """Which tensors the file gets, and where their rows come from. Every tensor of the checkpoint is accounted for."""

    def __init__(self, config: HubConfig, checkpoint: Checkpoint, layout: str, qtype: int):
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


@contextmanager
def _opened(path: Path, metadata: gguf.GGUFWriter, tensors: Sequence[_Tensor]) -> Iterator[gguf.GGUFWriter]:
    """A file with metadata and the tensors' entries, open for their values."""
    writer = copy.copy(metadata)
    writer.tensors = [{}]
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.qtype)
    with closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        yield writer


def _write(writer: gguf.GGUFWriter, tensors: list[_Tensor], folder: Path, total: int, progress) -> None:
    """Write the values of all tensors."""
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    done = 0
    for tensor in tensors:
        for piece in tensor.pieces():
            blocks = _blocks(tensor, piece, folder)
            file.write(blocks.data)
            done += blocks.nbytes
            if progress is not None:
                progress(done, total)
        writer.write_padding(file, tensor.nbytes)


def _blocks(tensor: _Tensor, piece: np.ndarray, folder: Path) -> np.ndarray:
    """Rows of a tensor in its type. llama.cpp writes infinite scales where a value is too large; here that is an
    error, because nothing sensible can be computed with them."""
    largest = max(piece.max(), -piece.min())
    if not _holds(tensor.qtype, largest):
        wider = [name for name, (qtype, _) in reversed(QTYPES.items()) if _holds(qtype, largest)]
        raise PymlaError(
            f"{folder}: {tensor.name} holds {largest:g}, too large for {ggml.NAME[tensor.qtype]}; "
            f"take {' or '.join(wider)} as `qtype`"
        )
    # Scales so small that float16 has 0 for them give weights of 0.
    with np.errstate(all="ignore"):
        return quantise(piece, tensor.qtype)


def _holds(qtype: int, value: float) -> bool:
    """Whether a value stays finite in a type."""
    with np.errstate(all="ignore"):
        block = quantise(np.full((1, ggml.BLOCK_SIZE[qtype]), value, np.float32), qtype)
        return bool(np.isfinite(dequantise(block, qtype)).all())


def _check_loads(part: Path, folder: Path) -> Tokenizer:
    """What `pymla.load` checks before it computes anything, of a whole file or of one with nothing but metadata.

    Returns
    -------
    Tokenizer
        The tokenizer that it would have.

    Raises
    ------
    PymlaError
        It would refuse the file.
    """
    try:
        file = ModelFile.open(part)
        if file.tensors:
            return examine(file, cache_type="f32").check()[1]  # of all types, f32 holds the rows of every model
        ModelConfig.from_gguf(file)
        return Tokenizer.from_gguf(file)
    except PymlaError as error:
        reason = str(error).removeprefix(f"{part}: ")
        raise PymlaError(f"{folder}: cannot be converted, the file would not load: {reason}") from error


def _check_space(path: Path, needed: int) -> None:
    try:
        free = shutil.disk_usage(os.path.dirname(os.path.realpath(path))).free
    except OSError as error:
        raise PymlaError(f"{path}: cannot be written ({error.strerror})") from error
    if needed > free:
        raise PymlaError(f"{path}: needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB free")
