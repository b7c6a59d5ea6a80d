"""The sampling that a Hugging Face folder recommends, as ``general.sampling.*`` of its GGUF file.

llama.cpp's converter writes these keys from generation_config.json (gguf-py's ``Metadata.load``); `pymla generate` and
llama.cpp take them for their defaults.
"""

from pathlib import Path

import numpy as np
from gguf import Keys

from pymla.files.gguf_writer import Value
from pymla.make.json_values import Values

NAME = "generation_config.json"

#: Keys of GGUF by those of generation_config.json.
_NUMBERS = {
    "temperature": Keys.General.SAMPLING_TEMP,
    "top_p": Keys.General.SAMPLING_TOP_P,
    "min_p": Keys.General.SAMPLING_MIN_P,
    "repetition_penalty": Keys.General.SAMPLING_PENALTY_REPEAT,
}


def sampling_metadata(folder: Path) -> dict[str, Value]:
    """The recommended sampling parameters of a folder, those that it has.

    Raises
    ------
    PymlaError
        The file is damaged, or a value is no number.
    """
    values = Values(folder / NAME, optional=True)
    found: dict[str, Value] = {}
    for key, name in _NUMBERS.items():
        number = values.number(key)
        if number is not None:
            found[name] = float(number)
    if values.get("top_k", int) is not None:
        found[Keys.General.SAMPLING_TOP_K] = np.int32(values.size("top_k", minimum=-1))
    return found
