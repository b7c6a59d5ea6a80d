"""The lightning indexer of sparse attention: its sizes, and the layers that have one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymla.models.metadata import Metadata

#: Context length from which on a file of glm-dsa without ``indexer.types`` is GLM-5.2, which shares choices.
_SHARING_CONTEXT = 1 << 20


@dataclass(frozen=True)
class Indexer:
    """Sizes of the indexer: it scores the positions that a token sees, and the token attends to the best of them."""

    heads: int  # of its queries
    head_dim: int  # numbers of a query's head, and of a key; the first ``qk_rope_head_dim`` are rotated
    top_k: int  # positions that a token attends to, at most
    #: Of each layer, and behind them of a loaded nextn block: whether it has an indexer. Other layers share the last
    #: choice before them, and a block attends to all positions.
    full: tuple[bool, ...]
    interleave: bool = False  # whether rope's pairs are neighbours; otherwise of the two halves


def read_indexer(read: Metadata, fields: dict[str, Any]) -> Indexer:
    """The indexer of a file, whose keys are those of llama.cpp's converter (``conversion/deepseek.py``,
    ``conversion/glm.py``).

    Parameters
    ----------
    read : Metadata
    fields : dict
        The fields of a `ModelConfig` that all families have.

    Raises
    ------
    PymlaError
        A key is missing, or its value is none that can be run.
    """
    if not fields["q_lora_rank"]:
        read.refuse("attention.q_lora_rank", 0, "the indexer's queries come from the low-rank ones of attention")
    key, rotated = "attention.indexer.key_length", fields["qk_rope_head_dim"]
    head_dim = read.size(key)
    if head_dim % 32 or head_dim < rotated:
        read.refuse(key, head_dim, f"a multiple of 32, and at least the {rotated} rotated numbers, is expected")
    return Indexer(
        heads=read.size("attention.indexer.head_count"),
        head_dim=head_dim,
        top_k=read.size("attention.indexer.top_k"),
        full=_full_layers(read, fields["num_hidden_layers"], fields["context_length"]),
        interleave=read.architecture == "glm-dsa",
    )


def _full_layers(read: Metadata, layers: int, context_length: int) -> tuple[bool, ...]:
    """Whether each layer has an indexer. A file without the key says nothing: V3.2, GLM-5 and 5.1 have one everywhere,
    GLM-5.2 in layers 0, 1 and 2 and in every fourth from there on (llama.cpp's ``glm-dsa.cpp``)."""
    key = "attention.indexer.types"
    types = read.get(key, list, None)
    if types is None:
        shared = read.architecture == "glm-dsa" and context_length >= _SHARING_CONTEXT
        return tuple(not shared or i < 3 or (i - 2) % 4 == 0 for i in range(layers))
    if len(types) != layers:
        read.refuse(key, f"of {len(types)} layers", f"{layers} are expected")
    if not all(each in (0, 1) for each in types):
        read.refuse(key, "not a list of true and false", "true is expected where a layer has an indexer of its own")
    if not types[0]:
        read.refuse(key, "false for layer 0", "there is no choice before it that it could share")
    return tuple(map(bool, types))
