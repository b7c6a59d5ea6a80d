"""Mixes: which tensor of a model has which type, as llama.cpp's ``llama-quantize`` chooses.

A mix is a list of rules, of which the first that matches a tensor gives its type. The rules are those of
``llama_tensor_get_type_impl`` in llama.cpp's src/llama-quant.cpp (commit 0c1e570, October 2026) for the architectures
with MLA; tests/golden/mixes.json has what the program chose. Where the block of a type does not divide a row,
`pymla.make.fallbacks` has another one: rules leave that out.

llama.cpp goes through the tensors by layer and, in a layer, by name, and some of its rules count the tensors before
one. `Walk` does the same.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from gguf import LlamaFileType

from pymla import ggml
from pymla.errors import PymlaError


class TensorInfo(NamedTuple):
    """A tensor whose type is chosen."""

    name: str  # as in the file, such as ``blk.3.attn_output.weight``
    shape: tuple[int, ...]  # NumPy order, columns last
    qtype: int = ggml.F32  # what it has before, which tensors keep that are not quantised


class Choice(NamedTuple):
    """The type of a tensor, and why."""

    qtype: int
    reason: str


class Place(NamedTuple):
    """What rules ask about a tensor and its model."""

    layer: int  # of the tensor; in feed-forward networks of a model without experts `number`, as in llama.cpp
    layers: int  # ``block_count``: layers of the model, those included that predict further tokens
    number: int  # tensors before this one of its kind, such as ffn_down, whose type rules chose
    values: int  # attn_kv_b tensors of the model
    experts: int  # routed experts of a layer; 0 without
    queries_per_key: int  # heads of queries for each head of keys
    importance: bool  # whether there is an importance matrix
    matrices: int  # matrices in the tensor, such as experts
    fits: bool  # whether the block of the mix's own type divides a row


class Where(NamedTuple):
    """A condition of a rule, and its words for people."""

    text: str
    holds: Callable[[Place], bool]


class Rule(NamedTuple):
    """The type of tensors whose stem matches, where a condition holds."""

    pattern: str  # of `fnmatch`; a stem is the name without its layer and without ".weight"
    qtype: str
    where: Where | None = None  # None: everywhere


class Mix(NamedTuple):
    """The types of a file's matrices: that of the first rule that matches a tensor, and `qtype` where none does."""

    name: str
    file_type: int | None  # general.file_type, where there is a number for the mix
    qtype: int
    rules: tuple[Rule, ...] = ()


class Model(NamedTuple):
    """What the rules of mixes ask about a model; most fields are those of `Place`."""

    layers: int
    values: int
    experts: int
    queries_per_key: int
    importance: bool
    tied: bool  # whether the embeddings are the output matrix, too

    @classmethod
    def of(cls, tensors: Iterable[TensorInfo], layers: int, queries_per_key: int, importance: bool) -> "Model":
        """The model that has these tensors."""
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        experts = (shape[0] for name, shape in shapes.items() if name.endswith("_exps.weight") and len(shape) == 3)
        return cls(
            layers=layers,
            values=sum(name.endswith("attn_kv_b.weight") for name in shapes),
            experts=next(experts, 0),
            queries_per_key=queries_per_key,
            importance=importance,
            tied="output.weight" not in shapes,
        )


