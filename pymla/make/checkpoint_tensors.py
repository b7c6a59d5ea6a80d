"""Which tensors the GGUF file of a Hugging Face checkpoint gets, and where their values come from.

Names and shapes are those of llama.cpp's converter (``conversion/deepseek.py`` and its neighbours) for the layout
"split", those of ik_llama.cpp's for "all", and those that llama.cpp wrote before April 2025 for "kv_b". MiniCPM3 and
PLM have ``W_kv_b`` whole in every layout, because llama.cpp reads nothing else for them.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from pymla.errors import PymlaError
from pymla.files.gguf_writer import Value
from pymla.make.checkpoint_names import CheckpointNames, layer_of
from pymla.make.generation_config import sampling_metadata
from pymla.make.hub_config import HubConfig
from pymla.make.hub_weights import HubWeights
from pymla.make.model_metadata import DENSE, model_metadata
from pymla.make.writing import Source

#: Weights that are read at a time, in whole rows.
PIECE_WEIGHTS = 1 << 22

#: The end of the names of tensors that older checkpoints have and nobody reads.
_FREQUENCIES = "rotary_emb.inv_freq"

#: Tensors that a layer which predicts further tokens has beside those of an ordinary layer, in the checkpoint and in
#: GGUF, and those of them that it may lack.
_NEXTN = {
    "eh_proj": "eh_proj",
    "enorm": "enorm",
    "hnorm": "hnorm",
    "embed_tokens": "embed_tokens",
    "shared_head.head": "shared_head_head",
    "shared_head.norm": "shared_head_norm",
}
_NEXTN_OPTIONAL = ("embed_tokens", "shared_head_head", "shared_head_norm")


class Plan:
    """Which tensors the file gets, and where their rows come from. Every tensor of the checkpoint is accounted for.

    Parameters
    ----------
    layout : how W_kv_b is stored: "split" (k_b and v_b), "kv_b" (whole) or "all" (all three)
    mtp : whether layers that predict further tokens (nextn) are kept; None: as llama.cpp's converter decides, which
        keeps those of V3.2 and GLM and leaves those of V3 out

    Attributes
    ----------
    architecture : str
        ``general.architecture`` of the file.
    notes : list[str]
        For the user: what of the checkpoint is left out.

    Raises
    ------
    PymlaError
        Two tensors have one name, or there are no layers to keep.
    """

    def __init__(self, config: HubConfig, checkpoint: HubWeights, layout: str = "split", mtp: bool | None = None):
        self.config, self.checkpoint = config, checkpoint
        self.architecture = config.architecture
        self.layout = "kv_b" if self.architecture in DENSE else layout
        self.notes: list[str] = []
        self._names = CheckpointNames.of(checkpoint.names, checkpoint.folder)
        self._used: set[str] = set()
        self._rows_of: dict[str, list[tuple[str, int, int]]] = {}  # see `_spans`
        if self._names.others:
            count, modules = self._names.other_tensors, ", ".join(self._names.others)
            self.notes.append(f"{count} tensors of {modules} are left out: the file holds the language model only")
        self._layers = config.size("num_hidden_layers")
        self._nextn_layers = self._count_nextn(mtp)

    def metadata(self, name: str, file_type: int | None) -> dict[str, Value]:
        """Metadata of the model, which is called `name`, without the tokenizer's (`model_metadata`)."""
        shape = self.config.shape(name, self._nextn_layers)
        return model_metadata(shape, self.layout, file_type) | sampling_metadata(self.config.path.parent)

    def sources(self) -> Iterator[Source]:
        """All tensors of the file.

        Raises
        ------
        PymlaError
            A tensor is missing in the checkpoint, or is of another shape than config.json says.
        """
        hidden, vocab = self.config.size("hidden_size"), self.config.size("vocab_size")
        yield self._matrix("token_embd.weight", "embed_tokens.weight", vocab, hidden)
        yield self._vector("output_norm.weight", "norm.weight", hidden)
        if self.config.tied:
            self._used.add("lm_head.weight")
        else:
            yield self._matrix("output.weight", "lm_head.weight", vocab, hidden)
        if long := self.config.rope.long:
            yield _constant("rope_factors_long.weight", long.long)
            yield _constant("rope_factors_short.weight", long.short)
        for layer in range(self._layers):
            yield from self._layer(layer)
        for layer in range(self._layers, self._layers + self._nextn_layers):
            yield from self._nextn(f"blk.{layer}.nextn.", f"layers.{layer}.")
            yield from self._layer(layer)

    def stored_type(self, name: str) -> int | None:
        """The type of GGUF in which the checkpoint has all weights of a tensor, bit for bit; None: there is none."""
        types = {self.checkpoint.qtype(self._names.stored[source]) for source, *_ in self._rows_of.get(name, ())}
        return types.pop() if len(types) == 1 else None

    def stored_pieces(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of a tensor in its `stored_type`, some rows at a time: uint8 (rows, row bytes)."""
        for source, first, stop in self._pieces(name):
            yield self.checkpoint.blocks(source, first, stop)

    def check_leftovers(self) -> None:
        """Raise PymlaError for a tensor that `sources` did not take, unless the file need not have it."""
        behind = set()
        for name in sorted(self._names.stored.keys() - self._used):
            layer = layer_of(name)
            if layer is not None and layer >= self._layers + self._nextn_layers:
                behind.add(layer)
            elif not name.endswith(_FREQUENCIES):
                stored = self._names.stored[name]
                raise PymlaError(f"{self.checkpoint.folder}: tensor {stored} is not one of this architecture's")
        if behind:
            self.notes.append(f"layers {', '.join(map(str, sorted(behind)))} predict further tokens and are left out")

    def _count_nextn(self, mtp: bool | None) -> int:
        """Layers behind the others that are kept."""
        if not (self.config.family.keeps_nextn if mtp is None else mtp):
            return 0
        behind = sorted(layer for layer in self._names.layers() if layer >= self._layers)
        if behind != list(range(self._layers, self._layers + len(behind))):
            found = (
                f"{len(behind)} layers that predict further tokens are there, and not all of those up to {behind[-1]}"
            )
            raise PymlaError(f"{self.checkpoint.folder}: {found}; download all files")
        if mtp and not behind:
            raise PymlaError(f"{self.checkpoint.folder}: no layers that predict further tokens, which `mtp` asks for")
        return len(behind)

    def _has(self, name: str) -> bool:
        return name in self._names.stored

    def _layer(self, layer: int) -> Iterator[Source]:
        blk, hf = f"blk.{layer}.", f"layers.{layer}."
        yield from self._attention(blk, hf, layer)
        if layer < self.config.dense_layers or not self.config.experts:
            yield from self._ffn(blk, hf + "mlp.", "", self.config.size("intermediate_size"))
        else:
            yield from self._experts(blk, hf + "mlp.")

    def _nextn(self, blk: str, hf: str) -> Iterator[Source]:
        """What a layer that predicts further tokens has beside an ordinary one."""
        hidden, vocab = self.config.size("hidden_size"), self.config.size("vocab_size")
        matrices = {
            "eh_proj": (hidden, 2 * hidden),
            "embed_tokens": (vocab, hidden),
            "shared_head_head": (vocab, hidden),
        }
        for module, name in _NEXTN.items():
            source = f"{hf}{module}.weight"
            if name in _NEXTN_OPTIONAL and not self._has(source):
                continue
            if name in matrices:
                yield self._matrix(f"{blk}{name}.weight", source, *matrices[name])
            else:
                yield self._vector(f"{blk}{name}.weight", source, hidden)

    def _attention(self, blk: str, hf: str, layer: int) -> Iterator[Source]:
        size, v_head_dim = self.config.size, self.config.v_head_dim
        hidden, heads, rank = size("hidden_size"), size("num_attention_heads"), size("kv_lora_rank")
        rope_dim = size("qk_rope_head_dim")
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
        if self._has_indexer(layer, attn):
            yield from self._indexer(blk + "indexer.", attn + "indexer.")
        yield self._vector(blk + "ffn_norm.weight", hf + "post_attention_layernorm.weight", hidden)

    def _kv_b(self, blk: str, hf: str, heads: int, nope: int, v: int, rank: int) -> Iterator[Source]:
        whole = self._matrix(blk + "attn_kv_b.weight", hf, heads * (nope + v), rank)
        if self.layout != "split":
            yield whole
        if self.layout == "kv_b":
            return
        stored = self._names.stored[hf]
        starts = range(0, heads * (nope + v), nope + v)

        def k_b() -> Iterator[np.ndarray]:
            for start in starts:
                yield np.ascontiguousarray(self.checkpoint.rows(stored, start, start + nope).T)

        # ik_llama.cpp wants them as matrices.
        flat = self.layout == "all"
        k_shape = (heads * rank, nope) if flat else (heads, rank, nope)
        v_shape = (heads * v, rank) if flat else (heads, v, rank)
        values = [(hf, start + nope, start + nope + v) for start in starts]
        yield Source(blk + "attn_k_b.weight", k_shape, k_b)
        yield self._spans(blk + "attn_v_b.weight", v_shape, values)

    def _has_indexer(self, layer: int, attn: str) -> bool:
        """Whether a layer has an indexer of its own. One that predicts further tokens may do without."""
        if not self.config.sparse:
            return False
        if layer >= self._layers:
            return self._has(attn + "indexer.wk.weight")
        types = self.config.indexer_types
        return types is None or types[layer] == "full"

    def _indexer(self, blk: str, hf: str) -> Iterator[Source]:
        """The indexer of sparse attention."""
        size = self.config.size
        hidden, heads, width = size("hidden_size"), size("index_n_heads"), size("index_head_dim")
        yield self._matrix(blk + "attn_q_b.weight", hf + "wq_b.weight", heads * width, size("q_lora_rank"))
        yield self._matrix(blk + "attn_k.weight", hf + "wk.weight", width, hidden)
        yield self._vector(blk + "k_norm.weight", hf + "k_norm.weight", width)
        yield self._vector(blk + "k_norm.bias", hf + "k_norm.bias", width)
        yield self._matrix(blk + "proj.weight", hf + "weights_proj.weight", heads, hidden)

    def _ffn(self, blk: str, mlp: str, suffix: str, width: int) -> Iterator[Source]:
        """A dense network, or with suffix "_shexp" the shared experts. PLM's has no gate."""
        hidden = self.config.size("hidden_size")
        if self.config.family.hidden_act == "silu":
            yield self._matrix(f"{blk}ffn_gate{suffix}.weight", mlp + "gate_proj.weight", width, hidden)
        yield self._matrix(f"{blk}ffn_up{suffix}.weight", mlp + "up_proj.weight", width, hidden)
        yield self._matrix(f"{blk}ffn_down{suffix}.weight", mlp + "down_proj.weight", hidden, width)

    def _experts(self, blk: str, mlp: str) -> Iterator[Source]:
        size, experts = self.config.size, self.config.experts
        hidden, width, shared = size("hidden_size"), size("moe_intermediate_size"), size("n_shared_experts", 0, 0)
        yield self._matrix(blk + "ffn_gate_inp.weight", mlp + "gate.weight", experts, hidden)
        bias = mlp + "gate.e_score_correction_bias"
        if self._has(bias):
            yield self._vector(blk + "exp_probs_b.bias", bias, experts)
        stacked = self._has(f"{mlp}experts.gate_up_proj")
        yield from (self._stacked_experts if stacked else self._single_experts)(blk, mlp + "experts.", hidden, width)
        if shared:
            yield from self._ffn(blk, mlp + "shared_experts.", "_shexp", shared * width)

    def _single_experts(self, blk: str, hf: str, hidden: int, width: int) -> Iterator[Source]:
        """Experts stored one by one, as DeepSeek publishes them."""
        for part, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            sources = [f"{hf}{expert}.{part}_proj.weight" for expert in range(self.config.experts)]
            for source in sources:
                self._take(source, (rows, columns))
            spans = [(source, 0, rows) for source in sources]
            yield self._spans(f"{blk}ffn_{part}_exps.weight", (len(spans), rows, columns), spans)

    def _stacked_experts(self, blk: str, hf: str, hidden: int, width: int) -> Iterator[Source]:
        """Experts stored in one tensor, gate above up, as transformers 5 holds them. Files of Mistral 4 have that
        tensor, too; others have gate and up apart."""
        experts = self.config.experts
        gate_up, down = hf + "gate_up_proj", hf + "down_proj"
        self._take(gate_up, (experts, 2 * width, hidden))
        self._take(down, (experts, hidden, width))
        starts = range(0, experts * 2 * width, 2 * width)
        if self.architecture == "mistral4":
            both = [(gate_up, start, start + 2 * width) for start in starts]
            yield self._spans(blk + "ffn_gate_up_exps.weight", (experts, 2 * width, hidden), both)
        else:
            gates = [(gate_up, start, start + width) for start in starts]
            ups = [(gate_up, start + width, start + 2 * width) for start in starts]
            yield self._spans(blk + "ffn_gate_exps.weight", (experts, width, hidden), gates)
            yield self._spans(blk + "ffn_up_exps.weight", (experts, width, hidden), ups)
        downs = [(down, start, start + hidden) for start in range(0, experts * hidden, hidden)]
        yield self._spans(blk + "ffn_down_exps.weight", (experts, hidden, width), downs)

    def _matrix(self, name: str, source: str, rows: int, columns: int) -> Source:
        self._take(source, (rows, columns))
        return self._spans(name, (rows, columns), [(source, 0, rows)])

    def _vector(self, name: str, source: str, size: int) -> Source:
        self._take(source, (size,))
        return self._spans(name, (size,), [(source, 0, 1)])

    def _spans(self, name: str, shape: tuple[int, ...], spans: list[tuple[str, int, int]]) -> Source:
        """A tensor of the rows of others, one after the other: (name, from row, to row)."""
        self._rows_of[name] = spans
        return Source(name, shape, partial(self._rows, name))

    def _take(self, source: str, shape: tuple[int, ...]) -> None:
        """Check that a tensor is there and of a shape. A missing one is named as transformers stores it."""
        self.checkpoint.expect(self._names.stored.get(source, _usual_name(source)), shape)
        self._used.add(source)

    def _rows(self, name: str) -> Iterator[np.ndarray]:
        for source, first, stop in self._pieces(name):
            yield self.checkpoint.rows(source, first, stop)

    def _pieces(self, name: str) -> Iterator[tuple[str, int, int]]:
        """The rows of a tensor, a few at a time: name in the checkpoint, from row, to row."""
        for source, start, stop in self._rows_of[name]:
            stored = self._names.stored[source]
            step = max(1, PIECE_WEIGHTS // self.checkpoint.encoding(stored).shape[-1])
            for first in range(start, stop, step):
                yield stored, first, min(first + step, stop)


def _usual_name(source: str) -> str:
    return source if source == "lm_head.weight" else f"model.{source}"


def _constant(name: str, values: tuple[float, ...]) -> Source:
    """A vector that is in no tensor of the checkpoint."""
    rows = np.array([values], np.float32)
    return Source(name, rows.shape[1:], lambda: iter([rows]))
