"""The metadata of a file in other types: that of its source, and what llama.cpp's ``llama-quantize`` adds.

Added are ``general.file_type``, ``general.quantization_version`` and ``quantize.imatrix.*``, as in
tools/quantize/quantize.cpp there.
"""

import gguf
from gguf import GGUFValueType, Keys

from pymla.files.gguf_reader import ModelFile
from pymla.files.gguf_writer import Value, encoded
from pymla.make.importance import Importance

#: Keys that say how a file lies on the disk, and not what is in it.
_OF_THE_FILE = (
    Keys.Split.LLM_KV_SPLIT_NO,
    Keys.Split.LLM_KV_SPLIT_COUNT,
    Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT,
    # Tensors are written at multiples of the default, which needs no key.
    Keys.General.ALIGNMENT,
)

#: Stands for the ``general.file_type`` of the source, whatever it is.
SAME_FILE_TYPE = -1

#: Bytes of a text that llama.cpp's overrides of metadata hold.
_LONGEST_TEXT = 127


def architecture(file: ModelFile) -> str:
    """``general.architecture`` of a file.

    Raises
    ------
    PymlaError
        It has none.
    """
    return file.get(Keys.General.ARCHITECTURE, str)


def new_metadata(file: ModelFile, file_type: int | None, importance: Importance | None) -> dict[str, Value]:
    """The keys of a file in other types, without ``general.architecture``.

    Parameters
    ----------
    file : the source
    file_type : ``general.file_type``; None: left out; `SAME_FILE_TYPE`: as the source has it
    importance : with which weights are quantised
    """
    keys: dict[str, Value] = dict(file.encoded_metadata())
    for key in (*_OF_THE_FILE, Keys.General.ARCHITECTURE):
        keys.pop(key, None)
    keys[Keys.General.QUANTIZATION_VERSION] = gguf.GGML_QUANT_VERSION
    if file_type != SAME_FILE_TYPE:
        keys.pop(Keys.General.FILE_TYPE, None)
        if file_type is not None:
            keys[Keys.General.FILE_TYPE] = file_type
    return keys if importance is None else keys | importance_keys(importance)


def importance_keys(importance: Importance) -> dict[str, Value]:
    """The keys that say with which importance matrix weights are quantised."""
    texts = {"file": importance.source, "dataset": next(iter(importance.datasets), "")}
    keys: dict[str, Value] = {
        f"quantize.imatrix.{key}": encoded(GGUFValueType.STRING, _shortened(text))
        for key, text in texts.items()
        if text
    }
    keys["quantize.imatrix.entries_count"] = len(importance.entries)
    if importance.chunks > 0:
        keys["quantize.imatrix.chunks_count"] = importance.chunks
    return keys


def _shortened(text: str) -> str:
    """The beginning of a text. A path may hold bytes that are not Unicode."""
    return text.encode(errors="replace")[:_LONGEST_TEXT].decode(errors="ignore")
