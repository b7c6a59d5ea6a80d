"""Mixes: which tensor of a file has which type, as llama.cpp's ``llama-quantize`` chooses and as public files have it.

A mix is a list of rules, of which the first that matches a tensor gives its type. Where the block of that type does not
divide a row, the type falls back as in `make_model.fitting_type`: rules leave these fall-backs out.
"""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

from gguf import LlamaFileType

from pymla import ggml
from pymla.make.model_metadata import FILE_TYPES

#: Whether a rule is for a layer, given its number and the count of layers.
Layers = Callable[[int, int], bool]


class Rule(NamedTuple):
    """The type of tensors whose stem matches, in some layers."""

    pattern: str  # of `fnmatch`; a stem is the name without its layer and without ".weight"
    qtype: str
    layers: Layers | None = None  # None: in all


class Mix(NamedTuple):
    """The types of a file's matrices. The last rule matches every tensor."""

    file_type: int | None  # general.file_type, where there is a number for the mix
    rules: tuple[Rule, ...]

    def type_of(self, name: str, layer_count: int) -> int:
        """The ggml type of a matrix, before it falls back.

        Parameters
        ----------
        name : as in the file, such as ``blk.3.attn_output.weight``
        layer_count : layers of the model
        """
        block = re.match(r"blk\.(\d+)\.", name)
        stem, layer = name.split(".")[-2], int(block[1]) if block else 0
        for rule in self.rules:
            if fnmatchcase(stem, rule.pattern) and (rule.layers is None or rule.layers(layer, layer_count)):
                return ggml.ID[rule.qtype]
        raise ValueError(f"no rule of the mix matches {name}")


def uniform(qtype: int, output_type: int, k_type: int | None = None) -> Mix:
    """One type for all matrices but the output, and k_b where `k_type` is given."""
    types = {"output": output_type, "attn_k_b": qtype if k_type is None else k_type}
    # Neither engine looks up rows that lie together with others.
    types |= {"token_embd": ggml.PLAIN.get(qtype, qtype), "*": qtype}
    return Mix(FILE_TYPES.get(qtype), tuple(Rule(stem, ggml.NAME[each]) for stem, each in types.items()))


# llama-quantize -------------------------------------------------------------------------------------------------------
#
# Rules are those of `llama_tensor_get_type_impl` in src/llama-quant.cpp, llama.cpp commit 0c1e570 (October 2026), for
# models with MLA, more than 8 experts and an importance matrix. tests/golden/mixes.json has what the program chose.


def _more_bits(layer: int, count: int) -> bool:
    """``use_more_bits``: the first and the last eighth, and every third layer between them."""
    return layer < count // 8 or layer >= 7 * count // 8 or (layer - count // 8) % 3 == 2


def _first_sixteenth(layer: int, count: int) -> bool:
    return layer < count // 16


def _first_two(layer: int, count: int) -> bool:
    return layer < 2


# For types below 3 bits, llama-quantize compares the number of down matrices before one with an eighth of the layers.
# A layer with experts has two of them; these are for models whose first layer only is dense.


def _early_down(layer: int, count: int) -> bool:
    return 2 * layer - 1 < count // 8


def _early_shared_down(layer: int, count: int) -> bool:
    return 2 * layer < count // 8


def _below_three_bits(qtype: str, *special: Rule) -> tuple[Rule, ...]:
    return (
        Rule("output", "Q5_K"),
        Rule("token_embd", "Q2_K"),
        Rule("attn_kv_b", "Q4_K"),
        Rule("ffn_down_shexp", "Q2_K", _early_shared_down),
        Rule("ffn_down*", "Q2_K", _early_down),
        *special,
        Rule("*", qtype),
    )


def _medium(qtype: str) -> tuple[Rule, ...]:
    return (
        Rule("output", "Q6_K"),
        Rule("attn_kv_b", "Q6_K", _more_bits),
        Rule("ffn_down*", "Q6_K", _more_bits),
        Rule("*", qtype),
    )


