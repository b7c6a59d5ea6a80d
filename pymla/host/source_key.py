"""A name for the state of the sources and tools that kernels are compiled from: caches of machine code go by it."""

import hashlib
from pathlib import Path


def is_part_of(folder, function):
    """Whether the key of a folder changes with the source of a function: those that users write elsewhere may change
    without it, so their machine code is not kept."""
    return Path(function.__code__.co_filename).resolve().is_relative_to(folder)


def source_key(folder, tools):
    """16 hexadecimal digits.

    Parameters
    ----------
    folder : Path
        Of the kernels' sources, with the folders in it.
    tools : iterable
        Versions of what compiles them, and whatever else machine code depends on; their text counts.
    """
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    # Besides themselves, kernels know the types' numbers and sizes, and those of a page.
    for source in (package / "ggml.py", package / "pages.py", *sorted(folder.rglob("*.py"))):
        digest.update(str(source.relative_to(package)).encode() + b"\0" + source.read_bytes())
    for tool in tools:
        digest.update(str(tool).encode() + b"\0")
    return digest.hexdigest()[:16]
