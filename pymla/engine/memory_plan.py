"""The memory that a model takes, by the sizes of the model and the types of its tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pymla import ggml
from pymla.files.gguf_reader import TensorInfo
from pymla.models.config import ModelConfig
from pymla.models.tensors import transposed_type
from pymla.scratch import CHOICE_SCRATCH, DEVICE, HOST, most_choosing

#: Bytes of Python, NumPy, Numba with LLVM, and the compiled kernels.
PROCESS_BYTES = 300 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the host's memory that a model needs, or of a GPU's (`pymla.engine.planning.Planner`)."""

    weights: int  # of the mapped file, which the host reads again from disk where memory is short
    derived: int  # k_b, where the file has its transpose only
    cache: int
    scratch: int
    process: int  # without any model
    plain: int = 0  # copies of tensors whose rows are interleaved in the file

    @property
    def allocated(self) -> int:
        """Bytes that must fit, however little of the file stays in memory."""
        return self.derived + self.plain + self.cache + self.scratch + self.process

    @property
    def total(self) -> int:
        """Bytes with which the model runs from memory alone."""
        return self.weights + self.allocated

    def describe_allocated(self) -> str:
        """The parts of `allocated`, for a message."""
        plain = f"plain copies of interleaved weights {gib(self.plain)}, " if self.plain else ""
        return (
            f"cache {gib(self.cache)}, scratch {gib(self.scratch)}, derived weights {gib(self.derived)}, {plain}"
            f"process {gib(self.process)}"
        )


def gib(nbytes: int) -> str:
    """Bytes for a message."""
    return f"{nbytes / (1 << 30):.2f} GiB"


def tensor_bytes(tensor: TensorInfo) -> int:
    """Bytes of a tensor as it is loaded: its rows are no longer interleaved.

    Raises
    ------
    PymlaError
        Its type does not run with rows of this length.
    """
    return ggml.tensor_bytes(ggml.plain_type(tensor.qtype), tensor.shape)


def derived_bytes(config: ModelConfig, tensors: Mapping[str, TensorInfo], layers: Iterable[int] | None = None) -> int:
    """Bytes of the matrices that are transposed at load, where the file has k_b and v_b but not kv_b; of some layers,
    or of all."""
    total = 0
    for layer in range(config.num_hidden_layers) if layers is None else layers:
        k_b = tensors.get(f"blk.{layer}.attn_k_b.weight")
        if k_b is not None and f"blk.{layer}.attn_kv_b.weight" not in tensors:
            total += transposed_bytes(config, k_b.qtype)
    return total


def transposed_bytes(config: ModelConfig, qtype: int) -> int:
    """Bytes of a layer's ``W_k_b`` that is transposed from one of type `qtype`."""
    columns = config.kv_lora_rank
    rows = config.num_attention_heads * config.qk_nope_head_dim
    return rows * ggml.row_bytes(transposed_type(ggml.plain_type(qtype), columns), columns)


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
        + index_values(config)
    )
    expanded = 0 if mla == "1" else heads * HOST.expanded_bytes(config, ctx, exact=True)
    logits = config.vocab_size * 4
    # The fifth byte of a value is its int8 copy, which matrices read.
    return tokens * values * 5 + min(expanded, HOST.most_expanded) + logits + choice_bytes(config, ctx)


def index_values(config: ModelConfig) -> int:
    """Numbers of the indexer's queries, weights and key of a token."""
    indexer = config.indexer
    return indexer.heads * (indexer.head_dim + 1) + indexer.head_dim if indexer else 0


def choice_bytes(config: ModelConfig, ctx: int) -> int:
    """Bytes of the positions that the tokens of a step choose, in a sequence of at most `ctx`: those of as many tokens
    as choose at a time, and of the ones before them in the same step that attend to all positions; and of the scores
    by which they choose."""
    if config.indexer is None or ctx <= config.indexer.top_k:
        return 0
    top_k = config.indexer.top_k
    return 4 * top_k * min(ctx, most_choosing(top_k) + top_k) + CHOICE_SCRATCH


def device_scratch_bytes(config: ModelConfig, mla: str, ctx: int) -> int:
    """Bytes of intermediate results on a GPU, for a prompt as long as the context."""
    heads, tokens = config.num_attention_heads, min(DEVICE.tokens, ctx)
    # Through a layer go the whole prompt's residual stream and attention, and its cache rows in float32.
    prompt = (
        ctx * 4 * (config.hidden_size + heads * config.v_head_dim + config.kv_lora_rank + 2 * config.qk_rope_head_dim)
    )
    # With ``--mla 0`` keys and values pass on their way into the cache, and with ``--mla 1`` there are none.
    pair = DEVICE.expanded_bytes(config, 1)
    pairs = {"0": tokens * heads, "1": 0}.get(mla, min(heads * ctx, max(ctx, DEVICE.most_expanded // pair)))
    scores = heads * ctx * 4 if mla == "2" else 0
    # An array may take an eighth more than its size, so that its memory suits the next one, too.
    return (scratch_bytes(config, "1", ctx, tokens) + prompt + pairs * pair + scores) * 9 // 8
