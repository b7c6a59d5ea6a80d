"""What becomes of each tensor of a file: its type, why, and how many bytes it takes."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
from pymla.make.quantize_metadata import SAME_FILE_TYPE, architecture, new_metadata
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
    file_type: int | None  # general.file_type, as in `new_metadata`
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
    prepare: Callable[[set[int]], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Plan:
    """What a recipe makes of a file. Nothing is written.

    Parameters
    ----------
    recipe : made for an importance matrix if there is one
    size : bytes of the file; types are found with which it is not larger (`pymla.make.target_size`), for all matrices
        that the user has no type for
    allow_requantize : whether tensors of quantised types may be quantised again
    prepare : called with the types that are measured for a size, before the first is
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
    file_type = SAME_FILE_TYPE if recipe.mix is None else recipe.mix.file_type
    plan = Plan(file, _rows(file, choices), file_type, importance)
    if size is not None:
        free = {tensor.name for tensor in recipe.free(tensors)}
        measured = _measured(plan, free, layers, allow_requantize, prepare, progress)
        plan = _of_size(plan, measured, size)
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


def _measured(
    plan: Plan,
    names: Collection[str],
    layers: int,
    allow_requantize: bool,
    prepare: Callable[[set[int]], object] | None,
    progress: Callable[[int, int], object] | None,
) -> list[target_size.Measured]:
    """What types cost the tensors of these names."""
    rows = [row for row in plan.rows if row.name in names]
    for row in rows:
        _check_readable(plan.file.tensors[row.name])
        if row.source not in ggml.FLOATS and not allow_requantize:
            raise PymlaError(_twice(plan.file, row))
    tensors = [plan.file.tensors[row.name] for row in rows]
    output = "output.weight" if "output.weight" in plan.file.tensors else "token_embd.weight"
    return target_size.measure(tensors, layers, output, plan.importance, prepare=prepare, progress=progress)


def _of_size(plan: Plan, measured: Sequence[target_size.Measured], size: int) -> Plan:
    """A plan in which measured tensors have types with which the file is not larger than a size."""
    names = {each.name for each in measured}
    others = [row for row in plan.rows if row.name not in names]
    fixed = plan.header_bytes + sum(gguf_writer.padded(row.nbytes, GGUF_DEFAULT_ALIGNMENT) for row in others)
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
            refusals.append(_twice(plan.file, row))
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


def _twice(file: ModelFile, row: Row) -> str:
    """Why a quantised tensor is not quantised again."""
    return (
        f"{file.path}: {row.name} is {ggml.NAME[row.source]} already, and quantised twice is worse; take a file "
        "in F32, F16 or BF16, or give `allow_requantize`"
    )


def _check_readable(tensor: FileTensor) -> None:
    """Raise PymlaError for a tensor whose type holds no weights."""
    if tensor.qtype not in FORMATS and tensor.qtype not in INTERLEAVED:
        raise PymlaError(
            f"{tensor.path}: tensor {tensor.name} has type {ggml.NAME[tensor.qtype]}, which cannot be read as weights"
        )
