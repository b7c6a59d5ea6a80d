"""Which tensors the GGUF file of a Hugging Face checkpoint gets, and where their values come from."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files.checkpoint import Checkpoint
from pymla.make.hub_config import HubConfig

#: Weights that are read at a time, in whole rows.
PIECE_WEIGHTS = 1 << 22


class FloatTensor(NamedTuple):
    """A tensor of the file, before it is quantised."""

    name: str
    shape: tuple[int, ...]  # NumPy order, columns last
    qtype: int  # the ggml type that it gets
    rows: Callable[[], Iterator[np.ndarray]]  # its rows in order, float32 (rows, columns), a few at a time


class Plan:
    """Which tensors the file gets, and where their rows come from. Every tensor of the checkpoint is accounted for."""

    def __init__(self, config: HubConfig, checkpoint: Checkpoint, layout: str, qtype: int):
        self.config, self.checkpoint, self.layout, self.qtype = config, checkpoint, layout, qtype
        self.notes: list[str] = []
        self._used: set[str] = set()

    def tensors(self) -> Iterator[FloatTensor]:
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

    def _attention(self, blk: str, hf: str) -> Iterator[FloatTensor]:
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
        if self.config.sparse and attn + "indexer.wk.weight" in self.checkpoint.names:
            yield from self._indexer(blk + "indexer.", attn + "indexer.")
        yield self._vector(blk + "ffn_norm.weight", hf + "post_attention_layernorm.weight", hidden)

    def _kv_b(self, blk: str, source: str, heads: int, nope: int, v: int, rank: int) -> Iterator[FloatTensor]:
        whole = self._matrix(blk + "attn_kv_b.weight", source, heads * (nope + v), rank)
        if self.layout != "split":
            yield whole
        if self.layout == "kv_b":
            return

        def k_b() -> Iterator[np.ndarray]:
            by_head = self.checkpoint.read(source).reshape(heads, nope + v, rank)
            yield np.ascontiguousarray(by_head[:, :nope].transpose(0, 2, 1)).reshape(heads * rank, nope)

        def v_b() -> Iterator[np.ndarray]:
            by_head = self.checkpoint.read(source).reshape(heads, nope + v, rank)
            yield by_head[:, nope:].reshape(heads * v, rank)

        # ik_llama.cpp wants them as matrices.
        flat = self.layout == "all"
        k_shape = (heads * rank, nope) if flat else (heads, rank, nope)
        v_shape = (heads * v, rank) if flat else (heads, v, rank)
        k_name, v_name = blk + "attn_k_b.weight", blk + "attn_v_b.weight"
        yield FloatTensor(k_name, k_shape, self._fitting(k_name, nope, self.qtype), k_b)
        yield FloatTensor(v_name, v_shape, self._fitting(v_name, rank, self.qtype), v_b)

    def _indexer(self, blk: str, hf: str) -> Iterator[FloatTensor]:
        """The indexer of sparse attention."""
        size = self.config.size
        hidden, heads, width = size("hidden_size"), size("index_n_heads"), size("index_head_dim")
        yield self._matrix(blk + "attn_q_b.weight", hf + "wq_b.weight", heads * width, size("q_lora_rank"))
        yield self._matrix(blk + "attn_k.weight", hf + "wk.weight", width, hidden)
        yield self._vector(blk + "k_norm.weight", hf + "k_norm.weight", width)
        yield self._vector(blk + "k_norm.bias", hf + "k_norm.bias", width)
        yield self._matrix(blk + "proj.weight", hf + "weights_proj.weight", heads, hidden, ggml.F32)

    def _ffn(self, blk: str, mlp: str, suffix: str, width: int) -> Iterator[FloatTensor]:
        """A dense network, or with suffix "_shexp" the shared experts."""
        hidden = self.config.size("hidden_size")
        yield self._matrix(f"{blk}ffn_gate{suffix}.weight", mlp + "gate_proj.weight", width, hidden)
        yield self._matrix(f"{blk}ffn_up{suffix}.weight", mlp + "up_proj.weight", width, hidden)
        yield self._matrix(f"{blk}ffn_down{suffix}.weight", mlp + "down_proj.weight", hidden, width)

    def _experts(self, blk: str, mlp: str) -> Iterator[FloatTensor]:
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

    def _single_experts(self, blk: str, hf: str, hidden: int, width: int) -> Iterator[FloatTensor]:
        """Experts stored one by one, as DeepSeek publishes them."""
        for part, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            sources = [f"{hf}{expert}.{part}_proj.weight" for expert in range(self.config.experts)]
            for source in sources:
                self._take(source, (rows, columns))
            spans = [(source, 0, rows) for source in sources]
            yield self._stacked(f"{blk}ffn_{part}_exps.weight", spans, rows, columns)

    def _fused_experts(self, blk: str, hf: str, hidden: int, width: int) -> Iterator[FloatTensor]:
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

    def _stacked(self, name: str, spans: list[tuple[str, int, int]], rows: int, columns: int) -> FloatTensor:
        shape = (self.config.experts, rows, columns)
        return FloatTensor(name, shape, self._fitting(name, columns, self.qtype), partial(self._rows, spans, columns))

    def _matrix(self, name: str, source: str, rows: int, columns: int, qtype: int | None = None) -> FloatTensor:
        self._take(source, (rows, columns))
        qtype = self._fitting(name, columns, self.qtype if qtype is None else qtype)
        return FloatTensor(name, (rows, columns), qtype, partial(self._rows, [(source, 0, rows)], columns))

    def _vector(self, name: str, source: str, size: int) -> FloatTensor:
        self._take(source, (size,))
        return FloatTensor(name, (size,), ggml.F32, partial(self._rows, [(source, 0, 1)], size))

    def _take(self, source: str, shape: tuple[int, ...]) -> None:
        self.checkpoint.expect(source, shape)
        self._used.add(source)

    def _rows(self, spans: list[tuple[str, int, int]], columns: int) -> Iterator[np.ndarray]:
        """Rows of several tensors one after the other, a few at a time."""
        step = max(1, PIECE_WEIGHTS // columns)
        for source, start, stop in spans:
            for first in range(start, stop, step):
                yield self.checkpoint.rows(source, first, min(first + step, stop))

    def _fitting(self, name: str, columns: int, qtype: int) -> int:
        if columns % ggml.BLOCK_SIZE[qtype] == 0:
            return qtype
        self.notes.append(f"{name} is F16: {columns} columns are no multiple of {ggml.NAME[qtype]}'s block")
        return ggml.F16
