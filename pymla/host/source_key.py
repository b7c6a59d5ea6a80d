"""A name for the state of the sources and tools that kernels are compiled from: caches of machine code go by it."""

import hashlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import llvmlite
import numba

#: Sources beside the folders of kernels whose numbers are part of kernels: types, their sizes, layouts and codebooks,
#: the size of a page, constants, the size of a cache line, and how arguments are laid out.
_SHARED = (
    *("ggml.py", "ik_types.py", "planes.py", "vectors.py", "trellis.py", "trits.py", "codebooks.py", "small_floats.py"),
    *("pages.py", "constants.py", "tensor.py", "host/arrays.py", "host/arguments.py"),
)


def is_part_of(folder: Path, function: Callable) -> bool:
    """Whether a function's source lies in a folder, so that the folder's key changes with it. Functions that users
    write elsewhere may change while the key stays, so their machine code is not kept."""
    return Path(function.__code__.co_filename).resolve().is_relative_to(folder)


def source_key(folder: Path, tools: Iterable[object]) -> str:
    """16 hexadecimal digits.

    Parameters
    ----------
    folder : Path
        Of the kernels' sources, with the folders in it.
    tools : iterable
        Whatever machine code depends on besides the sources and the versions of Python, Numba and llvmlite; the text of
        each counts.
    """
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for source in (*(package / name for name in _SHARED), *sorted(folder.rglob("*.py"))):
        digest.update(str(source.relative_to(package)).encode() + b"\0" + source.read_bytes())
    for tool in (sys.version, numba.__version__, llvmlite.__version__, *tools):
        digest.update(str(tool).encode() + b"\0")
    return digest.hexdigest()[:16]