MIXES: dict[str, Mix] = {
    "q8_0": Mix(LlamaFileType.MOSTLY_Q8_0, (Rule("*", "Q8_0"),)),
    "q6_k": Mix(LlamaFileType.MOSTLY_Q6_K, (Rule("*", "Q6_K"),)),
    "q5_k_m": Mix(LlamaFileType.MOSTLY_Q5_K_M, _medium("Q5_K")),
    "q4_k_m": Mix(LlamaFileType.MOSTLY_Q4_K_M, _medium("Q4_K")),
    "q3_k_m": Mix(
        LlamaFileType.MOSTLY_Q3_K_M,
        (
            Rule("output", "Q6_K"),
            Rule("attn_kv_b", "Q5_K", _first_two),
            Rule("attn_kv_b", "Q4_K"),
            Rule("ffn_down*", "Q5_K", _first_sixteenth),
            Rule("ffn_down*", "Q4_K"),
            Rule("attn_output", "Q4_K"),
            Rule("*", "Q3_K"),
        ),
    ),
    "q2_k": Mix(
        LlamaFileType.MOSTLY_Q2_K,
        (
            Rule("output", "Q6_K"),
            Rule("attn_kv_b", "Q3_K"),
            Rule("ffn_down*", "Q3_K"),
            Rule("attn_output", "Q3_K"),
            Rule("*", "Q2_K"),
        ),
    ),
    "iq4_xs": Mix(LlamaFileType.MOSTLY_IQ4_XS, (Rule("output", "Q6_K"), Rule("*", "IQ4_XS"))),
    "iq3_xxs": Mix(
        LlamaFileType.MOSTLY_IQ3_XXS,
        (
            Rule("output", "Q5_K"),
            Rule("token_embd", "IQ3_S"),
            Rule("attn_q", "IQ2_S"),
            Rule("attn_output", "IQ3_S"),
            Rule("*", "IQ3_XXS"),
        ),
    ),
    "iq2_xxs": Mix(LlamaFileType.MOSTLY_IQ2_XXS, _below_three_bits("IQ2_XXS")),
    "iq1_s": Mix(LlamaFileType.MOSTLY_IQ1_S, _below_three_bits("IQ1_S", Rule("attn_output", "IQ2_XXS"))),
}

#: Mixes whose types `llama-quantize` chose, for the test that compares them.
LLAMA_QUANTIZE = tuple(MIXES)

# Public files ---------------------------------------------------------------------------------------------------------


def _of_61(*numbers: int) -> Layers:
    """The layers of a model that stand for these of 61, so that a short model has all of a mix's types."""
    return lambda layer, count: layer * 61 // count in numbers


#: Layers with experts of 61, in the order in which more bits are given to them: the last ones, then from the first on.
_EDGES = (*range(50, 61), *range(3, 50))


def _unsloth(qtype: str, down: tuple[Rule, ...], shared_down: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules of unsloth's dynamic files. Counts of types are on record; which tensors have which type is assumed."""
    return (
        Rule("output", "Q6_K"),
        Rule("attn_[kv]_b", "Q8_0"),
        *down,
        *shared_down,
        Rule("ffn_down", "Q6_K"),
        Rule("ffn_gate", qtype),
        Rule("ffn_up", qtype),
        Rule("ffn_gate_exps", qtype),
        Rule("ffn_up_exps", qtype),
        Rule("*", "Q4_K"),
    )


MIXES |= {
    # As llama-quantize chose before it counted kv_b among the value matrices.
    "q4_k_m-2024": Mix(
        LlamaFileType.MOSTLY_Q4_K_M,
        (Rule("output", "Q6_K"), Rule("ffn_down*", "Q6_K", _more_bits), Rule("*", "Q4_K")),
    ),
    "q2_k-2024": Mix(
        LlamaFileType.MOSTLY_Q2_K,
        (
            Rule("output", "Q6_K"),
            Rule("attn_k_b", "IQ4_NL"),
            Rule("ffn_down*", "Q3_K"),
            Rule("attn_output", "Q3_K"),
            Rule("*", "Q2_K"),
        ),
    ),
    "ud-q4_k_xl": Mix(
        LlamaFileType.MOSTLY_Q4_K_M,
        _unsloth(
            "Q4_K",
            (Rule("ffn_down_exps", "Q5_K"),),
            (
                Rule("ffn_down_shexp", "Q6_K", _of_61(*_EDGES[:19])),
                Rule("ffn_down_shexp", "Q4_K", _of_61(*_EDGES[-2:])),
                Rule("ffn_down_shexp", "Q5_K"),
            ),
        ),
    ),
    "ud-q2_k_xl": Mix(
        LlamaFileType.MOSTLY_Q2_K,
        _unsloth(
            "Q2_K",
            (Rule("ffn_down_exps", "Q4_K", _of_61(3, 4, 5, 6)), Rule("ffn_down_exps", "Q3_K")),
            (
                Rule("ffn_down_shexp", "Q6_K", _of_61(*_EDGES[:11])),
                Rule("ffn_down_shexp", "Q5_K", _of_61(*_EDGES[11:34])),
                Rule("ffn_down_shexp", "Q4_K"),
            ),
        ),
    ),
    "iq2_k_r4": Mix(
        338,  # LLAMA_FTYPE_MOSTLY_IQ2_K_R4 of ik_llama.cpp's include/llama.h
        (
            Rule("attn_k_b", "Q5_0"),
            Rule("ffn_down_exps", "IQ3_K_R4"),
            Rule("ffn_*_exps", "IQ2_K_R4"),
            Rule("ffn_down_shexp", "IQ5_KS"),
            Rule("ffn_*_shexp", "IQ4_KS"),
            Rule("*", "IQ5_KS"),
        ),
    ),
}


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
