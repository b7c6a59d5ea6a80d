"""How much of a step exists at a time: slices of tokens, and heads whose keys and values are expanded.

Backends compute in these portions, and the engine plans memory for them, also for a GPU that is not there.
"""

from dataclasses import dataclass
from typing import Protocol


class HeadSizes(Protocol):
    """Numbers of a head, as `pymla.models.config.ModelConfig` has them."""

    @property
    def qk_nope_head_dim(self) -> int: ...

    @property
    def qk_head_dim(self) -> int: ...

    @property
    def v_head_dim(self) -> int: ...


@dataclass(frozen=True)
class Portions:
    """The portions of a kind of hardware, and the memory that they take."""

    tokens: int  # of a step, whose intermediate results exist at a time
    most_expanded: int  # bytes that the expanded keys and values of some heads should fit
    on_device: bool = False  # whether keys and values are float16, computed from products in float32

    def expanded_bytes(self, config: HeadSizes, tokens: int, exact: bool = True) -> int:
        """Bytes of the expanded keys and values of one head: on the host float32, or codes of at most 16 bits with two
        numbers for 32; on a device float16, with the float32 products that they come from, `exact` or not."""
        if self.on_device:
            products = config.qk_nope_head_dim + config.v_head_dim
            return tokens * (4 * products + 2 * (config.qk_head_dim + config.v_head_dim))
        values = tokens * (config.qk_head_dim + config.v_head_dim)
        return values * 4 if exact else values * 9 // 4

    def heads_at_once(self, config: HeadSizes, tokens: int, exact: bool) -> int:
        """Heads whose expanded keys and values, for `tokens` tokens of cache, exist at a time."""
        return max(1, self.most_expanded // self.expanded_bytes(config, tokens, exact))


HOST = Portions(tokens=512, most_expanded=256 << 20)

#: Fewer tokens do not fill a GPU, and with few heads at a time few of its multiprocessors have work.
DEVICE = Portions(tokens=1024, most_expanded=1 << 30, on_device=True)

#: Bytes of the positions that tokens of a step chose, which exist at a time: those of 8,192 tokens with 2,048 each.
MOST_CHOSEN = 64 << 20

#: Bytes that a backend has at a time for scores of positions and for rows that were chosen: on the host 16 MiB of each,
#: on a GPU 36 MiB of scores and of groups of them, which mostly stay in the second-level cache.
CHOICE_SCRATCH = 36 << 20


def most_choosing(top_k: int) -> int:
    """Tokens whose choices of `top_k` positions exist at a time."""
    return max(1, MOST_CHOSEN // (4 * top_k))
