"""Hugging Face checkpoints to GGUF files.

The file is written in one pass, straight to the wanted type of each tensor, in pieces of `PIECE_WEIGHTS` weights or a
row: memory holds some of them, whatever the size of a tensor (`pymla.make.writing`).
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pymla import ggml
from pymla.cpu.quantise import QUANTISERS
from pymla.engine.filecheck import examine
from pymla.errors import PymlaError
from pymla.files import gguf_writer
from pymla.files.gguf_header import Part
from pymla.files.gguf_output import Progress, Refused, Resume
from pymla.files.gguf_reader import ModelFile
from pymla.files.gguf_writer import Metadata, Value
from pymla.make.checkpoint_tensors import Plan
from pymla.make.hub_config import HubConfig
from pymla.make.hub_quantisation import read_quantisation
from pymla.make.hub_tokenizer import END_KEYS, HubTokenizer, read_tokenizer
from pymla.make.hub_weights import HubWeights
from pymla.make.importance import Importance
from pymla.make.model_metadata import LAYOUTS
from pymla.make.quantize_metadata import importance_keys
from pymla.make.recipe import Choice, Recipe, TensorInfo, needs_importance, recipe_for
from pymla.make.writing import Pieces, Source, write_model
from pymla.models.config import ModelConfig
from pymla.text.tokenizer import Tokenizer

__all__ = ["AUTO", "LAYOUTS", "Conversion", "Prepared", "convert", "prepare"]

#: The type that stands for the checkpoint's own.
AUTO = "auto"

# Files of a Hugging Face folder that hold a model.
_SOURCES = (".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".py")

# Keys of sizes that the choice of types depends on, behind the architecture.
_SIZES = ("block_count", "attention.head_count", "attention.head_count_kv")


class Conversion(NamedTuple):
    """What `convert` wrote."""

    path: Path  # the file, or the first part
    nbytes: int  # of all parts
    notes: tuple[str, ...]  # for the user: tensors kept in another type, layers left out
    parts: tuple[Path, ...]


class Prepared(NamedTuple):
    """A conversion that can be carried out: nothing has been written, and no weight read."""

    folder: Path
    architecture: str
    metadata: Metadata
    sources: Sequence[Source]
    choices: Mapping[str, Choice]  # the type of each tensor, and why
    copies: Mapping[str, Pieces]  # tensors that the checkpoint has in their type
    importance: Importance | None
    inputs: Sequence[Path]  # all files that are read
    notes: tuple[str, ...]

    def write(
        self,
        path: str | Path,
        *,
        split: int | None = None,
        note: Callable[[str], object] = lambda text: None,
        progress: Progress | None = None,
    ) -> Conversion:
        """Write the file, or the parts; see `convert`."""
        path = Path(path)
        types = {name: choice.qtype for name, choice in self.choices.items()}
        try:
            parts = write_model(
                path,
                self.architecture,
                self.metadata,
                self.sources,
                types,
                importance=self.importance,
                copies=self.copies,
                split=split,
                resume=Resume(self.inputs, note, partial(_loaded, self.folder)),
                progress=progress,
            )
        except Refused as error:
            raise PymlaError(f"{self.folder}: {error}") from error
        return Conversion(parts[0], sum(part.stat().st_size for part in parts), self.notes, tuple(parts))


def convert(
    folder: str | Path,
    path: str | Path,
    *,
    split: int | None = None,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress | None = None,
    **options: Any,
) -> Conversion:
    """Write a checkpoint as a GGUF file, or several. They appear under their names when all are complete.

    A run that was interrupted, after it had written `pymla.files.gguf_output.RECORD_BYTES`, goes on where it stopped if
    it is given the same files and options.

    Parameters
    ----------
    folder : Hugging Face folder
    path : the GGUF file to write
    split : bytes of a part, at most; the parts are named ``NAME-00001-of-0000N.gguf``. None: one file
    note : told, in one line each, what becomes of an interrupted run
    progress : called with (bytes written, bytes in all, the tensor that is being written)
    **options : those of `prepare`

    Returns
    -------
    Conversion

    Raises
    ------
    PymlaError
        What `prepare` raises; a weight that is infinite, NaN or too large for its type; an output that cannot be
        written or is read, or not enough free disk.
    """
    return prepare(folder, **options).write(path, split=split, note=note, progress=progress)


def prepare(
    folder: str | Path,
    *,
    qtype: str = AUTO,
    tensor_types: Sequence[str] = (),
    recipe: str | Path | None = None,
    imatrix: str | Path | None = None,
    layout: str = "split",
    mtp: bool | None = None,
    pre: str | None = None,
    name: str | None = None,
) -> Prepared:
    """Look at a checkpoint, and choose the type of every tensor. Of weights, only the headers of files are read.

    Parameters
    ----------
    folder : Hugging Face folder: config.json, a tokenizer, safetensors in one file or several. Weights are floats of 16
        bits and more, or quantised in a way of `pymla.files.checkpoint_encodings`
    qtype : a type or a mix of types by its name in any case, such as "Q8_0" or "Q4_K_M". "auto" is BF16 or F16,
        whichever the first matrix has that is stored in one of them, and F16 if none is, as with llama.cpp's converter;
        experts in MXFP4 stay as they are. Vectors, routers and the indexer's weights of heads are F32
    tensor_types : rules ``REGEX=TYPE`` for tensors whose name the expression is found in
    recipe : a file of such rules (`pymla.make.recipe.read_rules`)
    imatrix : an importance matrix
    layout : how W_kv_b is stored: "split" (k_b and v_b; llama.cpp), "kv_b" (whole; llama.cpp before April 2025,
        ik_llama.cpp) or "all" (all three; ik_llama.cpp)
    mtp : whether layers that predict further tokens are kept; by default those of V3.2 and GLM are
    pre : name of the pre-tokenizer; found out by default
    name : the model's name in the metadata; the folder's by default

    Returns
    -------
    Prepared

    Raises
    ------
    PymlaError
        An unknown type or layout; a folder that is not such a checkpoint, is incomplete or damaged, says something
        that GGUF cannot, or makes a file that would not load.
    """
    _check_arguments(qtype, layout, pre, name)
    auto = qtype.lower() == AUTO
    rules: dict[str, Any] = {"tensor_types": tensor_types, "recipe": None if recipe is None else Path(recipe)}
    recipe_for("F16" if auto else qtype, **rules)  # refuses unknown names before anything is read
    folder = Path(folder)
    config = HubConfig(folder / "config.json")
    plan = Plan(config, HubWeights(folder, read_quantisation(config)), layout, mtp)
    sources = list(plan.sources())
    plan.check_leftovers()
    importance = None if imatrix is None else Importance.read(imatrix)
    chosen = recipe_for(auto_type(plan, sources) if auto else qtype, importance=importance is not None, **rules)
    if chosen.mix is None:
        raise PymlaError(f"{qtype} is no type of a new file; choose a type or a mix")
    tokenizer = read_tokenizer(config, pre)
    # A folder's name may hold bytes that are not Unicode.
    name = (name or folder.resolve().name).encode(errors="replace").decode()
    metadata = plan.metadata(name, chosen.mix.file_type) | tokenizer.metadata()
    choices = _choices(chosen, plan, sources, metadata, auto)
    _check_choices(choices, chosen, sources, importance)
    if importance is not None:
        metadata |= importance_keys(importance)
    for key, value in metadata.items():
        _check_text(folder, key, value)
    loaded = _check_metadata(folder, plan.architecture, metadata)
    notes = (*plan.notes, *_notes_on_types(chosen, sources, choices), *_notes_on_tokens(tokenizer, loaded))
    copies = {
        source.name: partial(plan.stored_pieces, source.name)
        for source in sources
        if plan.stored_type(source.name) == choices[source.name].qtype
    }
    inputs = sorted(path for path in folder.iterdir() if path.suffix in _SOURCES)
    inputs += [] if imatrix is None else [Path(imatrix)]
    return Prepared(folder, plan.architecture, metadata, sources, choices, copies, importance, inputs, notes)


def _check_arguments(qtype: object, layout: object, pre: object, name: object) -> None:
    if layout not in LAYOUTS:
        raise PymlaError(f"unknown layout {layout!r}; choose {', '.join(LAYOUTS)}")
    if not isinstance(qtype, str):
        raise PymlaError(f"unknown type {qtype!r:.60} as `qtype`; give the name of a type or a mix")
    for argument, value in (("pre", pre), ("name", name)):
        if not isinstance(value, str | None):
            raise PymlaError(f"`{argument}` is {value!r}; a string is expected")


def auto_type(plan: Plan, sources: Iterable[Source]) -> str:
    """The type that llama.cpp's converter takes for "auto": BF16 or F16, whichever the first matrix has that is stored
    in one of them, or F16."""
    stored = (plan.stored_type(source.name) for source in sources if len(source.shape) > 1)
    return ggml.NAME[next((qtype for qtype in stored if qtype in (ggml.BF16, ggml.F16)), ggml.F16)]


def _choices(
    recipe: Recipe, plan: Plan, sources: Sequence[Source], metadata: Metadata, auto: bool
) -> dict[str, Choice]:
    """The type of each tensor."""
    arch = plan.architecture
    sizes = {key: metadata.get(f"{arch}.{key}") for key in _SIZES}
    layers, heads, keys = (value if isinstance(value, int) else 0 for value in sizes.values())
    tensors = [TensorInfo(source.name, source.shape) for source in sources]
    found = recipe.choose(tensors, arch, layers, heads // keys if keys else 0)
    if auto:
        free = [name for name in found if not any(rule.pattern.search(name) for rule in recipe.rules)]
        as_stored = Choice(ggml.MXFP4, "as in the checkpoint")
        found |= {name: as_stored for name in free if plan.stored_type(name) == ggml.MXFP4}
    return found


def _check_choices(
    choices: Mapping[str, Choice], recipe: Recipe, sources: Iterable[Source], importance: Importance | None
) -> None:
    """Raise PymlaError for a type that cannot be made."""
    for source in sources:
        qtype = choices[source.name].qtype
        if qtype not in QUANTISERS:
            raise PymlaError(f"tensor {source.name}: weights cannot be quantised to {ggml.NAME[qtype]}")
        if needs_importance(source.name, qtype, recipe) and (
            importance is None or importance.columns(source.name, source.shape) is None
        ):
            lacking = "give one as `imatrix`" if importance is None else f"{importance.source} has none for it"
            raise PymlaError(f"tensor {source.name}: {ggml.NAME[qtype]} needs an importance matrix; {lacking}")


def _notes_on_types(recipe: Recipe, sources: Sequence[Source], choices: Mapping[str, Choice]) -> list[str]:
    """Notes for tensors that are F16 because no type of blocks fits them, and for rules that match nothing."""
    f16 = [(name, choice) for name, choice in choices.items() if choice.qtype == ggml.F16]
    notes = [f"{name}: {choice.reason}" for name, choice in f16 if "no multiple of" in choice.reason]
    unused = recipe.unused([TensorInfo(source.name, source.shape) for source in sources])
    return notes + [f"{rule.where} matches no tensor that is quantised" for rule in unused]


def _notes_on_tokens(tokenizer: HubTokenizer, loaded: Tokenizer) -> list[str]:
    """Notes of the tokenizer, and for tokens that end a text of which the file cannot say so."""
    return [
        *tokenizer.notes,
        *(
            f"token {i}, {tokenizer.tokens[i]!r:.60}, ends a text, too, and GGUF has no key for it; give it as `stop`"
            for i in tokenizer.ends[len(END_KEYS) :]
            if i not in loaded.eos_ids
        ),
    ]


def _check_text(folder: Path, key: str, value: Value) -> None:
    """Raise PymlaError for text that JSON can hold and UTF-8 cannot: halves of characters."""
    for text in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
        if isinstance(text, str) and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise PymlaError(f"{folder}: {key} has {text!r:.60}, which is not valid Unicode") from error


def _check_metadata(folder: Path, architecture: str, metadata: Metadata) -> Tokenizer:
    """Check metadata as `pymla.load` does, before hours of writing. Returns the tokenizer that is in it."""
    try:
        with tempfile.TemporaryDirectory(prefix="pymla-") as place:
            path = Path(place) / "metadata.gguf"
            gguf_writer.write(path, architecture, metadata, ())
            return _loaded(folder, [path])
    except OSError as error:
        place = error.filename or tempfile.gettempdir()
        raise PymlaError(f"{place}: cannot be written ({error.strerror or error})") from error


def _loaded(folder: Path, parts: Sequence[Path]) -> Tokenizer:
    """Check a file, or all parts of one, as `pymla.load` does before it computes anything; it may have metadata only.

    Returns
    -------
    Tokenizer
        The tokenizer of the file.

    Raises
    ------
    PymlaError
        `pymla.load` would refuse the file.
    """
    try:
        file = ModelFile(parts[0], [Part(part) for part in parts], {})
        if file.tensors:
            return examine(file, cache_type="f32").check()[1]  # of all types, f32 holds the rows of every model
        ModelConfig.from_gguf(file)
        return Tokenizer.from_gguf(file)
    except PymlaError as error:
        reason = str(error)
        for part in parts:
            reason = reason.removeprefix(f"{part}: ")
        raise PymlaError(f"{folder}: cannot be converted, the file would not load: {reason}") from error
