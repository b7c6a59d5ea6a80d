"""Importance matrices: for every column of a model's matrices, the mean square of the inputs that it multiplies.

A quantiser weighs the error of a weight with it. `pymla.make.imatrix` collects the sums; files come from there or from
llama.cpp and ik_llama.cpp.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from pymla.errors import PymlaError
from pymla.files import imatrix_dat, imatrix_gguf, outputs
from pymla.files.imatrix_entries import MOST, Entry, ImatrixData
from pymla.printable import shown

#: Formats of files.
FORMATS = ("gguf", "dat")

#: For a stem, the stems of tensors that multiply the same inputs, the best first.
_SAME_INPUTS = {
    "ffn_gate_up_exps": ("ffn_up_exps", "ffn_gate_exps"),
    "ffn_gate_exps": ("ffn_up_exps", "ffn_gate_up_exps"),
    "ffn_up_exps": ("ffn_gate_exps", "ffn_gate_up_exps"),
    "ffn_gate_shexp": ("ffn_up_shexp",),
    "ffn_up_shexp": ("ffn_gate_shexp",),
    "ffn_gate": ("ffn_up",),
    "ffn_up": ("ffn_gate",),
}

#: Stems of tensors with a matrix for each head, which a file may hold with two dimensions: the rows of all heads.
_OF_HEADS = ("attn_k_b", "attn_v_b")


class Importance:
    """The importance matrix of a model.

    Attributes
    ----------
    entries : dict of str and Entry
        By the tensor's name.
    datasets : tuple of str
        Names of the texts.
    chunk_size : int
        Tokens of a piece of text; 0: not known, and the counts of entries are pieces.
    source : str
        What messages call it: the path of its file.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        datasets: Iterable[str] = (),
        chunk_size: int = 0,
        source: object = "the importance matrix",
    ):
        self.entries, self.datasets = dict(entries), tuple(dict.fromkeys(datasets))
        self.chunk_size, self.source = chunk_size, str(source)

    @classmethod
    def read(cls, path: str | Path) -> "Importance":
        """Read a file of either format.

        Raises
        ------
        PymlaError
            The file cannot be read, is damaged, or holds no importance matrix.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                is_gguf = file.read(4) == b"GGUF"
        except (OSError, ValueError) as error:
            raise PymlaError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
        data = imatrix_gguf.read(path) if is_gguf else imatrix_dat.read(path)
        return cls(data.entries, data.datasets, data.chunk_size, path)

    def write(self, path: Path, form: Literal["gguf", "dat"] = "gguf") -> None:
        """Write a file, beside an older one of the name, whose place it takes when it is complete. Pieces of text of
        unknown size are written as 512 tokens.

        Raises
        ------
        PymlaError
            It cannot be written, or a sum is too large for float32.
        """
        known = self if self.chunk_size else Importance.merged([self])
        for name, entry in known.entries.items():
            if entry.sums.max() > np.finfo(np.float32).max:
                raise PymlaError(f"{path}: a sum for {shown(name)} is {entry.sums.max():g}, too large for float32")
        data = ImatrixData(known.entries, known.datasets, known.chunks, known.chunk_size)
        with outputs.replacing(path) as part:
            (imatrix_gguf.write if form == "gguf" else imatrix_dat.write)(part, data)

    @property
    def chunks(self) -> int:
        """How many pieces of text there were, as llama.cpp counts them: by the tensor with most inputs."""
        most = max((int(entry.counts.max()) for entry in self.entries.values()), default=0)
        return min(most // max(1, self.chunk_size), MOST)

    def columns(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The mean squares of the inputs of a tensor's columns.

        Columns of an expert without any input are the means of all inputs that the tensor's other experts had, since
        what goes to one of them may go to another. llama-quantize takes 1, so that columns count alike, and as much as
        if inputs were of that size.

        Where there is no entry of the name, that of a tensor with the same inputs counts: gate and up of one network,
        in one tensor or in two; and of `attn_v_b` and `attn_kv_b` each other's, as in ik_llama.cpp. `attn_kv_b`
        multiplies latent rows and `attn_v_b` means of these, weighted by attention: the same columns, in about the same
        proportions. The columns of `attn_k_b` are those of queries, for which nothing else stands.

        Parameters
        ----------
        name : str
            As in a model file.
        shape : tuple of int
            The tensor's, in NumPy order: ``(..., rows, columns)``.

        Returns
        -------
        float32 array (matrices, columns), or None where there is nothing for the tensor
            As many matrices as ``shape[:-2]`` has. Where a tensor has two dimensions and its entry those of heads, the
            mean of all heads; and where the entry has one head for all, that for each (`with_merged_heads`).

        Raises
        ------
        PymlaError
            The sizes of an entry contradict the shape.
        """
        matrices, columns, stem = math.prod(shape[:-2]), shape[-1], _stem(name)
        entry = self.entries.get(name)
        if entry is not None:
            if matrices == 1 and stem in _OF_HEADS:
                return self._of_all_heads(entry, name, columns)
            if entry.sums.size == columns and stem in _OF_HEADS:
                return np.repeat(self._of_matrices(entry, name, 1, columns), matrices, axis=0)
            return self._of_matrices(entry, name, matrices, columns)
        for other in _SAME_INPUTS.get(stem, ()):
            entry = self.entries.get(_renamed(name, stem, other))
            if entry is not None:
                return self._of_matrices(entry, name, matrices, columns)
        if stem == "attn_kv_b":
            entry = self.entries.get(_renamed(name, stem, "attn_v_b"))
            return None if entry is None else self._of_all_heads(entry, name, columns)
        if stem == "attn_v_b":
            entry = self.entries.get(_renamed(name, stem, "attn_kv_b"))
            if entry is not None:
                return np.repeat(self._of_matrices(entry, name, 1, columns), matrices, axis=0)
        return None

    def with_merged_heads(self) -> "Importance":
        """The same with one entry for the inputs of all heads in `attn_k_b` and `attn_v_b`.

        ik_llama.cpp's llama-quantize asks for that where these tensors have two dimensions, the rows of all heads.
        Where they have three, it asks for the columns of every head, as llama.cpp's does.

        Raises
        ------
        PymlaError
            How many heads an entry has is not known: neither has it a row for each, nor is there one of `attn_kv_b`,
            which has the columns of one head of `attn_v_b`.
        """
        entries = dict(self.entries)
        for name, entry in self.entries.items():
            if _stem(name) in _OF_HEADS:
                # The mean of the heads keeps the count of inputs, which says how many chunks there were.
                sums = entry.sums.reshape(self._heads(name, entry), -1).mean(0, keepdims=True, dtype=np.float64)
                entries[name] = Entry(sums, entry.counts.mean(keepdims=True).astype(np.int64))
        return Importance(entries, self.datasets, self.chunk_size, self.source)

    def never_chosen(self) -> dict[str, list[int]]:
        """The experts of each layer that no token went to, as ``{"blk.3": [5, 17]}``."""
        found: dict[str, set[int]] = {}
        for name, entry in self.entries.items():
            if entry.counts.size > 1 and not entry.counts.all():
                layer = ".".join(name.split(".")[:2])
                found.setdefault(layer, set()).update(np.flatnonzero(entry.counts == 0).tolist())
        return {layer: sorted(experts) for layer, experts in found.items()}

    @classmethod
    def merged(cls, parts: "Sequence[Importance]", chunk_size: int = 0) -> "Importance":
        """The sums and counts of several, added.

        Parameters
        ----------
        chunk_size : int
            Tokens of a piece of text, also where a part does not know it: by default that of the first part that does,
            or 512.

        Raises
        ------
        PymlaError
            They are of different models, as their sizes say.
        """
        size = chunk_size or next((part.chunk_size for part in parts if part.chunk_size), 512)
        total: dict[str, Entry] = {}
        for part in parts:
            for name, entry in part.entries.items():
                entry = entry if part.chunk_size else Entry(entry.sums.astype(np.float64) * size, entry.counts * size)
                total[name] = _sum(total[name], entry, name, part.source) if name in total else entry
        return cls(total, (each for part in parts for each in part.datasets), size)

    def _of_matrices(self, entry: Entry, name: str, matrices: int, columns: int) -> np.ndarray:
        """Mean squares (matrices, columns) of an entry of this size."""
        if entry.sums.size != matrices * columns or matrices % entry.counts.size:
            self._refuse(entry, name, matrices, columns)
        counts, inputs = entry.counts[:, None], int(entry.counts.sum())
        others = entry.sums.sum(0, dtype=np.float64) / inputs if inputs else 1.0
        means = np.where(counts > 0, entry.sums / np.maximum(counts, 1), others)
        return means.astype(np.float32).reshape(matrices, columns)

    def _of_all_heads(self, entry: Entry, name: str, columns: int) -> np.ndarray:
        """Mean squares (1, columns) of the inputs of all heads."""
        if entry.sums.shape[1] % columns:
            self._refuse(entry, name, 1, columns)
        heads = entry.sums.size // columns
        inputs = int(entry.counts.sum()) * (heads // entry.counts.size)
        sums = entry.sums.reshape(heads, columns).sum(0, dtype=np.float64)
        return (sums / inputs if inputs else np.ones(columns)).astype(np.float32)[None]

    def _heads(self, name: str, entry: Entry) -> int:
        """How many heads an entry of `attn_k_b` or `attn_v_b` has."""
        if entry.counts.size > 1:
            return entry.counts.size
        value, whole = (self.entries.get(_renamed(name, _stem(name), stem)) for stem in ("attn_v_b", "attn_kv_b"))
        heads, rest = divmod(value.sums.size, whole.sums.size) if value and whole else (0, 0)
        if not heads or rest or entry.sums.size % heads:
            raise PymlaError(
                f"{self.source}: how many heads {shown(name)} has is not known, as attn_v_b and attn_kv_b of its layer "
                "do not say it; collect the importance matrix with pymla"
            )
        return heads

    def _refuse(self, entry: Entry, name: str, matrices: int, columns: int) -> NoReturn:
        have = " x ".join(map(str, entry.sums.shape))
        raise PymlaError(
            f"{self.source}: has {have} columns for {shown(name)}, and the tensor {matrices} x {columns}: it is of "
            "another model"
        )


def _sum(one: Entry, other: Entry, name: str, source: str) -> Entry:
    """Two entries of a tensor as one; a single count stands for every matrix of one with several."""
    n = max(one.counts.size, other.counts.size)
    if one.sums.size != other.sums.size or {one.counts.size, other.counts.size} - {1, n}:
        raise PymlaError(
            f"{source}: {shown(name)} has {other.sums.size} sums and {other.counts.size} counts, and before "
            f"{one.sums.size} and {one.counts.size}: these files are of different models"
        )
    sums = one.sums.reshape(n, -1).astype(np.float64) + other.sums.reshape(n, -1)
    return Entry(sums, np.broadcast_to(one.counts, n) + other.counts)


def _stem(name: str) -> str:
    """The name of a tensor without its layer and without ``.weight``."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _renamed(name: str, stem: str, other: str) -> str:
    """The name of another tensor of the layer."""
    return f"{name.removesuffix('.weight').removesuffix(stem)}{other}.weight"
