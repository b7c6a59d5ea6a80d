"""Decoding a text file, whichever editor wrote it."""

import codecs

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
    """Decode a file's text: UTF-8, or the encoding of its byte order mark, which is left out of the text.

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