def walk_order(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Tensors as llama.cpp goes through them: those outside of layers, then each layer's, by name."""
    return sorted(tensors, key=lambda tensor: (_layer(tensor.name, -1), tensor.name.encode()))


class Walk:
    """The choices of a mix for the tensors of a model, one after the other in `walk_order`.

    Rules that count see the tensors that were asked for: those whose type the user gave are left out, as llama.cpp
    leaves them out.
    """

    #: Kinds of tensors that llama.cpp counts, as patterns of stems.
    _KINDS = ("attn_kv_b", "ffn_down*", "ffn_gate*", "ffn_up*")

    def __init__(self, mix: Mix, model: Model):
        self._mix, self._model = mix, model
        self._numbers: Counter[str] = Counter()

    def choose(self, tensor: TensorInfo) -> Choice:
        """The type of the next tensor, before it falls back."""
        stem = self._stem(tensor.name)
        place = self._place(tensor, stem)
        for rule in self._mix.rules:
            if fnmatchcase(stem, rule.pattern) and (rule.where is None or rule.where.holds(place)):
                where = f", {rule.where.text}" if rule.where else ""
                return Choice(ggml.ID[rule.qtype], f"mix {self._mix.name}: {rule.pattern}{where}")
        return Choice(self._mix.qtype, f"mix {self._mix.name}")

    def _stem(self, name: str) -> str:
        if self._model.tied and name == "token_embd.weight":
            return "output"
        return name.split(".")[-2]

    def _place(self, tensor: TensorInfo, stem: str) -> Place:
        kind = next((kind for kind in self._KINDS if fnmatchcase(stem, kind)), "")
        number = self._numbers[kind]
        self._numbers[kind] += 1
        by_count = self._model.experts < 2 and kind.startswith("ffn_")
        return Place(
            layer=number if by_count else _layer(tensor.name, 0),
            layers=self._model.layers,
            number=number,
            values=self._model.values,
            experts=self._model.experts,
            queries_per_key=self._model.queries_per_key,
            importance=self._model.importance,
            matrices=tensor.shape[0] if len(tensor.shape) == 3 else 1,
            fits=tensor.shape[-1] % ggml.BLOCK_SIZE[self._mix.qtype] == 0,
        )


def _layer(name: str, default: int) -> int:
    found = re.match(r"blk\.(\d{1,9})\.", name, re.ASCII)
    return int(found[1]) if found else default


def bits(qtype: int) -> float:
    """Bits of a weight, without row headers."""
    return 8 * ggml.BLOCK_BYTES[qtype] / ggml.BLOCK_SIZE[qtype]


# Conditions -----------------------------------------------------------------------------------------------------------


def _more_bits(index: int, count: int) -> bool:
    """``use_more_bits``: the first and the last eighth, and every third layer between them."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


_OUTER = "first and last eighth and every third between"
_MORE_BITS = Where(f"{_OUTER} of the layers", lambda place: _more_bits(place.layer, place.layers))
_MORE_BITS_OF_VALUES = Where(_OUTER, lambda place: _more_bits(place.number, place.values))
_FIRST_EIGHTH = Where("first eighth of the layers", lambda place: place.layer < place.layers // 8)
_FIRST_SIXTEENTH = Where("first sixteenth of the layers", lambda place: place.layer < place.layers // 16)
_MIDDLE = Where(
    "all but the first and the last eighth of the layers",
    lambda place: place.layers // 8 <= place.layer < 7 * place.layers // 8,
)
_FIRST_TWO = Where("first two", lambda place: place.number < 2)
_FIRST_FOUR = Where("first four", lambda place: place.number < 4)
# llama.cpp counts ffn_down tensors here, of which a layer with experts has two, and compares with layers.
_EARLY = Where("as many as an eighth of the layers", lambda place: place.number < place.layers // 8)

_EARLY_WITH = Where(
    "first eighth of the layers, with an importance matrix",
    lambda place: place.importance and _FIRST_EIGHTH.holds(place),
)
_EARLY_WITHOUT = Where(
    "first eighth of the layers, without an importance matrix",
    lambda place: not place.importance and _FIRST_EIGHTH.holds(place),
)
_WITHOUT = Where("without an importance matrix", lambda place: not place.importance)

_GROUPED = Where("four or more queries for a key", lambda place: place.queries_per_key >= 4)
_EXPERTS = Where("four or more experts", lambda place: place.experts >= 4)
_EIGHT = Where("eight experts", lambda place: place.experts == 8)
_EIGHT_MORE_BITS = Where(
    f"eight experts, {_MORE_BITS.text}", lambda place: place.experts == 8 and _MORE_BITS.holds(place)
)
_SINGLE = Where("one matrix in a tensor", lambda place: place.matrices == 1)
_MISFIT = Where("rows that the block of the mix's type does not divide", lambda place: not place.fits)


# Named mixes ----------------------------------------------------------------------------------------------------------

#: Of every mix of llama.cpp from three bits on, for models with eight experts.
_OF_EIGHT = (Rule("attn_kv_b", "Q8_0", _EIGHT), Rule("attn_k", "Q8_0", _EIGHT))
#: Of most of them.
_OUTPUT_OF_EIGHT = (Rule("attn_output", "Q5_K", _EIGHT),)


def _llama(name: str, qtype: str, *rules: Rule, output: str = "Q6_K") -> Mix:
    """A mix of llama.cpp from three bits on."""
    outputs = (Rule("output", "Q8_0", _MISFIT), Rule("output", output))
    return Mix(name, _file_type(name), ggml.ID[qtype], (*outputs, *_OF_EIGHT, *rules))


def _file_type(name: str) -> int | None:
    """``general.file_type`` of a mix of llama.cpp."""
    names = (f"{kind}_{name}" for kind in ("ALL", "MOSTLY"))
    return next((int(LlamaFileType[each]) for each in names if each in LlamaFileType.__members__), None)


def _below_three_bits(name: str, qtype: str, more: str, attn_output: str | None) -> Mix:
    """A mix of one to two bits, some of whose tensors have type `more`."""
    return Mix(
        name,
        _file_type(name),
        ggml.ID[qtype],
        (
            Rule("output", "Q8_0", _MISFIT),
            Rule("output", "Q5_K"),
            Rule("token_embd", more),
            Rule("attn_kv_b", "Q4_K", _GROUPED),
            Rule("attn_kv_b", "Q4_K", _EXPERTS),
            Rule("attn_kv_b", more),
            Rule("attn_k", "Q4_K", _EIGHT),
            Rule("ffn_down*", more, _EARLY),
            *_OUTPUT_OF_EIGHT,
            *((Rule("attn_output", attn_output),) if attn_output else ()),
        ),
    )


def _medium(name: str, qtype: str, *rules: Rule) -> Mix:
    """Q4_K_M and Q5_K_M."""
    more = Rule("attn_kv_b", "Q6_K", _MORE_BITS_OF_VALUES), Rule("ffn_down*", "Q6_K", _MORE_BITS)
    return _llama(name, qtype, *more, *rules)


def _iq4(name: str) -> Mix:
    """IQ4_NL and IQ4_XS."""
    more = Rule("attn_kv_b", "Q5_K", _GROUPED), Rule("ffn_down*", "Q5_K", _EARLY_WITHOUT)
    return _llama(name, name, *more, *_OUTPUT_OF_EIGHT)


def _float(name: str) -> Mix:
    return Mix(name, _file_type(name), ggml.ID[name])


def _of_ik(name: str, file_type: int) -> Mix:
    """A type of ik_llama.cpp for all matrices but the outer ones; `file_type` is of its include/llama.h."""
    embedding = (Rule("token_embd", "Q4_K"),) if bits(ggml.ID[name]) < 4 else ()
    return Mix(name, file_type, ggml.ID[name], (Rule("output", "Q6_K"), *embedding))


_LLAMA_MIXES = (
    *map(_float, ("F32", "F16", "BF16")),
    _llama("Q8_0", "Q8_0", output="Q8_0"),
    _llama("Q4_0", "Q4_0", Rule("ffn_down*", "Q4_1", _EARLY_WITH)),
    _llama("Q4_1", "Q4_1"),
    _llama("Q5_0", "Q5_0", Rule("ffn_down*", "Q5_1", _EARLY_WITH)),
    _llama("Q5_1", "Q5_1"),
    _llama(
        "Q2_K",
        "Q2_K",
        Rule("attn_kv_b", "Q4_K", _GROUPED),
        Rule("attn_kv_b", "Q3_K"),
        Rule("ffn_down*", "Q3_K"),
        *_OUTPUT_OF_EIGHT,
        Rule("attn_output", "Q3_K"),
    ),
    _llama("Q2_K_S", "Q2_K", Rule("attn_kv_b", "Q4_K", _GROUPED), Rule("ffn_down*", "Q4_K", _FIRST_EIGHTH)),
    _llama("Q3_K_S", "Q3_K", *_OUTPUT_OF_EIGHT),
    _llama(
        "Q3_K_M",
        "Q3_K",
        Rule("attn_kv_b", "Q5_K", _FIRST_TWO),
        Rule("attn_kv_b", "Q4_K"),
        Rule("ffn_down*", "Q5_K", _FIRST_SIXTEENTH),
        Rule("ffn_down*", "Q4_K"),
        *_OUTPUT_OF_EIGHT,
        Rule("attn_output", "Q4_K"),
    ),
    _llama(
        "Q3_K_L",
        "Q3_K",
        Rule("attn_kv_b", "Q5_K"),
        Rule("ffn_down*", "Q5_K"),
        # llama.cpp leaves this mix out where it gives attn_output of eight experts more bits.
        Rule("attn_output", "Q3_K", _EIGHT),
        Rule("attn_output", "Q5_K"),
    ),
    _llama(
        "Q4_K_S",
        "Q4_K",
        Rule("attn_kv_b", "Q5_K", _FIRST_FOUR),
        Rule("ffn_down*", "Q5_K", _FIRST_EIGHTH),
        *_OUTPUT_OF_EIGHT,
    ),
    _medium("Q4_K_M", "Q4_K", *_OUTPUT_OF_EIGHT),
    _llama("Q5_K_S", "Q5_K"),
    _medium("Q5_K_M", "Q5_K"),
    _llama("Q6_K", "Q6_K"),
    _below_three_bits("IQ1_S", "IQ1_S", "Q2_K", "IQ2_XXS"),
    _below_three_bits("IQ1_M", "IQ1_M", "Q2_K", "IQ2_XXS"),
    _below_three_bits("IQ2_XXS", "IQ2_XXS", "Q2_K", None),
    _below_three_bits("IQ2_XS", "IQ2_XS", "Q2_K", None),
    _below_three_bits("IQ2_S", "IQ2_XS", "IQ3_S", "IQ3_S"),
    _below_three_bits("IQ2_M", "IQ2_S", "IQ3_S", "IQ3_S"),
    _llama(
        "IQ3_XXS",
        "IQ3_XXS",
        Rule("token_embd", "IQ3_S"),
        Rule("attn_kv_b", "Q4_K", _GROUPED),
        Rule("attn_kv_b", "IQ3_S", _WITHOUT),
        Rule("attn_k", "IQ2_S"),
        Rule("attn_q", "IQ2_S"),
        Rule("ffn_down*", "Q4_K", _EARLY_WITHOUT),
        Rule("ffn_down*", "Q3_K", _WITHOUT),
        *_OUTPUT_OF_EIGHT,
        Rule("attn_output", "IQ3_S"),
        output="Q5_K",
    ),
    _llama(
        "IQ3_XS",
        "IQ3_S",
        Rule("attn_kv_b", "Q4_K", _GROUPED),
        Rule("attn_k", "IQ3_XXS"),
        Rule("attn_q", "IQ3_XXS"),
        Rule("ffn_gate*", "IQ3_XXS", _MIDDLE),
        Rule("ffn_up*", "IQ3_XXS", _MIDDLE),
        *_OUTPUT_OF_EIGHT,
    ),
    _llama("IQ3_S", "IQ3_S", Rule("attn_kv_b", "Q4_K", _GROUPED), *_OUTPUT_OF_EIGHT),
    _llama(
        "IQ3_M",
        "IQ3_S",
        Rule("attn_kv_b", "Q4_K"),
        Rule("ffn_down*", "Q4_K", _FIRST_EIGHTH),
        Rule("ffn_down*", "Q4_K", _EIGHT_MORE_BITS),
        *_OUTPUT_OF_EIGHT,
        Rule("attn_output", "Q4_K"),
    ),
    _iq4("IQ4_NL"),
    _iq4("IQ4_XS"),
    Mix("MXFP4_MOE", _file_type("MXFP4_MOE"), ggml.MXFP4, (Rule("output", "Q8_0"), Rule("*", "Q8_0", _SINGLE))),
    _llama("TQ1_0", "TQ1_0", Rule("token_embd", "Q4_K")),
    _llama("TQ2_0", "TQ2_0", Rule("token_embd", "Q4_K")),
)

#: Mixes of llama.cpp, by the names of ``llama-quantize``.
LLAMA_MIXES: dict[str, Mix] = {mix.name: mix for mix in _LLAMA_MIXES}

#: Types of ik_llama.cpp, as mixes, and their ``general.file_type``.
IK_MIXES: dict[str, Mix] = {
    name: _of_ik(name, file_type)
    for name, file_type in {
        "IQ2_K": 138,
        "IQ3_K": 139,
        "IQ4_K": 140,
        "IQ5_K": 141,
        "IQ6_K": 142,
        "IQ4_KS": 145,
        "IQ2_KS": 147,
        "IQ5_KS": 150,
        "IQ3_KS": 154,
    }.items()
}

#: All mixes by their names.
MIXES = LLAMA_MIXES | IK_MIXES

#: Other names: those of ``llama-quantize``, and that of the type MXFP4 for the mix which has it.
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}


def mix_named(name: str) -> Mix:
    """The mix of a name in any case.

    Raises
    ------
    PymlaError
        There is none.
    """
    upper = name.upper()
    mix = MIXES.get(ALIASES.get(upper, upper))
    if mix is None:
        raise PymlaError(f"unknown type or mix {name!r:.60}; choose {', '.join((*MIXES, *ALIASES))}")
    return mix
