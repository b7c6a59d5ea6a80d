"""Mixes of types for models of random weights: those of llama.cpp, those of public files, and single types.

Where the block of a type does not divide a row, `pymla.make.fallbacks` has another one: rules leave that out.
"""

from typing import NamedTuple

from gguf import LlamaFileType

from pymla import ggml
from pymla.make.fallbacks import rows_apart
from pymla.make.mixes import LLAMA_MIXES, Mix, Place, Rule, Where
from pymla.make.model_metadata import FILE_TYPES


def uniform(qtype: int, output_type: int, k_type: int | None = None) -> Mix:
    """One type for all matrices but the output, and k_b where `k_type` is given."""
    types = {"output": output_type, "attn_k_b": qtype if k_type is None else k_type}
    # Neither engine looks up rows that lie together with others.
    types["token_embd"] = rows_apart(qtype)
    rules = tuple(Rule(stem, ggml.NAME[each]) for stem, each in types.items())
    return Mix(ggml.NAME[qtype], FILE_TYPES.get(qtype), qtype, rules)


#: Layers with experts of 61, in the order in which more bits are given to them: the last ones, then from the first on.
_EDGES = (*range(50, 61), *range(3, 50))


def _of_61(*numbers: int) -> Where:
    """The layers of a model that stand for these of 61, so that a short model has all of a mix's types."""

    def holds(place: Place) -> bool:
        return place.layer * 61 // place.layers in numbers

    return Where(f"{len(numbers)} of 61 layers", holds)


#: As llama-quantize chose before it counted kv_b among the value matrices.
_Q4_K_M_2024 = tuple(rule for rule in LLAMA_MIXES["Q4_K_M"].rules if rule.pattern in ("output", "ffn_down*"))
_Q2_K_2024 = (
    Rule("output", "Q6_K"),
    Rule("attn_k_b", "IQ4_NL"),
    Rule("ffn_down*", "Q3_K"),
    Rule("attn_output", "Q3_K"),
)


def _unsloth(qtype: str, *down: Rule) -> tuple[Rule, ...]:
    """Rules of unsloth's dynamic files. Counts of types are on record; which tensors have which type is assumed."""
    return (
        Rule("output", "Q6_K"),
        Rule("attn_[kv]_b", "Q8_0"),
        *down,
        Rule("ffn_down", "Q6_K"),
        Rule("ffn_gate", qtype),
        Rule("ffn_up", qtype),
        Rule("ffn_gate_exps", qtype),
        Rule("ffn_up_exps", qtype),
    )


_UD_Q4_K_XL = _unsloth(
    "Q4_K",
    Rule("ffn_down_exps", "Q5_K"),
    Rule("ffn_down_shexp", "Q6_K", _of_61(*_EDGES[:19])),
    Rule("ffn_down_shexp", "Q4_K", _of_61(*_EDGES[-2:])),
    Rule("ffn_down_shexp", "Q5_K"),
)
_UD_Q2_K_XL = _unsloth(
    "Q2_K",
    Rule("ffn_down_exps", "Q4_K", _of_61(3, 4, 5, 6)),
    Rule("ffn_down_exps", "Q3_K"),
    Rule("ffn_down_shexp", "Q6_K", _of_61(*_EDGES[:11])),
    Rule("ffn_down_shexp", "Q5_K", _of_61(*_EDGES[11:34])),
    Rule("ffn_down_shexp", "Q4_K"),
)
_IQ2_K_R4 = (
    Rule("attn_k_b", "Q5_0"),
    Rule("ffn_down_exps", "IQ3_K_R4"),
    Rule("ffn_*_exps", "IQ2_K_R4"),
    Rule("ffn_down_shexp", "IQ5_KS"),
    Rule("ffn_*_shexp", "IQ4_KS"),
)

_PUBLIC_MIXES = (
    Mix("q4_k_m-2024", LlamaFileType.MOSTLY_Q4_K_M, ggml.Q4_K, _Q4_K_M_2024),
    Mix("q2_k-2024", LlamaFileType.MOSTLY_Q2_K, ggml.Q2_K, _Q2_K_2024),
    Mix("ud-q4_k_xl", LlamaFileType.MOSTLY_Q4_K_M, ggml.Q4_K, _UD_Q4_K_XL),
    Mix("ud-q2_k_xl", LlamaFileType.MOSTLY_Q2_K, ggml.Q4_K, _UD_Q2_K_XL),
    # The number is LLAMA_FTYPE_MOSTLY_IQ2_K_R4 of ik_llama.cpp's include/llama.h.
    Mix("iq2_k_r4", 338, ggml.IQ5_KS, _IQ2_K_R4),
)

#: All mixes by their names in small letters.
MIXES: dict[str, Mix] = {mix.name.lower(): mix for mix in (*LLAMA_MIXES.values(), *_PUBLIC_MIXES)}


class PublicFile(NamedTuple):
    """A file that people download: the shape of its model, its mix, and how many of its matrices have each type."""

    preset: str  # of `model_shapes.PRESETS`
    layout: str  # of `model_metadata.LAYOUTS`
    mix: str
    counts: dict[str, int]


#: Counts are those that ``llama_model_loader`` printed, without F32. Of the last file types alone are on record: its
#: counts follow from the rules.
PUBLIC_FILES: dict[str, PublicFile] = {
    "DeepSeek-R1 Q4_K_M": PublicFile("v3", "kv_b", "q4_k_m-2024", {"Q4_K": 606, "Q6_K": 58}),
    "DeepSeek-Coder-V2-Lite Q4_K_M": PublicFile(
        "v2-lite", "kv_b", "q4_k_m-2024", {"Q4_K": 229, "Q5_0": 14, "Q8_0": 13, "Q6_K": 13}
    ),
    "DeepSeek-V3-0324 UD-Q4_K_XL": PublicFile(
        "v3", "split", "ud-q4_k_xl", {"Q8_0": 122, "Q4_K": 485, "Q5_K": 95, "Q6_K": 23}
    ),
    "DeepSeek-V3-0324 UD-Q2_K_XL": PublicFile(
        "v3", "split", "ud-q2_k_xl", {"Q8_0": 122, "Q2_K": 122, "Q3_K": 54, "Q4_K": 389, "Q5_K": 23, "Q6_K": 15}
    ),
    "DeepSeek-R1 Q2_K": PublicFile("v3", "all", "q2_k-2024", {"Q2_K": 544, "Q3_K": 180, "IQ4_NL": 61, "Q6_K": 1}),
    "DeepSeek-R1-0528 IQ2_K_R4": PublicFile(
        "v3", "all", "iq2_k_r4", {"Q5_0": 61, "IQ4_KS": 116, "IQ5_KS": 435, "IQ2_K_R4": 116, "IQ3_K_R4": 58}
    ),
}
