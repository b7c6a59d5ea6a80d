"""Hugging Face checkpoints to GGUF files.

The file is written piece by piece: memory holds some rows of one tensor.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.engine.filecheck import examine
from pymla.errors import PymlaError
from pymla.files import gguf_writer, outputs
from pymla.files.checkpoint import Checkpoint
from pymla.files.gguf_reader import ModelFile
from pymla.files.gguf_writer import NewTensor, Value
from pymla.make.checkpoint_tensors import Plan
from pymla.make.hub_config import HubConfig
from pymla.make.hub_tokenizer import END_KEYS, read_tokenizer
from pymla.make.model_metadata import FILE_TYPES, LAYOUTS
from pymla.make.writing import Source
from pymla.models.config import ModelConfig
from pymla.reference.quant import dequantise, quantise
from pymla.text.tokenizer import Tokenizer

#: Types of the matrices, as named on the command line.
QTYPES = {"f32": ggml.F32, "f16": ggml.F16, "bf16": ggml.BF16, "q8_0": ggml.Q8_0, "q4_0": ggml.Q4_0}

# Files of a Hugging Face folder that hold a model.
_SOURCES = (".safetensors", ".json", ".jinja", ".model")


class Conversion(NamedTuple):
    """The file that `convert` wrote."""

    path: Path
    nbytes: int
    notes: tuple[str, ...]  # for the user: tensors kept in another type, layers left out


def convert(
    folder: str | Path,
    path: str | Path,
    *,
    qtype: str = "q8_0",
    layout: str = "split",
    mtp: bool | None = None,
    pre: str | None = None,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write a checkpoint as a GGUF file. The file appears under its name when it is complete.

    Norms, biases and the router stay F32. With "q4_0" the output matrix (the embeddings, where the two are one) is
    Q8_0: there an error of 4 bits costs most. A matrix whose columns are no multiple of the block becomes F16.

    Parameters
    ----------
    folder : Hugging Face folder: config.json, tokenizer.json, safetensors in one file or several; float8 weights with
        scales per block (as DeepSeek V3 is published) are read, too
    path : the GGUF file to write
    qtype : type of the matrices: "f32", "f16", "bf16", "q8_0" or "q4_0"
    layout : how W_kv_b is stored: "kv_b" (whole; llama.cpp before April 2025, ik_llama.cpp), "split" (k_b and v_b;
        llama.cpp since) or "all" (all three; ik_llama.cpp)
    mtp : whether layers that predict further tokens are kept; by default those of V3.2 and GLM are
    pre : name of the pre-tokenizer; found out by default
    name : the model's name in the metadata; the folder's by default
    progress : called with (bytes written, bytes in all)

    Returns
    -------
    Conversion

    Raises
    ------
    PymlaError
        An unknown type or layout; a folder that is not such a checkpoint, is incomplete or damaged, says something
        that GGUF cannot, or makes a file that would not load; a weight that the type cannot hold; an output that cannot
        be written or is read, or not enough free disk.
    """
    _check_arguments(qtype, layout, pre, name)
    folder, path = Path(folder), Path(path)
    config = HubConfig(folder / "config.json")
    plan = Plan(config, Checkpoint(folder, config.fp8_block()), layout, mtp)
    outputs.check({"the output": path}, (each for each in folder.iterdir() if each.suffix in _SOURCES))
    sources = list(plan.sources())
    types = _types(sources, QTYPES[qtype], plan.notes)
    tensors = [_quantised(source, types[source.name], folder) for source in sources]
    plan.check_leftovers()
    outputs.check_space(path, sum(tensor.nbytes for tensor in tensors))
    tokenizer = read_tokenizer(config, pre)
    # A folder's name may hold bytes that are not Unicode.
    name = (name or folder.resolve().name).encode(errors="replace").decode()
    metadata = plan.metadata(name, FILE_TYPES[QTYPES[qtype]]) | tokenizer.metadata()
    for key, value in metadata.items():
        _check_text(folder, key, value)
    with outputs.replacing(path) as part:
        # Wrong metadata is found now, and not after hours of writing.
        gguf_writer.write(part, plan.architecture, metadata, ())
        _check_loads(part, folder)
        gguf_writer.write(part, plan.architecture, metadata, tensors, progress)
        loaded = _check_loads(part, folder)
    plan.notes += tokenizer.notes
    plan.notes += [
        f"token {i}, {tokenizer.tokens[i]!r:.60}, ends a text, too, and GGUF has no key for it; give it as `stop`"
        for i in tokenizer.ends[len(END_KEYS) :]
        if i not in loaded.eos_ids
    ]
    return Conversion(path, path.stat().st_size, tuple(plan.notes))


