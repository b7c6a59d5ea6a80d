"""What becomes of each tensor of a file: its type, why, and how many bytes it takes."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from gguf import GGUF_DEFAULT_ALIGNMENT, Keys

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files import gguf_writer
from pymla.files.gguf_reader import ModelFile
from pymla.files.gguf_reader import TensorInfo as FileTensor
from pymla.files.gguf_writer import NewTensor
from pymla.make import target_size
from pymla.make.importance import Importance
from pymla.make.mixes import Choice, TensorInfo
from pymla.make.model_metadata import FILE_TYPES
from pymla.make.quantize_metadata import architecture, new_metadata
from pymla.make.recipe import OUTER, Recipe, needs_importance
from pymla.reference.formats import FORMATS, INTERLEAVED


class Row(NamedTuple):
    """What becomes of a tensor."""

    name: str
    shape: tuple[int, ...]  # NumPy order
    source: int  # its ggml type before
    source_bytes: int
    qtype: int
    nbytes: int
    reason: str

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


class Plan(NamedTuple):
    """What becomes of a file."""

    file: ModelFile
    rows: tuple[Row, ...]  # in the order of the file
    file_type: int | None  # general.file_type; None: left out
    importance: Importance | None
    refusals: tuple[str, ...] = ()  # why it cannot be carried out
    notes: tuple[str, ...] = ()  # for the user
    found: target_size.Found | None = None  # where types were found for a size

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.nbytes for row in self.rows)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors before."""
        return sum(row.source_bytes for row in self.rows)

    @property
    def weights(self) -> int:
        return sum(row.weights for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, self.weights)

    @property
    def header_bytes(self) -> int:
        """Bytes in front of the tensors, if the file is a single one."""
        tensors = [NewTensor(row.name, row.shape, row.qtype) for row in self.rows]
        metadata = new_metadata(self.file, self.file_type, self.importance)
        return len(gguf_writer.header({Keys.General.ARCHITECTURE: architecture(self.file), **metadata}, tensors))

    @property
    def file_bytes(self) -> int:
        """Bytes of the file, if it is a single one."""
        return self.header_bytes + sum(gguf_writer.padded(row.nbytes, GGUF_DEFAULT_ALIGNMENT) for row in self.rows)


