"""Recipes: the type of every tensor of a model, and the reason for it.

A recipe is a named mix (`pymla.make.mixes`) and the user's own rules before it. In this order, the first that holds
gives a tensor its type:

1. Biases, norms, routers and whatever else is no matrix keep the type that they have.
2. The types that are asked for the embeddings and for the output matrix.
3. The user's rules, ``REGEX = TYPE``: the first whose expression is found in the name.
4. The mix, or one type for all where that is asked for.
5. Protection: mixes of fewer than four bits give the matrices that make keys and values, and shared experts, more bits
   than llama.cpp does.

Where the block of the type does not divide a row, `pymla.make.fallbacks` has another type.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files.textfile import decode
from pymla.make.fallbacks import fitting_type
from pymla.make.mixes import Choice, Mix, Model, TensorInfo, Walk, bits, mix_named, walk_order
from pymla.models.families import FAMILIES
from pymla.printable import shown

__all__ = ["COPY", "TYPES", "Choice", "Recipe", "Rule", "TensorInfo", "needs_importance", "read_rules", "recipe_for"]

#: The name that stands for no change of any type.
COPY = "COPY"

#: Types that tensors can be given, by name.
TYPES = {
    ggml.NAME[qtype]: qtype
    for qtype in (
        *(ggml.F32, ggml.F16, ggml.BF16),
        *(ggml.Q4_0, ggml.Q4_1, ggml.Q5_0, ggml.Q5_1, ggml.Q6_0, ggml.Q8_0),
        *(ggml.Q2_K, ggml.Q3_K, ggml.Q4_K, ggml.Q5_K, ggml.Q6_K),
        *(ggml.IQ1_S, ggml.IQ1_M, ggml.IQ2_XXS, ggml.IQ2_XS, ggml.IQ2_S, ggml.IQ3_XXS, ggml.IQ3_S),
        *(ggml.IQ4_NL, ggml.IQ4_XS, ggml.MXFP4, ggml.NVFP4, ggml.TQ1_0, ggml.TQ2_0),
        *(ggml.IQ2_K, ggml.IQ3_K, ggml.IQ4_K, ggml.IQ5_K, ggml.IQ6_K),
        *(ggml.IQ2_KS, ggml.IQ3_KS, ggml.IQ4_KS, ggml.IQ5_KS),
    )
}

#: The least type of tensors in mixes of fewer than four bits, by the stem of their name. Every token passes through all
#: of them, and what is made of `attn_kv_a_mqa` stays in the cache; in DeepSeek V3 they are 1 % of the weights.
PROTECTED = {
    **dict.fromkeys(("attn_k_b", "attn_v_b", "attn_kv_b", "attn_kv_a_mqa"), ggml.Q8_0),
    "ffn_down_shexp": ggml.Q6_K,
    **dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp"), ggml.Q5_K),
}

#: Types of so few bits that llama.cpp makes them with an importance matrix only (``tensor_requires_imatrix``).
NEED_IMPORTANCE = (ggml.IQ1_S, ggml.IQ1_M, ggml.IQ2_XXS, ggml.IQ2_XS, ggml.IQ2_S, ggml.IQ3_XXS)

#: The embeddings and the output matrix, which have no importance matrix and need none.
OUTER = ("token_embd.weight", "output.weight")


class Rule(NamedTuple):
    """A rule of the user."""

    pattern: re.Pattern[str]  # searched for in a tensor's name, in any case
    qtype: int
    where: str  # for people, such as "recipe line 3"


@dataclass(frozen=True)
class Recipe:
    """What becomes of the tensors of a model.

    Attributes
    ----------
    mix : for tensors without a rule; None: every tensor is copied
    rules : the user's, in order
    output_type, token_embedding_type : ggml types of ``output.weight`` and ``token_embd.weight``
    pure : the mix's own type for all tensors without a rule
    exact_mix : llama.cpp's choice, without more bits for the matrices that make keys and values
    leave_output : ``output.weight`` keeps its type
    importance : whether there is an importance matrix: llama.cpp's mixes ask
    """

    mix: Mix | None
    rules: tuple[Rule, ...] = ()
    output_type: int | None = None
    token_embedding_type: int | None = None
    pure: bool = False
    exact_mix: bool = False
    leave_output: bool = False
    importance: bool = False

    def choose(
        self, tensors: Sequence[TensorInfo], architecture: str, layers: int, queries_per_key: int = 1
    ) -> dict[str, Choice]:
        """The type of every tensor.

        Parameters
        ----------
        tensors : all of the model
        architecture : ``general.architecture``
        layers : ``block_count``
        queries_per_key : ``head_count`` by ``head_count_kv``; llama.cpp's mixes ask for it where a file has kv_b

        Raises
        ------
        PymlaError
            The architecture is not one of those with MLA whose mixes are known.
        """
        if architecture not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise PymlaError(f"architecture {shown(architecture)}: types are known for the tensors of {known} only")
        model = Model.of(tensors, layers, queries_per_key, self.importance)
        walk = None if self.mix is None else Walk(self.mix, model)
        chosen = {tensor.name: self._choose(tensor, walk, model.tied) for tensor in walk_order(tensors)}
        return {tensor.name: chosen[tensor.name] for tensor in tensors}

    def free(self, tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
        """The matrices for which neither a rule nor an option of the user has a type."""
        tied = "output.weight" not in {tensor.name for tensor in tensors}
        return [
            tensor
            for tensor in tensors
            if self._kept(tensor) is None and not self._asked(tensor.name, tied) and not self._ruled(tensor.name)
        ]

    def unused(self, tensors: Iterable[TensorInfo]) -> list[Rule]:
        """The user's rules that match no tensor whose type they could change."""
        names = [tensor.name for tensor in tensors if self._kept(tensor) is None]
        return [rule for rule in self.rules if not any(rule.pattern.search(name) for name in names)]

    def _choose(self, tensor: TensorInfo, walk: Walk | None, tied: bool) -> Choice:
        kept = self._kept(tensor)
        if kept is not None:
            return Choice(tensor.qtype, kept)
        if walk is None or self.mix is None:
            return Choice(tensor.qtype, "copied")
        choice = self._asked(tensor.name, tied) or self._ruled(tensor.name)
        if choice is None and self.pure:
            choice = Choice(self.mix.qtype, f"pure {ggml.NAME[self.mix.qtype]}")
        if choice is None:
            choice = self._protected(tensor, walk.choose(tensor))
        return _fitting(tensor, choice)

    def _kept(self, tensor: TensorInfo) -> str | None:
        """Why a tensor is not quantised: ``tensor_allows_quantization``, and the weights of the indexer's heads, which
        are as small as a vector and steer what is attended."""
        name = tensor.name
        if not name.endswith(".weight"):
            return "no matrix of weights"
        if max((1, *tensor.shape[:-1])) == 1:
            return "a vector"
        if "_norm.weight" in name:
            return "a norm"
        if "ffn_gate_inp.weight" in name:
            return "a router"
        if name.endswith("indexer.proj.weight") and not self.exact_mix:
            return "weights of the indexer's heads"
        if name == "output.weight" and self.leave_output:
            return "the output is left as it is"
        return None

    def _asked(self, name: str, tied: bool) -> Choice | None:
        """The type that is asked for the embeddings or for the output matrix, which may be one."""
        if name == "token_embd.weight" and self.token_embedding_type is not None:
            return Choice(self.token_embedding_type, "asked for the embeddings")
        if name == ("token_embd.weight" if tied else "output.weight") and self.output_type is not None:
            return Choice(self.output_type, "asked for the output")
        return None

    def _ruled(self, name: str) -> Choice | None:
        for rule in self.rules:
            if rule.pattern.search(name):
                return Choice(rule.qtype, rule.where)
        return None

    def _protected(self, tensor: TensorInfo, choice: Choice) -> Choice:
        """The choice of a mix, or the type that protects the tensor from few bits."""
        assert self.mix is not None
        least = PROTECTED.get(tensor.name.split(".")[-2])
        few = bits(self.mix.qtype) < 4 or self.mix.qtype == ggml.MXFP4
        if least is None or not few or self.exact_mix or bits(choice.qtype) >= bits(least):
            return choice
        return Choice(least, f"protected, {ggml.NAME[choice.qtype]} in the mix {self.mix.name} of llama.cpp")


