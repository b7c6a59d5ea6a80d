"""The weights of a Hugging Face checkpoint as numbers: decoded on all cores, some rows at a time."""

import math

import numpy as np

from pymla import ggml
from pymla.cpu import checkpoint_types
from pymla.errors import PymlaError
from pymla.files.checkpoint import Checkpoint, StoredRows
from pymla.reference.checkpoint_types import mxfp4_blocks
from pymla.small_floats import E4M3, E8M0

#: The types of GGUF that hold a kind of weights bit for bit.
_SAME_TYPE = {"F32": ggml.F32, "F16": ggml.F16, "BF16": ggml.BF16, "MXFP4": ggml.MXFP4}

#: The bits of infinity; those of larger magnitudes are NaN.
_INFINITY = 0x7F800000


class HubWeights(Checkpoint):
    """A checkpoint whose weights are read as float32, or in the type of GGUF that has the same bits."""

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a weight seen as a matrix, all leading dimensions as one: float32 (stop - start, columns).

        Raises
        ------
        PymlaError
            The weight cannot be read (`Checkpoint.expect`), or a number is infinite or NaN; the message says which.
        """
        stored = self.stored(name, start, stop)
        values = _as_float32(stored)
        if checkpoint_types.largest_magnitude(values.reshape(-1).view(np.uint32), alone=True) >= _INFINITY:
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise PymlaError(
                f"{stored.encoding.codes.path}: tensor {name} holds infinity or NaN, or a number that float32 does not "
                f"hold, in row {start + row}, column {column}; download it again"
            )
        return values

    def read(self, name: str) -> np.ndarray:
        """A whole weight, float32, in its shape."""
        shape = self.encoding(name).shape
        return self.rows(name, 0, math.prod(shape[:-1])).reshape(shape)

    def qtype(self, name: str) -> int | None:
        """The type of GGUF that holds a weight bit for bit; None: there is none."""
        return _SAME_TYPE.get(self.encoding(name).kind)

    def blocks(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a weight as they stand in a file of the type `qtype`: uint8 (stop - start, row bytes)."""
        stored = self.stored(name, start, stop)
        if stored.scales is not None:
            return mxfp4_blocks(stored.codes, stored.scales)
        return stored.codes.view(np.uint8)


def _as_float32(stored: StoredRows) -> np.ndarray:
    kind, codes, scales = stored.encoding.kind, stored.codes, stored.scales
    if kind == "BF16":
        return checkpoint_types.from_bf16(codes)
    if scales is None:
        with np.errstate(over="ignore"):
            return codes.astype(np.float32, copy=False)
    if kind == "MXFP4":
        return checkpoint_types.from_mxfp4(codes, scales)
    numbers = _scales(stored)
    if kind in ("INT4", "GPTQ", "AWQ"):
        return checkpoint_types.from_int4(codes, numbers, stored.zeros)
    if kind == "NVFP4":
        return checkpoint_types.from_e2m1(codes, numbers)
    return checkpoint_types.from_e4m3(codes, numbers, stored.encoding.block, stored.first)


def _scales(stored: StoredRows) -> np.ndarray:
    """Scales of float8, NVFP4 or integers as float32."""
    entry, scales = stored.encoding.scales, stored.scales
    assert entry is not None
    assert scales is not None
    if entry.dtype == "F8_E8M0":
        return E8M0[scales]
    if entry.dtype == "F8_E4M3":
        return E4M3[scales] * np.float32(stored.factor)
    if entry.dtype == "BF16":
        return checkpoint_types.from_bf16(scales)
    return scales.astype(np.float32, copy=False)
