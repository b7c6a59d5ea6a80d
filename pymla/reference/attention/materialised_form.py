"""The absorbed form with all scores of a token in memory (``--mla 2``)."""

from __future__ import annotations

import numpy as np

from pymla.pages import Step
from pymla.reference.attention.absorbed_form import attend
from pymla.reference.contract import check
from pymla.tensor import QTensor


def absorbed_materialised(
    q: np.ndarray, latent: QTensor, rope: QTensor, step: Step, scale: float, out: np.ndarray
) -> np.ndarray:
    """`absorbed` with the scores of all positions in memory before the first value is read.

    The fast backends differ from their `absorbed` here, which has an online softmax; NumPy has the scores in memory in
    both. Parameters, errors and result are those of `absorbed`.
    """
    check.absorbed(q, latent, rope, step, scale, out, "absorbed_materialised")
    return attend(q, latent, rope, step, scale, out)
