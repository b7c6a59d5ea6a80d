"""Statistics of an importance matrix, as ``llama-imatrix --show-statistics`` has them.

They are of mean squared inputs, of all columns of a tensor that has any. llama.cpp: ``compute_statistics``,
``compute_cossim`` and ``show_statistics`` of ``tools/imatrix/imatrix.cpp``.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pymla.files.imatrix_entries import Entry
from pymla.make.importance import Importance

#: Mean squares up to this are those of inactive columns.
_INACTIVE = 1e-5

_LAYER = re.compile(r"blk\.(\d+)\.")


class TensorStatistics(NamedTuple):
    """Of a tensor."""

    name: str
    layer: int | None  # None: of a tensor outside the layers
    total: float  # sum of the mean squares
    minimum: float
    maximum: float
    mean: float
    deviation: float
    active: float  # share of columns with more than `_INACTIVE`
    columns: int  # of all matrices that read anything
    entropy: float  # bits, of the mean squares as shares of their sum
    outliers: float  # share of columns more than a standard deviation above the mean: the ZD score
    cosine: float  # of its sums with those of the same tensor of the layer before; 0 where there is none

    @property
    def tensor(self) -> str:
        """The name without its layer and without ``.weight``."""
        return _LAYER.sub("", self.name, count=1).removesuffix(".weight")

    @property
    def relative_entropy(self) -> float:
        """The entropy as a share of the largest that so many columns have."""
        return self.entropy / float(np.log2(self.columns)) if self.columns > 1 else 0.0


class LayerStatistics(NamedTuple):
    """Means over the tensors of a layer, weighted with their columns."""

    layer: int
    total: float
    outliers: float
    cosine: float


def tensor_statistics(importance: Importance) -> list[TensorStatistics]:
    """Of every tensor that read anything, by tensor, and those with the largest sums first."""
    found = []
    for name, entry in importance.entries.items():
        read = entry.counts > 0
        if read.any():
            means = (entry.sums[read].astype(np.float64) / entry.counts[read, None]).reshape(-1)
            found.append(_of(name, means, _cosine(entry, importance.entries.get(_before(name)))))
    return sorted(found, key=lambda each: (each.tensor, -each.total))


def layer_statistics(tensors: Iterable[TensorStatistics]) -> list[LayerStatistics]:
    """Of every layer, in order."""
    layers: dict[int, list[TensorStatistics]] = {}
    for each in tensors:
        if each.layer is not None:
            layers.setdefault(each.layer, []).append(each)
    found = []
    for layer, own in sorted(layers.items()):
        columns = [each.columns for each in own]
        values = [[each.total, each.outliers, each.cosine] for each in own]
        found.append(LayerStatistics(layer, *np.average(values, axis=0, weights=columns).tolist()))
    return found


def _of(name: str, means: np.ndarray, cosine: float) -> TensorStatistics:
    """Statistics of mean squares, float64 (columns,)."""
    layer, total, deviation = _LAYER.match(name), float(means.sum()), float(means.std())
    shares = means[means > 0] / total if total > 0 else means[:0]
    above = (means - means.mean()) / deviation > 1 if deviation > 0 else np.zeros(len(means), bool)
    return TensorStatistics(
        name=name,
        layer=int(layer[1]) if layer else None,
        total=total,
        minimum=float(means.min()),
        maximum=float(means.max()),
        mean=float(means.mean()),
        deviation=deviation,
        active=float((means > _INACTIVE).mean()),
        columns=len(means),
        entropy=float(-(shares * np.log2(shares)).sum()),
        outliers=float(above.mean()),
        cosine=cosine,
    )


def _before(name: str) -> str:
    """The name of the tensor of the layer before; an empty one where there is none."""
    layer = _LAYER.match(name)
    return f"blk.{int(layer[1]) - 1}.{name[layer.end() :]}" if layer else ""


def _cosine(entry: Entry, before: Entry | None) -> float:
    if before is None or before.sums.size != entry.sums.size:
        return 0.0
    one, other = (each.sums.reshape(-1).astype(np.float64) for each in (entry, before))
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / norms if norms else 0.0
