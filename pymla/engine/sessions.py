"""Sessions on disk: the cache's rows of a text, from which a later process goes on without computing them again.

A session belongs to the model that computed it: to its weights, its metadata and the way in which positions are
rotated; to the type of the cache; and to the form of its rows, which differs between ``--mla 0`` and the other modes,
and for types of 8 bits and fewer between devices.
"""

import hashlib
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from pymla import checks, ggml
from pymla.engine.cache import Sequence
from pymla.engine.language_model import LanguageModel
from pymla.engine.model import Model
from pymla.errors import PymlaError
from pymla.files import session_file
from pymla.files.gguf_reader import ModelFile
from pymla.pages import PAGE, pages_of

#: Bytes of every tensor that count for the digest of a model.
SAMPLE = 4096

#: Of models that are in use: a digest is computed once.
_digests: "weakref.WeakKeyDictionary[Model, str]" = weakref.WeakKeyDictionary()

_WANTED = "the path of a session's file is expected"


def save(path: str | os.PathLike[str], model: LanguageModel, sequence: Sequence) -> None:
    """Write a sequence's tokens and cache rows to a file. The sequence stays as it is.

    Whole pages are written. Slots of the last one that no token has may hold what other sequences left there, as
    memory that is not cleared does: a session is as private as the process.

    Parameters
    ----------
    path : str or Path
        Of the file, which takes its name when it is complete.
    model : LanguageModel
    sequence : Sequence
        Of this model, with at least one token.

    Raises
    ------
    PymlaError
        The sequence is empty, the model was closed, or the file cannot be written.
    """
    target, engine = checks.path("path", path, _WANTED), model.model
    model.file.check_unchanged()
    with engine.turn:
        if not sequence.length:
            raise PymlaError("the sequence has no tokens; there is nothing to save")
        rows = engine.cache.rows_of(sequence)
        tokens, shifted_from = np.array(sequence.tokens, np.int32), sequence.shifted_from
    session_file.write(target, {**_facts(model), "shifted_from": shifted_from}, tokens, rows)


def load(path: str | os.PathLike[str], model: LanguageModel) -> Sequence:
    """The sequence of a file. Its rows are in the host's memory; its first step brings them into the cache.

    Parameters
    ----------
    path : str or Path
        Of a file that `save` has written.
    model : LanguageModel
        The same model, with a cache of the same type and form. Devices may differ where their rows do not.

    Raises
    ------
    PymlaError
        The file cannot be read, is damaged or none of `save`, or is of another model, type of cache or form of rows,
        or longer than the context.
    """
    source = checks.path("path", path, _WANTED)
    model.file.check_unchanged()
    session = session_file.read(source)
    facts, own = session.facts, _facts(model)
    _compare(source, facts, own)
    cache, shifted_from = model.model.cache, facts.get("shifted_from")
    length = len(session.tokens)
    if length > cache.ctx:
        raise PymlaError(f"{source}: a session of {length} tokens; the context holds {cache.ctx}, raise `ctx`")
    shapes = [(pages_of(length), PAGE, nbytes) for _, nbytes in own["rows"]]
    in_vocabulary = ((session.tokens >= 0) & (session.tokens < model.config.vocab_size)).all()
    is_position = shifted_from is None or (type(shifted_from) is int and 0 <= shifted_from < length)
    if not length or [array.shape for array in session.arrays] != shapes or not in_vocabulary or not is_position:
        raise PymlaError(f"{source}: damaged: its tokens and rows do not fit each other; save the session again")
    sequence = Sequence()
    sequence.tokens, sequence.saved = session.tokens.tolist(), session.arrays
    sequence.shifted_from = shifted_from
    return sequence


def model_digest(file: ModelFile, model: Model) -> str:
    """A digest of what a model's cache rows depend on, in hexadecimal.

    It covers the metadata with the tokenizer, overrides, the configuration, the frequencies of rope, and of each tensor
    the name, the type, the shape and 4 KiB in its middle: reading all of a file would take as long as loading it. So
    models of one architecture and vocabulary are told apart where training or quantising touched all of a tensor, and
    are not where a file was edited by hand elsewhere. How a file is split does not count. Takes some milliseconds.
    """
    if model in _digests:
        return _digests[model]
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(file.encoded_metadata().items()):
        if not key.startswith("split."):
            digest.update(key.encode() + b"\0" + value.raw)
    for key in sorted(file.overridden):
        digest.update(f"{key}={file.metadata[key]!r}\0".encode())
    digest.update(repr(model.config).encode())
    digest.update(model.inv_freq.tobytes())
    for name, tensor in sorted(file.tensors.items()):
        digest.update(f"{name} {tensor.qtype} {tensor.shape}\0".encode())
        middle = max(0, len(tensor.data) - SAMPLE) // 2
        digest.update(tensor.data[middle : middle + SAMPLE].data)
    _digests[model] = digest.hexdigest()
    return _digests[model]


def _facts(model: LanguageModel) -> dict[str, Any]:
    """What a session must share with a model."""
    engine = model.model
    return {
        "model": f"{model.config.name or 'without a name'} ({model.file.path.name})",
        "digest": model_digest(model.file, engine),
        "cache_type": engine.cache.cache_type,
        "mla": "0" if engine.mla == "0" else "1, 2 or 3",
        "device": model.device,
        "rows": [[ggml.NAME.get(qtype, f"form {qtype}"), nbytes] for qtype, nbytes in engine.cache.row_types()],
    }


def _compare(path: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse a session of another model, cache type or form of rows."""

    def refuse(what: str, key: str, remedy: str) -> None:
        raise PymlaError(f"{path}: a session of {what} {saved.get(key)}, and this is {what} {own[key]}; {remedy}")

    if saved.get("digest") != own["digest"]:
        names = {
            key: f"{side.get('model')} [{str(side.get('digest'))[:8]}]" for key, side in (("s", saved), ("o", own))
        }
        raise PymlaError(
            f"{path}: a session of the model {names['s']}, and this is {names['o']}; load the model that it is of"
        )
    if saved.get("cache_type") != own["cache_type"]:
        refuse("cache type", "cache_type", "load the model with the session's `cache_type`")
    if saved.get("mla") != own["mla"]:
        refuse("MLA mode", "mla", "load the model with a mode of the session's")
    if saved.get("rows") != own["rows"]:
        refuse("device", "device", "their rows of this cache type differ; load the model on the session's device")
