"""The rows of a token in the cache: their types, their widths, and the bytes that they take."""

from collections.abc import Iterable

from pymla import ggml
from pymla.errors import PymlaError
from pymla.models.config import ModelConfig
from pymla.pages import CACHE_TYPES, HADAMARD_TYPES, INDEX_TYPES, PAGE, pages_of


def row_layout(config: ModelConfig, cache_type: str, mla: str) -> list[tuple[int, int]]:
    """The ggml type and the width of the two kinds of rows that attention reads in a layer.

    Raises
    ------
    PymlaError
        The type is unknown, or has no keys and values of heads, or its blocks of 32 do not fit the model's sizes.
    """
    if cache_type not in CACHE_TYPES:
        raise PymlaError(f"unknown cache type {cache_type!r}; choose {', '.join(CACHE_TYPES)}")
    qtype = CACHE_TYPES[cache_type]
    if mla == "0" and qtype in HADAMARD_TYPES:
        raise PymlaError(f"cache type {cache_type} is for latent rows, which MLA mode 0 does not keep; choose q8_0")
    if mla == "0":
        heads = config.num_attention_heads
        layout = [
            ("qk_head_dim", qtype, config.qk_head_dim, heads * config.qk_head_dim),
            ("v_head_dim", qtype, config.v_head_dim, heads * config.v_head_dim),
        ]
    else:
        rope_type = ggml.F16 if ggml.BLOCK_SIZE[qtype] > 1 else qtype
        layout = [
            ("kv_lora_rank", qtype, config.kv_lora_rank, config.kv_lora_rank),
            ("qk_rope_head_dim", rope_type, config.qk_rope_head_dim, config.qk_rope_head_dim),
        ]
    for name, row_type, size, _ in layout:
        if size % ggml.BLOCK_SIZE[row_type]:
            raise PymlaError(f"cache type {cache_type} needs a {name} that 32 divides, and it is {size}; choose f16")
    return [(row_type, width) for _, row_type, _, width in layout]


def index_layout(config: ModelConfig, cache_type: str, layer: int) -> tuple[int, int] | None:
    """The ggml type and the width of the indexer's key in the cache of a layer; None where it has no indexer.

    A float type of the cache is that of the key, too; with any other it has 8 bits, as fewer would change the choice.
    """
    if config.indexer is None or not config.indexer.full[layer]:
        return None
    qtype = CACHE_TYPES[cache_type]
    return qtype if qtype in INDEX_TYPES else ggml.Q8_0, config.indexer.head_dim


def attended_bytes(config: ModelConfig, cache_type: str, mla: str) -> int:
    """Bytes of a token in the cache of a layer that attention reads, as ggml blocks."""
    return sum(ggml.row_bytes(qtype, width) for qtype, width in row_layout(config, cache_type, mla))


def index_bytes(config: ModelConfig, cache_type: str, layer: int) -> int:
    """Bytes of a token in the cache of a layer that the indexer reads, as ggml blocks."""
    layout = index_layout(config, cache_type, layer)
    return ggml.row_bytes(*layout) if layout else 0


def row_bytes(config: ModelConfig, cache_type: str, mla: str, layers: Iterable[int] | None = None) -> int:
    """Bytes of a token in the cache, of some layers or of all, as ggml blocks."""
    attended = attended_bytes(config, cache_type, mla)
    numbers = range(config.num_hidden_layers) if layers is None else layers
    return sum(attended + index_bytes(config, cache_type, layer) for layer in numbers)


def cache_bytes(config: ModelConfig, cache_type: str, mla: str, ctx: int, layers: Iterable[int] | None = None) -> int:
    """Bytes of a cache for `ctx` tokens, which are whole pages of 64; of some layers or of all."""
    return pages_of(ctx) * PAGE * row_bytes(config, cache_type, mla, layers)