def make_plan(
    file: ModelFile,
    recipe: Recipe,
    importance: Importance | None = None,
    *,
    size: int | None = None,
    allow_requantize: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Plan:
    """What a recipe makes of a file. Nothing is written.

    Parameters
    ----------
    recipe : made for an importance matrix if there is one
    size : bytes of the file; types are found with which it is not larger (`pymla.make.target_size`), for all matrices
        that the user has no type for
    allow_requantize : whether tensors of quantised types may be quantised again
    progress : called with (tensors measured, tensors in all) where types are found for a size

    Raises
    ------
    PymlaError
        The architecture is not one whose types are known, the metadata lacks what the recipe asks, a tensor cannot be
        read, the importance matrix is that of another model, or the size is too small.
    """
    tensors = [TensorInfo(each.name, each.shape, each.qtype) for each in file.tensors.values()]
    arch = architecture(file)
    layers = file.get(Keys.LLM.BLOCK_COUNT.format(arch=arch), int)
    choices = recipe.choose(tensors, arch, layers, _queries_per_key(file, arch))
    file_type = file.get(Keys.General.FILE_TYPE, int, None) if recipe.mix is None else recipe.mix.file_type
    plan = Plan(file, _rows(file, choices), file_type, importance)
    if size is not None:
        plan = _of_size(plan, {tensor.name for tensor in recipe.free(tensors)}, size, layers, progress)
    plan = _checked(plan, recipe, allow_requantize)
    unused = tuple(f"{rule.where} matches no tensor that is quantised" for rule in recipe.unused(tensors))
    return plan._replace(notes=plan.notes + unused)


def _queries_per_key(file: ModelFile, arch: str) -> int:
    """Heads of queries for each head of keys, as llama.cpp counts them; 0 where there are no heads of keys."""
    heads = file.get(Keys.Attention.HEAD_COUNT.format(arch=arch), int, 0)
    keys = file.get(Keys.Attention.HEAD_COUNT_KV.format(arch=arch), int, heads)
    return heads // keys if keys > 0 else 0


def _rows(file: ModelFile, choices: Mapping[str, Choice]) -> tuple[Row, ...]:
    rows = []
    for tensor in file.tensors.values():
        qtype, reason = choices[tensor.name]
        nbytes = tensor.data.nbytes if qtype == tensor.qtype else ggml.tensor_bytes(qtype, tensor.shape)
        rows.append(Row(tensor.name, tensor.shape, tensor.qtype, tensor.data.nbytes, qtype, nbytes, reason))
    return tuple(rows)


def _of_size(
    plan: Plan, names: Collection[str], size: int, layers: int, progress: Callable[[int, int], object] | None
) -> Plan:
    """A plan in which tensors of these names have types with which the file is not larger than a size."""
    tensors = [tensor for tensor in plan.file.tensors.values() if tensor.name in names]
    for tensor in tensors:
        _check_readable(tensor)
    output = "output.weight" if "output.weight" in plan.file.tensors else "token_embd.weight"
    measured = target_size.measure(tensors, layers, output, plan.importance, progress)
    # Every tensor may be followed by bytes up to the next multiple of the alignment.
    fixed = plan.header_bytes + GGUF_DEFAULT_ALIGNMENT * len(plan.rows)
    fixed += sum(row.nbytes for row in plan.rows if row.name not in names)
    found = target_size.choose(measured, size - fixed)
    choices = {row.name: Choice(row.qtype, row.reason) for row in plan.rows} | found.choices
    rows = _rows(plan.file, choices)
    return plan._replace(rows=rows, file_type=FILE_TYPES.get(_type_of_most(rows)), found=found)


def _type_of_most(rows: Iterable[Row]) -> int:
    """The type of most weights."""
    weights: Counter[int] = Counter()
    for row in rows:
        weights[row.qtype] += row.weights
    return weights.most_common(1)[0][0]


def _checked(plan: Plan, recipe: Recipe, allow_requantize: bool) -> Plan:
    """A plan with the reasons for which it cannot be carried out, and notes."""
    refusals, without = [], []
    for row in plan.rows:
        if row.qtype == row.source:
            continue
        _check_readable(plan.file.tensors[row.name])
        if row.source not in ggml.FLOATS and not allow_requantize:
            refusals.append(
                f"{plan.file.path}: {row.name} is {ggml.NAME[row.source]} already, and what is quantised twice is "
                "worse; take a file in F32, F16 or BF16, or give `allow_requantize`"
            )
        has_importance = plan.importance is not None and plan.importance.columns(row.name, row.shape) is not None
        if needs_importance(row.name, row.qtype, recipe) and not has_importance:
            reason = "" if plan.importance is None else f", and {plan.importance.source} has nothing for it"
            refusals.append(f"{row.name}: {ggml.NAME[row.qtype]} needs an importance matrix (`imatrix`){reason}")
        if not has_importance and row.name not in OUTER:
            without.append(row.name)
    notes = []
    if without and plan.importance is not None:
        more = f" and {len(without) - 1} more tensors" if len(without) > 1 else ""
        notes.append(f"{plan.importance.source}: has nothing for {without[0]}{more}, whose weights count alike")
    return plan._replace(refusals=tuple(refusals), notes=tuple(notes))


def _check_readable(tensor: FileTensor) -> None:
    """Raise PymlaError for a tensor whose type holds no weights."""
    if tensor.qtype not in FORMATS and tensor.qtype not in INTERLEAVED:
        raise PymlaError(
            f"{tensor.path}: tensor {tensor.name} has type {ggml.NAME[tensor.qtype]}, which cannot be read as weights"
        )
