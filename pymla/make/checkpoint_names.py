"""One set of names for the tensors of a language model, whoever wrote its checkpoint.

The names are those of transformers' modules without a prefix: ``embed_tokens.weight``, ``norm.weight``,
``lm_head.weight`` and ``layers.N.self_attn…``. Checkpoints have them as they are, behind ``model.``,
``language_model.``, ``language_model.model.`` or ``model.language_model.``, or as mistral-common names them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pymla.errors import PymlaError

#: Modules of models that also see or hear, beside the language model.
_OTHER_MODULES = frozenset(
    (
        "vision_tower",
        "vision_model",
        "vision_encoder",
        "visual",
        "multi_modal_projector",
        "mm_projector",
        "vision_language_adapter",
        "patch_merger",
        "pre_mm_projector_norm",
        "audio_tower",
    )
)

#: mistral-common's names outside the layers, and those inside, by modules from the layer down.
_MISTRAL_OUTER = {"tok_embeddings": "embed_tokens", "output": "lm_head"}
_MISTRAL_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
    "gate": "mlp.gate",
}
#: The networks there, which are dense ones, shared experts and routed ones, and the matrices of each.
_MISTRAL_NETWORKS = {"feed_forward": "mlp", "shared_experts": "mlp.shared_experts", "experts": "mlp.experts"}
_MISTRAL_MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class CheckpointNames(NamedTuple):
    """The tensors of a checkpoint."""

    stored: dict[str, str]  # names in the checkpoint by the names that are the same for all
    others: list[str]  # modules that are no part of the language model
    other_tensors: int  # which they hold

    @classmethod
    def of(cls, names: Iterable[str], folder: Path) -> "CheckpointNames":
        """Sort the names of a checkpoint.

        Raises
        ------
        PymlaError
            Two names stand for one tensor.
        """
        stored: dict[str, str] = {}
        others: list[str] = []
        for name in sorted(names):
            parts = list(_without_prefix(name.split("."))) or [name]
            if parts[0] in _OTHER_MODULES:
                others.append(parts[0])
                continue
            common = ".".join(_as_in_transformers(parts))
            if common in stored:
                raise PymlaError(f"{folder}: tensors {stored[common]} and {name} are one tensor by two names")
            stored[common] = name
        return cls(stored, sorted(set(others)), len(others))

    def layers(self) -> set[int]:
        """The layers that have tensors."""
        return {layer for layer in map(layer_of, self.stored) if layer is not None}


def layer_of(name: str) -> int | None:
    """The layer of a tensor; None for one outside the layers."""
    module, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    is_number = number.isascii() and number.isdecimal() and len(number) < 10
    return int(number) if module == "layers" and is_number else None


def _without_prefix(parts: list[str]) -> Iterator[str]:
    """The parts of a name from the language model down."""
    inside = False
    for part in parts:
        if part != "language_model" and (inside or part != "model"):
            inside = True
            yield part


def _as_in_transformers(parts: list[str]) -> list[str]:
    """The parts of a name that mistral-common may have given, as transformers names the tensor."""
    *path, last = parts
    if len(path) == 1:
        return [_MISTRAL_OUTER.get(path[0], path[0]), last]
    if len(path) < 3 or path[0] != "layers":
        return parts
    layer, inner = path[:2], path[2:]
    network, *experts, matrix = inner if len(inner) > 1 else ("", *inner)
    if network in _MISTRAL_NETWORKS and matrix in _MISTRAL_MATRICES:
        return [*layer, _MISTRAL_NETWORKS[network], *experts, _MISTRAL_MATRICES[matrix], last]
    return [*layer, _MISTRAL_LAYER.get(".".join(inner), ".".join(inner)), last]
