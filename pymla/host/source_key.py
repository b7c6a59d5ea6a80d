"""A name for the state of the sources and tools that kernels are compiled from: caches of machine code go by it."""

import hashlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import llvmlite
import numba


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
    # Kernels also contain the types' numbers and sizes, and the size of a page.
    for source in (package / "ggml.py", package / "pages.py", *sorted(folder.rglob("*.py"))):
        digest.update(str(source.relative_to(package)).encode() + b"\0" + source.read_bytes())
    for tool in (sys.version, numba.__version__, llvmlite.__version__, *tools):
        digest.update(str(tool).encode() + b"\0")
    return digest.hexdigest()[:16]
