"""The text in a file that some editor wrote."""

import codecs
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pymla.errors import PymlaError

# UTF-32's mark for little-endian text begins with that of UTF-16, so it comes first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode(data: bytes, where: object) -> str:
    """The text of a file: UTF-8, or what its byte order mark says. The mark is no part of the text.

    Windows' Notepad writes a mark before UTF-8, and older PowerShells write UTF-16.

    Parameters
    ----------
    where : the file's path, for the error

    Raises
    ------
    PymlaError
        The bytes are no such text.
    """
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise PymlaError(
            f"{where}: byte {error.start} is not valid {name} ({error.reason}); save it as UTF-8"
        ) from None


@contextlib.contextmanager
def unmarked(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """A folder whose text files are UTF-8 without byte order marks, for a library that takes no other.

    Parameters
    ----------
    folder
    patterns : globs of the files that the library reads

    Yields
    ------
        `folder` itself where no file has a mark, or else a temporary folder with copies of the files.

    Raises
    ------
    PymlaError
        The bytes of a marked file are no text.
    """
    files = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    if not any(_is_marked(path) for path in files):
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        for path in files:
            copy = Path(name, path.relative_to(folder))
            copy.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes()
            copy.write_bytes(decode(data, path).encode() if _is_marked(path) else data)
        yield Path(name)


def _is_marked(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith(tuple(mark for mark, _ in _MARKS))
