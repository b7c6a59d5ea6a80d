"""The cost of a step: multiply-adds and bytes read.

Everything here is arithmetic on the model's sizes and, for bytes, on the types of its tensors. It tells a benchmark
the limit of a step, and a reader where its time goes.

Counted are the products with weights and with the cache. Norms, rope, softmax and activation functions are left out:
together they are below 1 % of the multiply-adds and read next to nothing.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pymla import ggml
from pymla.engine.cache_layout import attended_bytes, index_bytes
from pymla.engine.forms import Part, pair_macs, parts_of, seen_pairs, up_macs
from pymla.engine.memory_plan import tensor_bytes, transposed_bytes
from pymla.errors import PymlaError
from pymla.files.gguf_reader import TensorInfo
from pymla.models.config import ModelConfig
from pymla.models.nextn import with_nextn
from pymla.models.tensors import TensorSpec, has_indexer, layer_tensors, nextn_tensors


class Op(NamedTuple):
    """The cost of an operation in one step, all layers together."""

    name: str
    macs: int  # multiply-adds
    nbytes: int  # read from weights and cache


#: The operation that a tensor of a layer belongs to, by `TensorSpec.stem`. The tensors of ``W_k_b`` and ``W_v_b``
#: belong to "attention up"; norms and biases to none.
_OPS = {
    "nextn.eh_proj": "projection",
    "attn_q": "query",
    "attn_q_a": "query",
    "attn_q_b": "query",
    "attn_kv_a_mqa": "latent",
    "indexer.attn_k": "index keys",
    "indexer.attn_q_b": "index",
    "indexer.proj": "index",
    "attn_output": "attention output",
    "ffn_gate": "dense",
    "ffn_up": "dense",
    "ffn_down": "dense",
    "ffn_gate_inp": "router",
    "ffn_gate_up_exps": "experts",
    "ffn_gate_exps": "experts",
    "ffn_up_exps": "experts",
    "ffn_down_exps": "experts",
    "ffn_gate_shexp": "shared experts",
    "ffn_up_shexp": "shared experts",
    "ffn_down_shexp": "shared experts",
}


def step_ops(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo] | None,
    tokens: int,
    cached: int,
    *,
    cache_type: str = "q8_0",
    mla: str = "auto",
    logits: int = 1,
) -> list[Op]:
    """Operations of a step of one sequence, in the order of the model.

    Each weight and each cache row counts as read once per step; of the experts of a step, as many as `tokens` choices
    at random touch.

    Parameters
    ----------
    tensors : the file's tensors; None leaves the bytes of weights at 0
    tokens : new tokens, T
    cached : tokens in the cache after the step, S, at least T
    cache_type, mla : as for Model
    logits : tokens whose logits are computed

    Raises
    ------
    PymlaError
        A tensor is missing.
    """
    costs = _Costs(config, tensors, tokens, cached, cache_type, mla)
    costs.embedding()
    for layer in range(config.num_hidden_layers):
        costs.layer(layer, layer_tensors(config, layer, costs.names))
    costs.output(logits)
    return costs.ops()


def nextn_ops(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo] | None,
    tokens: int,
    cached: int,
    *,
    cache_type: str = "q8_0",
    mla: str = "auto",
) -> list[Op]:
    """Operations by which a model's first nextn block predicts a token after each of `tokens`; arguments as for
    `step_ops`. Where the file has no embedding or output matrix of the block, it reads the model's.

    Raises
    ------
    PymlaError
        A tensor is missing.
    """
    index, names = config.num_hidden_layers, {} if tensors is None else tensors
    config = with_nextn(config, names) if has_indexer(config, index, names) else config.dense()
    costs = _Costs(config, tensors, tokens, cached, cache_type, mla)
    specs = nextn_tensors(config, index, names)
    own = {spec.field: spec.name for spec in specs}
    costs.embedding(own.get("embed_tokens", "token_embd.weight"))
    costs.layer(index, specs)
    costs.output(tokens, own.get("shared_head_head"))
    return costs.ops()


class _Costs:
    """Adds up the costs of a step; see `step_ops` for the arguments."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, TensorInfo] | None,
        tokens: int,
        cached: int,
        cache_type: str,
        mla: str,
    ):
        self._config, self._tensors, self._tokens = config, tensors, tokens
        self._cached, self._cache_type = cached, cache_type
        self._parts, self._row = parts_of(config, mla, tokens, cached), attended_bytes(config, cache_type, mla)
        self.names: Mapping[str, TensorInfo] = {} if tensors is None else tensors
        self.totals: dict[str, list[float]] = {}

    def ops(self) -> list[Op]:
        """The costs by operation."""
        return [Op(name, round(macs), round(nbytes)) for name, (macs, nbytes) in self.totals.items()]

    def layer(self, layer: int, specs: Iterable[TensorSpec]) -> None:
        """A layer with the tensors `specs`."""
        choosing = sum(part.tokens for part in self._parts if part.form == "sparse")
        for spec in specs:
            if spec.stem in ("attn_kv_b", "attn_v_b"):
                self.attention_up(layer, self._parts)
                self.attention(self._parts, self._row)
            elif spec.stem == "indexer.proj":
                self.choice(choosing, self._cached, index_bytes(self._config, self._cache_type, layer))
            if _OPS.get(spec.stem) == "index":
                self.matrix(spec, choosing)
            elif spec.stem in _OPS:
                self.matrix(spec, self._tokens)

    def embedding(self, name: str = "token_embd.weight") -> None:
        """The tokens' rows of an embedding matrix."""
        row = self._bytes(name) / self._config.vocab_size
        self._add("embedding", 0, self._tokens * row)

    def attention_up(self, layer: int, parts: list[Part]) -> None:
        """The products with ``W_k_b`` and ``W_v_b``."""
        products = sum(part.cached if part.form == "expanded" else part.tokens for part in parts)
        up_bytes = 0 if self._tensors is None else _up_bytes(self._config, self._tensors, layer)
        self._add("attention up", products * self._config.num_attention_heads * up_macs(self._config), up_bytes)

    def attention(self, parts: list[Part], row: int) -> None:
        """Scores and values over the cache, or over chosen positions; `row` are the bytes of a token in the cache."""
        config, read = self._config, 0
        for form, tokens, cached in parts:
            if form == "sparse" and config.indexer:
                pairs = tokens * config.indexer.top_k
                read = max(read, min(cached, pairs))
            else:
                pairs, read = seen_pairs(tokens, cached), max(read, cached)
            self._add("attention", pairs * config.num_attention_heads * pair_macs(config, form), 0)
        self._add("attention", 0, read * row)

    def choice(self, tokens: int, cached: int, row: int) -> None:
        """Scores of the indexer for the tokens that choose; `row` are the bytes of its key in the cache."""
        indexer = self._config.indexer
        if tokens and indexer:
            self._add("index", seen_pairs(tokens, cached) * indexer.heads * indexer.head_dim, cached * row)

    def matrix(self, spec: TensorSpec, tokens: int) -> None:
        """The product of so many tokens with a matrix, or with the chosen ones of a layer's experts."""
        config = self._config
        used, of = (config.num_experts_per_tok, config.n_routed_experts) if spec.part == "experts" else (1, 1)
        read = self._bytes(spec.name) * (1 - (1 - used / of) ** tokens)
        self._add(_OPS[spec.stem], tokens * spec.weights * used // of, read)

    def output(self, logits: int, name: str | None = None) -> None:
        """The product with the model's output matrix, or with another one, for the tokens whose logits are computed."""
        if name is None:
            name = "output.weight" if "output.weight" in self.names else "token_embd.weight"
        macs = logits * self._config.vocab_size * self._config.hidden_size
        self._add("output", macs, self._bytes(name) if logits else 0)

    def _bytes(self, name: str) -> int:
        return 0 if self._tensors is None else _tensor_bytes(self._tensors, name)

    def _add(self, op: str, macs: float, nbytes: float) -> None:
        total = self.totals.setdefault(op, [0, 0])
        total[0] += macs
        total[1] += nbytes


def least_seconds(ops: Iterable[Op], read: float, int8: float) -> float:
    """Seconds that operations take at least, one after the other, each as long as its bytes or its multiply-adds.

    Attention multiplies 16-bit numbers, at half the rate of int8.

    Parameters
    ----------
    read : bytes per second
    int8 : multiply-adds per second
    """
    return sum(max(op.nbytes / read, op.macs / int8 * (2 if op.name == "attention" else 1)) for op in ops)


def token_macs(config: ModelConfig, cached: int, *, mla: str = "auto") -> int:
    """Multiply-adds of a generated token, with `cached` tokens in the cache, itself included."""
    return sum(op.macs for op in step_ops(config, None, 1, cached, mla=mla))


def token_bytes(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    cached: int,
    *,
    cache_type: str = "q8_0",
    mla: str = "auto",
) -> int:
    """Bytes that a generated token reads, with `cached` tokens in the cache, itself included."""
    return sum(op.nbytes for op in step_ops(config, tensors, 1, cached, cache_type=cache_type, mla=mla))


def _up_bytes(config: ModelConfig, tensors: Mapping[str, TensorInfo], layer: int) -> float:
    """k_b and v_b, from the file or derived."""
    blk = f"blk.{layer}.attn_"
    if f"{blk}kv_b.weight" in tensors:
        return _tensor_bytes(tensors, blk + "kv_b.weight")
    qtype = tensors[f"{blk}k_b.weight"].qtype if f"{blk}k_b.weight" in tensors else ggml.F32
    return transposed_bytes(config, qtype) + _tensor_bytes(tensors, blk + "v_b.weight")


def _tensor_bytes(tensors: Mapping[str, TensorInfo], name: str) -> int:
    if name not in tensors:
        raise PymlaError(f"tensor {name} is missing; convert the model again or take another file")
    return tensor_bytes(tensors[name])