def _fitting(tensor: TensorInfo, choice: Choice) -> Choice:
    """A choice whose block divides the rows."""
    qtype = fitting_type(choice.qtype, tensor.shape)
    if qtype == choice.qtype:
        return choice
    block, columns = ggml.BLOCK_SIZE[choice.qtype], tensor.shape[-1]
    why = f"{columns:,} columns are no multiple of {block}: {ggml.NAME[qtype]} for {ggml.NAME[choice.qtype]}"
    return Choice(qtype, f"{choice.reason}; {why}")


def needs_importance(name: str, qtype: int, recipe: Recipe) -> bool:
    """Whether llama.cpp makes a tensor of a type with an importance matrix only."""
    if name in OUTER:
        return False
    small = recipe.mix is not None and recipe.mix.name == "Q2_K_S"
    return qtype in NEED_IMPORTANCE or (small and qtype == ggml.Q2_K)


def recipe_for(
    name: str,
    *,
    tensor_types: Sequence[str] = (),
    recipe: Path | None = None,
    output_type: str | None = None,
    token_embedding_type: str | None = None,
    pure: bool = False,
    exact_mix: bool = False,
    leave_output: bool = False,
    importance: bool = False,
) -> Recipe:
    """The recipe that options describe; see `Recipe`.

    Parameters
    ----------
    name : a type, a mix or "COPY", in any case
    tensor_types : rules ``REGEX=TYPE``, which come before those of the file
    recipe : a file of rules (`read_rules`)

    Raises
    ------
    PymlaError
        An unknown name; a rule that is none; a file that cannot be read; rules or types beside COPY.
    """
    rules = [_parse(text, "`tensor_types`", f"rule {shown(text)}") for text in tensor_types]
    if recipe is not None:
        rules += read_rules(recipe)
    types = [
        None if each is None else _type(each, argument)
        for each, argument in ((output_type, "`output_type`"), (token_embedding_type, "`token_embedding_type`"))
    ]
    if name.upper() == COPY and (rules or pure or types != [None, None]):
        raise PymlaError("COPY changes no type: give it without other types and rules")
    return Recipe(
        mix=None if name.upper() == COPY else mix_named(name),
        rules=tuple(rules),
        output_type=types[0],
        token_embedding_type=types[1],
        pure=pure,
        exact_mix=exact_mix,
        leave_output=leave_output,
        importance=importance,
    )


