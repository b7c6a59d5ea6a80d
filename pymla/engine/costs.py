"""What a step costs: multiply-adds, bytes read, and memory.

Everything here is arithmetic on the model's sizes and, for bytes, on the types of its tensors. It tells the engine
which form of attention is cheaper, the command line whether the memory suffices, and a benchmark what the limit is.

Counted are the products with weights and with the cache. Norms, rope, softmax and activation functions are left out:
together they are below 1 % of the multiply-adds and read next to nothing.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pymla import ggml
from pymla.engine.cache import row_bytes
from pymla.errors import PymlaError
from pymla.files.gguf_reader import TensorInfo
from pymla.models.config import ModelConfig
from pymla.models.tensors import layer_tensors
from pymla.pages import PAGE
from pymla.scratch import DEVICE_EXPANDED_BYTES, DEVICE_SLICE, EXPANDED_BYTES, device_pair, expanded_bytes

#: Python, NumPy, Numba with LLVM, and the compiled kernels.
PROCESS_BYTES = 300 << 20


class Op(NamedTuple):
    """What an operation costs in one step, all layers together."""

    name: str
    macs: int  # multiply-adds
    nbytes: int  # read from weights and cache


#: The operation that a tensor of a layer belongs to, by `TensorSpec.stem`. Those of ``W_k_b`` and ``W_v_b`` belong to
#: "attention up"; norms and biases to none.
_OPS = {
    "attn_q": "query",
    "attn_q_a": "query",
    "attn_q_b": "query",
    "attn_kv_a_mqa": "latent",
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


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the host's memory that a model needs, or of a GPU's (`pymla.engine.planning.Planner`)."""

    weights: int  # of the mapped file, which the host reads again from disk where memory is short
    derived: int  # k_b, where the file has it transposed only
    cache: int
    scratch: int
    process: int  # without any model

    @property
    def allocated(self) -> int:
        """What must fit, however little of the file stays in memory."""
        return self.derived + self.cache + self.scratch + self.process

    @property
    def total(self) -> int:
        """What makes it run from memory alone."""
        return self.weights + self.allocated


