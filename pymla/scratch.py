"""How much of a step exists at a time: slices of tokens, and heads whose keys and values are expanded.

Backends compute in these portions, and the engine plans memory for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pymla.models.config import ModelConfig

#: Tokens whose intermediate results exist at a time.
SLICE = 512

#: The same on a GPU, which fewer tokens do not fill.
DEVICE_SLICE = 1024

#: Expanded keys and values are computed for as many heads at a time as fit here.
EXPANDED_BYTES = 256 << 20

#: The same on a GPU, with the float32 products that they come from: with few heads at a time, few of its
#: multiprocessors have work.
DEVICE_EXPANDED_BYTES = 1 << 30


def expanded_bytes(config: ModelConfig, tokens: int, exact: bool) -> int:
    """Bytes of the expanded keys and values of one head: float32, or codes of at most 16 bits with two
    numbers for 32."""
    values = tokens * (config.qk_head_dim + config.v_head_dim)
    return values * 4 if exact else values * 9 // 4


def heads_at_once(config: ModelConfig, tokens: int, exact: bool) -> int:
    """Heads of which the expanded keys and values of so many tokens exist at a time."""
    return max(1, EXPANDED_BYTES // expanded_bytes(config, tokens, exact))


def device_heads_at_once(config: ModelConfig, tokens: int, exact: bool = True) -> int:
    """`heads_at_once` on a GPU, where they are always float16."""
    return max(1, DEVICE_EXPANDED_BYTES // (tokens * device_pair(config)))


def device_pair(config: ModelConfig) -> int:
    """Bytes of a token's keys and values of a head on a GPU: float16, from products in float32."""
    return 4 * (config.qk_nope_head_dim + config.v_head_dim) + 2 * (config.qk_head_dim + config.v_head_dim)