def _check_arguments(qtype: object, layout: object, pre: object, name: object) -> None:
    if layout not in LAYOUTS:
        raise PymlaError(f"unknown layout {layout!r}; choose {', '.join(LAYOUTS)}")
    if not isinstance(qtype, str) or qtype not in QTYPES:
        raise PymlaError(f"unknown type {qtype!r} as `qtype`; choose {', '.join(QTYPES)}")
    for argument, value in (("pre", pre), ("name", name)):
        if not isinstance(value, str | None):
            raise PymlaError(f"`{argument}` is {value!r}; a string is expected")


def _check_text(folder: Path, key: str, value: Value) -> None:
    """Raise PymlaError for text that JSON can hold and UTF-8 cannot: halves of characters."""
    for text in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
        if isinstance(text, str) and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise PymlaError(f"{folder}: {key} has {text!r:.60}, which is not valid Unicode") from error


def _types(sources: Sequence[Source], qtype: int, notes: list[str]) -> dict[str, int]:
    """The type of each tensor: float32 for vectors, routers and an indexer's weights of heads."""
    output = "output.weight" if any(source.name == "output.weight" for source in sources) else "token_embd.weight"
    found = {}
    for name, shape, _ in sources:
        wanted = ggml.Q8_0 if qtype == ggml.Q4_0 and name == output else qtype
        if len(shape) == 1 or name.endswith(("ffn_gate_inp.weight", "indexer.proj.weight")):
            wanted = ggml.F32
        elif shape[-1] % ggml.BLOCK_SIZE[wanted]:
            notes.append(f"{name} is F16: {shape[-1]} columns are no multiple of {ggml.NAME[wanted]}'s block")
            wanted = ggml.F16
        found[name] = wanted
    return found


def _quantised(source: Source, qtype: int, folder: Path) -> NewTensor:
    """A tensor with its values in its type."""

    def pieces() -> Iterator[np.ndarray]:
        return (_blocks(source.name, qtype, rows, folder) for rows in source.rows())

    return NewTensor(source.name, source.shape, qtype, pieces)


def _blocks(name: str, qtype: int, rows: np.ndarray, folder: Path) -> np.ndarray:
    """Rows of a tensor in its type. llama.cpp writes infinite scales where a value is too large; here that is an
    error, because nothing sensible can be computed with them."""
    largest = max(rows.max(), -rows.min())
    if not _holds(qtype, largest):
        wider = [each for each, wide in reversed(QTYPES.items()) if _holds(wide, largest)]
        raise PymlaError(
            f"{folder}: {name} holds {largest:g}, too large for {ggml.NAME[qtype]}; "
            f"take {' or '.join(wider)} as `qtype`"
        )
    # Scales so small that float16 has 0 for them give weights of 0.
    with np.errstate(all="ignore"):
        return quantise(rows, qtype)


def _holds(qtype: int, value: float) -> bool:
    """Whether a value stays finite in a type."""
    with np.errstate(all="ignore"):
        block = quantise(np.full((1, ggml.BLOCK_SIZE[qtype]), value, np.float32), qtype)
        return bool(np.isfinite(dequantise(block, qtype)).all())


def _check_loads(part: Path, folder: Path) -> Tokenizer:
    """Check a file as `pymla.load` does before it computes anything: a whole file, or one that has metadata only.

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
        file = ModelFile.open(part)
        if file.tensors:
            return examine(file, cache_type="f32").check()[1]  # of all types, f32 holds the rows of every model
        ModelConfig.from_gguf(file)
        return Tokenizer.from_gguf(file)
    except PymlaError as error:
        reason = str(error).removeprefix(f"{part}: ")
        raise PymlaError(f"{folder}: cannot be converted, the file would not load: {reason}") from error