def cheaper_form(config: ModelConfig, tokens: int, cached: int) -> str:
    """The form of attention that takes fewer multiply-adds, "absorbed" or "expanded".

    The absorbed form pays ``2 rank + rope`` for each pair of query and key, and the products with ``W_k_b`` and
    ``W_v_b`` once per new token. The expanded form pays ``nope + rope + v`` per pair, and those products once per
    cached token. A single token is absorbed.

    Parameters
    ----------
    tokens : new tokens of a sequence, T
    cached : tokens in its cache after the step, S
    """
    if tokens == 1:
        return "absorbed"
    up = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    pairs = _pairs(tokens, cached)
    absorbed = tokens * up + pairs * _absorbed_pair(config)
    expanded = cached * up + pairs * _expanded_pair(config)
    return "absorbed" if absorbed <= expanded else "expanded"


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
    names = () if tensors is None else tensors
    totals: dict[str, list[float]] = {}

    def add(op: str, macs: float, nbytes: float) -> None:
        total = totals.setdefault(op, [0, 0])
        total[0] += macs
        total[1] += nbytes

    embedding = 0 if tensors is None else _tensor_bytes(tensors, "token_embd.weight") / config.vocab_size
    add("embedding", 0, tokens * embedding)
    up = config.num_attention_heads * config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    form = _form(config, tokens, cached, mla)
    pair = config.num_attention_heads * (_absorbed_pair(config) if form == "absorbed" else _expanded_pair(config))
    cache_bytes = row_bytes(config, cache_type, mla) / config.num_hidden_layers * cached
    for layer in range(config.num_hidden_layers):
        for spec in layer_tensors(config, layer, names):
            if spec.stem in ("attn_kv_b", "attn_v_b"):
                up_bytes = 0 if tensors is None else _up_bytes(config, tensors, layer)
                add("attention up", (cached if form == "expanded" else tokens) * up, up_bytes)
                add("attention", _pairs(tokens, cached) * pair, cache_bytes)
            elif spec.stem in _OPS:
                used, of = (config.num_experts_per_tok, config.n_routed_experts) if spec.part == "experts" else (1, 1)
                read = 0 if tensors is None else _tensor_bytes(tensors, spec.name) * (1 - (1 - used / of) ** tokens)
                add(_OPS[spec.stem], tokens * spec.weights * used // of, read)
    name = "output.weight" if "output.weight" in names else "token_embd.weight"
    output_bytes = _tensor_bytes(tensors, name) if tensors is not None and logits else 0
    add("output", logits * config.vocab_size * config.hidden_size, output_bytes)
    return [Op(name, round(macs), round(nbytes)) for name, (macs, nbytes) in totals.items()]


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


def cache_bytes(config: ModelConfig, cache_type: str, mla: str, ctx: int) -> int:
    """Bytes of a cache for `ctx` tokens, which are whole pages of 64."""
    return -(-ctx // PAGE) * PAGE * row_bytes(config, cache_type, mla)


def derived_bytes(config: ModelConfig, tensors: Mapping[str, TensorInfo], layers: Iterable[int] | None = None) -> int:
    """Bytes of the matrices that are transposed at load, where the file has k_b and v_b but not kv_b; of some layers,
    or of all."""
    weights = config.num_attention_heads * config.kv_lora_rank * config.qk_nope_head_dim
    total = 0
    for layer in range(config.num_hidden_layers) if layers is None else layers:
        k_b = tensors.get(f"blk.{layer}.attn_k_b.weight")
        if k_b is not None and f"blk.{layer}.attn_kv_b.weight" not in tensors:
            total += weights * _derived_size(k_b.qtype)
    return total


def scratch_bytes(config: ModelConfig, mla: str, ctx: int, tokens: int) -> int:
    """Bytes of intermediate results of a step of `tokens`, in a sequence of at most `ctx`."""
    heads = config.num_attention_heads
    expert_rows = config.num_experts_per_tok * config.moe_intermediate_size
    inner = max(config.intermediate_size, expert_rows + config.n_shared_experts * config.moe_intermediate_size)
    values = (
        4 * config.hidden_size  # residual, normalised, attention's and experts' results
        + config.q_lora_rank
        + heads * (config.qk_head_dim + config.kv_lora_rank + config.qk_rope_head_dim)  # queries, and absorbed
        + heads * (config.kv_lora_rank + config.v_head_dim)
        + 2 * inner  # gate and up
        + config.num_experts_per_tok * config.hidden_size
    )
    expanded = 0 if mla == "1" else heads * expanded_bytes(config, ctx, True)
    logits = config.vocab_size * 4
    # The quarter is the int8 copies of what matrices read.
    return tokens * values * 5 + min(expanded, EXPANDED_BYTES) + logits


def device_scratch_bytes(config: ModelConfig, mla: str, ctx: int) -> int:
    """Bytes of intermediate results on a GPU, for a prompt as long as the context."""
    heads, tokens = config.num_attention_heads, min(DEVICE_SLICE, ctx)
    # Through a layer go the whole prompt's residual stream and attention, and its cache rows in float32.
    prompt = (
        ctx * 4 * (config.hidden_size + heads * config.v_head_dim + config.kv_lora_rank + 2 * config.qk_rope_head_dim)
    )
    # With ``--mla 0`` keys and values pass on their way into the cache, and with ``--mla 1`` there are none.
    pair = device_pair(config)
    pairs = {"0": tokens * heads, "1": 0}.get(mla, min(heads * ctx, max(ctx, DEVICE_EXPANDED_BYTES // pair)))
    scores = heads * ctx * 4 if mla == "2" else 0
    # An array may take an eighth more than its size, so that its memory suits the next one, too.
    return (scratch_bytes(config, "1", ctx, tokens) + prompt + pairs * pair + scores) * 9 // 8


def _absorbed_pair(config: ModelConfig) -> int:
    """Multiply-adds of one head for a query and a key."""
    return 2 * config.kv_lora_rank + config.qk_rope_head_dim


def _expanded_pair(config: ModelConfig) -> int:
    return config.qk_head_dim + config.v_head_dim


def _pairs(tokens: int, cached: int) -> int:
    """Pairs of a new token and one that it sees."""
    return tokens * cached - tokens * (tokens - 1) // 2


def _form(config: ModelConfig, tokens: int, cached: int, mla: str) -> str:
    """The form that a mode takes: absorbed, expanded, or full, where the cache holds keys and values of all heads."""
    if mla == "auto":
        return cheaper_form(config, tokens, cached)
    if mla == "0":
        return "full"
    return "absorbed" if mla == "1" or tokens == 1 else "expanded"


def _up_bytes(config: ModelConfig, tensors: Mapping[str, TensorInfo], layer: int) -> float:
    """k_b and v_b, from the file or derived."""
    blk = f"blk.{layer}.attn_"
    if f"{blk}kv_b.weight" in tensors:
        return _tensor_bytes(tensors, blk + "kv_b.weight")
    k_b = config.num_attention_heads * config.kv_lora_rank * config.qk_nope_head_dim
    qtype = tensors[f"{blk}k_b.weight"].qtype if f"{blk}k_b.weight" in tensors else ggml.F32
    return k_b * _derived_size(qtype) + _tensor_bytes(tensors, blk + "v_b.weight")


def _derived_size(qtype: int) -> int:
    """Bytes of a weight that is derived from one of type `qtype`: float32 stays exact, the others become 16-bit."""
    return 4 if qtype == ggml.F32 else 2


def _tensor_bytes(tensors: Mapping[str, TensorInfo], name: str) -> int:
    if name not in tensors:
        raise PymlaError(f"tensor {name} is missing; convert the model again or take another file")
    return tensor_bytes(tensors[name])


def tensor_bytes(tensor: TensorInfo) -> int:
    """Bytes of a tensor by its type and shape."""
    return math.prod(tensor.shape[:-1]) * ggml.row_bytes(tensor.qtype, tensor.shape[-1])