def read_rules(path: Path) -> list[Rule]:
    """The rules of a file.

    A line is ``REGEX = TYPE``. A ``#`` and what follows it is a comment, and empty lines mean nothing.

    Raises
    ------
    PymlaError
        The file cannot be read, or a line is no rule: the message names file and line.
    """
    try:
        text = decode(path.read_bytes(), path)
    except (OSError, ValueError) as error:  # a path may have a character that none can have
        raise PymlaError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if line:
            rules.append(_parse(line, f"{path}: line {number}", f"recipe line {number}"))
    return rules


def _parse(text: str, source: str, where: str) -> Rule:
    """The rule that a text is; errors name `source`."""
    # An expression may have "=" in it, a type has not.
    expression, separator, name = (part.strip() for part in text.rpartition("="))
    if not (separator and expression and name):
        raise PymlaError(f"{source}: {shown(text)} is no rule; write REGEX = TYPE, as in ffn_down_exps = Q4_K")
    qtype = _type(name, source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python will read some expressions in another way one day
            pattern = re.compile(expression, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise PymlaError(f"{source}: {shown(expression)} is no regular expression: {error}") from error
    return Rule(pattern, qtype, where)


def _type(name: str, source: str) -> int:
    qtype = TYPES.get(name.upper())
    if qtype is None:
        raise PymlaError(f"{source}: unknown type {shown(name)}; choose {', '.join(TYPES)}")
    return qtype
