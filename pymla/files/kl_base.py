"""Files of log-probabilities: what a model, the *base*, says after every token of a text that counts, so that other
models can be compared with it. The format is that of llama.cpp's ``llama-perplexity --kl-divergence-base``
(`perplexity` and `kl_divergence` in tools/perplexity/perplexity.cpp): each program compares with the other's files.

=================  =====================================================================================
8 bytes            ``_logits_``
int32              tokens of a window, n
int32              tokens of the vocabulary, V
int32              windows, w
int32 (w, n)       the windows' tokens, as they follow each other in the text
records (w, r)     the log-probabilities after tokens n // 2 to n - 2 of every window: r = n - 1 - n // 2
=================  =====================================================================================

Everything is little-endian. A *record* is V + 4 uint16, or V + 5 where V is odd. The first four are two float32,
`scale` and `low`; then come V codes, ``round((x - least) / scale)`` of the logits x, where `least` is the smallest
logit, or the largest less 16 if that is more. Code c stands for the log-probability ``scale * c + low``.

Files are large, 84 MB for a window of 512 tokens with a vocabulary of 163,840: they are written and read window by
window.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from pymla.errors import PymlaError
from pymla.files import outputs

MAGIC = b"_logits_"
#: What the largest logit of a record is at most above that of code 0, and the log-probability, without its sign, from
#: which on a token of the base counts in a divergence.
RANGE = 16
#: Smaller scales are written as 0: their reciprocal is no float32.
LEAST_SCALE = 1e-30

_HEADER_BYTES = len(MAGIC) + 12
#: How far rounding may lift the largest log-probability of a record above 0.
_SLACK = 1e-2


def record_words(vocab_size: int) -> int:
    """The uint16 of a record of so many tokens."""
    return 2 * ((vocab_size + 1) // 2) + 4


def first_record(ctx: int) -> int:
    """The token of a window of `ctx` tokens after which its first record is."""
    return ctx // 2


def records_of_window(ctx: int) -> int:
    """Records of a window of `ctx` tokens."""
    return ctx - 1 - first_record(ctx)


def file_bytes(windows: int, ctx: int, vocab_size: int) -> int:
    """Bytes of a file."""
    records = windows * records_of_window(ctx)
    return _HEADER_BYTES + 4 * windows * ctx + 2 * records * record_words(vocab_size)


class BaseFile:
    """A file of log-probabilities that is read. Use it as a context manager.

    Attributes
    ----------
    path : Path
    ctx : int
        Tokens of a window, 3 or more.
    vocab_size : int
    tokens : int32 array (windows, ctx)

    Raises
    ------
    PymlaError
        It cannot be read, is no such file, is cut, or holds what no model says.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb", buffering=0)
        except OSError as error:
            raise PymlaError(f"{path}: {error.strerror or error}") from error
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "BaseFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def records(self, window: int, first: int, count: int) -> np.ndarray:
        """Records of a window, from its record `first` on: uint16 (count, ``record_words(vocab_size)``).

        Raises
        ------
        PymlaError
            They cannot be read, or a scale or a log-probability is none.
        """
        words = record_words(self.vocab_size)
        number = window * records_of_window(self.ctx) + first
        data = self._read(_HEADER_BYTES + self.tokens.nbytes + 2 * words * number, 2 * words * count)
        records = np.frombuffer(data, "<u2").reshape(count, words)
        heads = np.ascontiguousarray(records[:, :4]).view("<f4").astype(np.float64)
        scale, low = heads[:, 0], heads[:, 1]
        with np.errstate(invalid="ignore"):
            sound = np.isfinite(heads).all(1) & (scale >= 0) & (low + 65535 * scale <= _SLACK)
        if not sound.all():
            bad = int(np.flatnonzero(~sound)[0])
            self._refuse(
                f"record {first + bad} of window {window} has the scale {scale[bad]:g} and the lowest log-probability "
                f"{low[bad]:g}, which no model has: the file is damaged"
            )
        return records

    def _read_header(self) -> None:
        nbytes = os.fstat(self._file.fileno()).st_size
        header = self._file.read(_HEADER_BYTES)
        if not header.startswith(MAGIC):
            self._refuse(f"is no file of log-probabilities, which begins with {MAGIC.decode()}")
        if len(header) < _HEADER_BYTES:
            self._refuse(f"has {nbytes} bytes, less than a header: it was cut")
        self.ctx, self.vocab_size, windows = (int(each) for each in np.frombuffer(header, "<i4", 3, len(MAGIC)))
        if self.ctx < 3 or self.vocab_size < 1 or windows < 1:
            self._refuse(
                f"has {windows} windows of {self.ctx} tokens and a vocabulary of {self.vocab_size}: the file is damaged"
            )
        wanted = file_bytes(windows, self.ctx, self.vocab_size)
        if nbytes != wanted:
            self._refuse(
                f"has {nbytes} bytes, and {windows} windows of {self.ctx} tokens with a vocabulary of "
                f"{self.vocab_size} take {wanted}: it was cut, or is damaged"
            )
        tokens = np.frombuffer(self._read(_HEADER_BYTES, 4 * windows * self.ctx), "<i4").astype(np.int32)
        outside = (tokens < 0) | (tokens >= self.vocab_size)
        if outside.any():
            bad = int(np.flatnonzero(outside)[0])
            self._refuse(f"token {bad} is {tokens[bad]}, and the vocabulary has {self.vocab_size}: the file is damaged")
        self.tokens = tokens.reshape(windows, self.ctx)

    def _read(self, offset: int, nbytes: int) -> bytes:
        try:
            self._file.seek(offset)
            data = self._file.read(nbytes)
        except OSError as error:
            raise PymlaError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        if len(data) < nbytes:
            self._refuse("became shorter while it was read")
        return data

    def _refuse(self, reason: str) -> NoReturn:
        raise PymlaError(f"{self.path}: {reason}")


class BaseWriter:
    """Takes the records of a file, in order; made by `writing`."""

    def __init__(self, file: BinaryIO, words: int, missing: int):
        self._file, self._words = file, words
        #: Records that are still to be written.
        self.missing = missing

    def write(self, records: np.ndarray) -> None:
        """Append records, uint16 (n, ``record_words(V)``)."""
        if records.shape[1:] != (self._words,) or len(records) > self.missing:
            raise ValueError(f"records {records.shape}; {self.missing} of {self._words} words are missing")
        self._file.write(np.ascontiguousarray(records, "<u2").data)
        self.missing -= len(records)


@contextmanager
def writing(path: Path, tokens: np.ndarray, vocab_size: int) -> Iterator[BaseWriter]:
    """Write a file of log-probabilities, which takes its name when all records are written.

    Parameters
    ----------
    path : Path
    tokens : int32 array (windows, ctx)
        As they follow each other in the text, ctx 3 or more.
    vocab_size : int

    Raises
    ------
    PymlaError
        The disk has too little room for it, or it cannot be written.
    """
    windows, ctx = tokens.shape
    outputs.check_space(path, file_bytes(windows, ctx, vocab_size))
    with outputs.replacing(path) as part:
        with part.open("rb+") as file:
            file.write(MAGIC + np.array([ctx, vocab_size, windows], "<i4").tobytes())
            file.write(np.ascontiguousarray(tokens, "<i4").data)
            writer = BaseWriter(file, record_words(vocab_size), windows * records_of_window(ctx))
            yield writer
        if writer.missing:
            raise ValueError(f"{path}: {writer.missing} records were not written")
