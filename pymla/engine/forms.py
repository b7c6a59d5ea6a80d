"""The forms of attention: which one a step takes, by the mode that the user chose or by the cost of each.

- The absorbed form attends in the latent space: ``W_k_b`` goes into the queries and ``W_v_b`` onto the result.
- The expanded form computes keys and values of all heads from the cache first.
- The full form reads keys and values of all heads from a cache that holds them.
- The sparse form is the absorbed one over the positions that an indexer chose: of the tokens that see more positions
  than it chooses. The tokens before them attend to all positions, in one of the other forms.
"""

from typing import Literal, NamedTuple

from pymla.errors import PymlaError
from pymla.models.config import ModelConfig

#: auto: the form that takes fewer multiply-adds, per sequence and step. 0: full K and V cache. 1: absorbed always.
#: 2: expanded prompt, absorbed generation with materialised scores. 3: the same with online softmax.
MLA_MODES = ("auto", "0", "1", "2", "3")

#: The modes that sparse attention goes with: "0" keeps no latent rows, and "2" keeps the scores of all positions.
SPARSE_MODES = ("auto", "1", "3")

Form = Literal["absorbed", "expanded", "full", "sparse"]


class Part(NamedTuple):
    """Neighbouring tokens of one sequence in a step whose attention takes one form."""

    form: Form
    tokens: int
    cached: int  # tokens in the sequence's cache after them


def check_mode(config: ModelConfig, mla: str) -> None:
    """Raise a PymlaError unless `mla` is one of `MLA_MODES`, and of `SPARSE_MODES` where attention is sparse."""
    if mla not in MLA_MODES:
        raise PymlaError(f"unknown MLA mode {mla!r}; choose {', '.join(MLA_MODES)}")
    if config.indexer and mla not in SPARSE_MODES:
        raise PymlaError(
            f"`mla` is {mla}, which attends to all positions, and this model's attention is sparse: choose "
            f"{', '.join(SPARSE_MODES)}, or turn sparse attention off with `dsa`"
        )


def parts_of(config: ModelConfig, mla: str, tokens: int, cached: int) -> list[Part]:
    """The forms of attention of one sequence in a step, in the order of its tokens; arguments as for `form_of`."""
    sparse = min(tokens, max(0, cached - config.indexer.top_k)) if config.indexer else 0
    dense, parts = tokens - sparse, []
    if dense:
        before = cached - sparse
        parts.append(Part(form_of(config, mla, dense, before), dense, before))
    if sparse:
        parts.append(Part("sparse", sparse, cached))
    return parts


def form_of(config: ModelConfig, mla: str, tokens: int, cached: int) -> Form:
    """The form of attention of tokens of one sequence that attend to all positions they see.

    Parameters
    ----------
    config : ModelConfig
    mla : one of `MLA_MODES`
    tokens : new tokens of the sequence, T, at least 1
    cached : tokens in its cache after the step, S
    """
    if mla == "auto":
        return cheaper_form(config, tokens, cached)
    if mla == "0":
        return "full"
    return "absorbed" if mla == "1" or tokens == 1 else "expanded"


def cheaper_form(config: ModelConfig, tokens: int, cached: int) -> Form:
    """The form of attention over a latent cache that takes fewer multiply-adds; arguments as for `form_of`.

    The absorbed form pays ``2 rank + R`` for each pair of query and key, and the products with ``W_k_b`` and ``W_v_b``
    once per new token. The expanded form pays ``nope + R + v`` per pair, and the same products once per cached token. A
    single token is absorbed.
    """
    if tokens == 1:
        return "absorbed"
    up = up_macs(config)
    pairs = seen_pairs(tokens, cached)
    absorbed = tokens * up + pairs * pair_macs(config, "absorbed")
    expanded = cached * up + pairs * pair_macs(config, "expanded")
    return "absorbed" if absorbed <= expanded else "expanded"


def up_macs(config: ModelConfig) -> int:
    """Multiply-adds of one head for the products of a token with ``W_k_b`` and ``W_v_b``."""
    return config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)


def pair_macs(config: ModelConfig, form: Form) -> int:
    """Multiply-adds of one head for a query and a key."""
    if form in ("absorbed", "sparse"):
        return 2 * config.kv_lora_rank + config.qk_rope_head_dim
    return config.qk_head_dim + config.v_head_dim


def seen_pairs(tokens: int, cached: int) -> int:
    """Pairs of a new token and a token that it sees."""
    return tokens * cached - tokens * (tokens - 1) // 2
