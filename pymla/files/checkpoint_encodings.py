"""How the files of a checkpoint store a weight: as floats, or as codes with scales, which are tensors of their own.

| kind | codes of tensor ``x`` | scales | in |
| --- | --- | --- | --- |
| F64, F32, F16, BF16 | ``x`` | | |
| F8_E4M3 | ``x`` | ``x_scale_inv`` or ``x_scale``: of blocks, rows, experts or all of it | DeepSeek V3, GLM-5 |
| INT4 | ``x_packed``, I32: eight columns in a word | ``x_scale``: of groups of columns | Kimi-K2-Thinking |
| MXFP4 | ``x_packed`` or ``x``, U8 or I8: two columns in a byte | ``x_scale``: E8M0, of 32 columns | Quark, K3 |

INT4 is ``pack-quantized`` of compressed-tensors, symmetric; MXFP4 its ``mxfp4-pack-quantized``, or AMD Quark's. Mistral
calls the scale of ``m.weight`` ``m.qscale_weight`` in files of its own.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pymla.errors import PymlaError
from pymla.small_floats import MX_GROUP

#: Types of safetensors files that are read, with those of NumPy that have their bits.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_BYTES = ("U8", "I8")
#: Types of the scales of a kind.
_SCALE_TYPES = {
    "F8_E4M3": ("F32", "BF16", "F16", "F8_E8M0"),
    "INT4": ("F32", "BF16", "F16"),
    "MXFP4": ("F8_E8M0", "U8", "I8"),
}
#: Columns of a word of INT4 and of a byte of MXFP4.
_INT4_COLUMNS, _MXFP4_COLUMNS = 8, 2

_PACKED, _SCALE_INV, _SCALE, _MISTRAL_SCALE = "_packed", "_scale_inv", "_scale", ".qscale_weight"
#: Tensors beside the codes of a weight.
_BESIDE = (_SCALE_INV, _SCALE, "_shape", "_zero_point", "_g_idx")
#: Tensors that have to do with activations and the cache alone.
_UNUSED = ("input_scale", "output_scale", "activation_scale", ".qscale_act", ".k_scale", ".v_scale")


class Entry(NamedTuple):
    """A tensor of a safetensors file, by its header."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # its bytes in the file
    stop: int


class Quantisation(NamedTuple):
    """What config.json says of quantised weights."""

    block: tuple[int, int] = (128, 128)  # rows and columns of a float8 matrix that share a scale
    group: int = 32  # columns of INT4 that share one


class Encoding(NamedTuple):
    """How a weight is stored."""

    kind: str  # of the table above
    shape: tuple[int, ...]  # of the weight
    codes: Entry
    scales: Entry | None = None
    block: tuple[int, int] = (1, 1)  # rows and columns that share a scale, all leading dimensions being rows


def weights(entries: Mapping[str, Entry]) -> set[str]:
    """Names of the weights among all tensors of a checkpoint."""
    found = set()
    for name in entries:
        base = next((name.removesuffix(suffix) for suffix in _BESIDE if name.endswith(suffix)), None)
        if base is not None and (base in entries or base + _PACKED in entries):
            continue
        if name.endswith(_MISTRAL_SCALE) and f"{name.removesuffix(_MISTRAL_SCALE)}.weight" in entries:
            continue
        if not name.endswith(_UNUSED):
            found.add(name.removesuffix(_PACKED))
    return found


def encoding(entries: Mapping[str, Entry], name: str, folder: Path, quantisation: Quantisation) -> Encoding:
    """How a weight is stored.

    Raises
    ------
    PymlaError
        The weight or its scales are missing, of a type or a shape that is not read, or truncated.
    """
    packed = entries.get(name + _PACKED)
    codes = packed or entries.get(name)
    if codes is None:
        raise PymlaError(f"{folder}: tensor {name} is missing; config.json and weights do not belong together")
    codes_name = name + _PACKED if packed else name
    if packed and packed.dtype == "I32":
        found = _int4(entries, name, packed, folder, quantisation.group)
    elif codes.dtype in _BYTES and (packed or name + _SCALE in entries):
        found = _mxfp4(entries, name, codes, folder)
    elif codes.dtype == "F8_E4M3":
        found = _e4m3(entries, name, codes, folder, quantisation.block)
    elif codes.dtype in _FLOATS and not packed:
        found = Encoding(codes.dtype, codes.shape, codes)
    else:
        raise PymlaError(
            f"{codes.path}: tensor {codes_name} is of type {codes.dtype}; {', '.join(_FLOATS)}, F8_E4M3 and packed "
            "weights of 4 bits are read"
        )
    _check_bytes(codes_name, codes)
    return found


def _check_bytes(name: str, entry: Entry) -> None:
    nbytes = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
    if entry.stop - entry.start != nbytes or entry.stop > entry.path.stat().st_size:
        raise PymlaError(f"{entry.path}: tensor {name} does not fit the file; it is truncated, download it again")


def _scales(entries: Mapping[str, Entry], name: str, kind: str, folder: Path) -> Entry:
    """The entry of scales, of a type that a kind of weights has."""
    entry = entries.get(name)
    if entry is None:
        raise PymlaError(f"{folder}: tensor {name} is missing; config.json and weights do not belong together")
    if entry.dtype not in _SCALE_TYPES[kind]:
        raise PymlaError(
            f"{entry.path}: tensor {name} is of type {entry.dtype}; {', '.join(_SCALE_TYPES[kind])} are read"
        )
    _check_bytes(name, entry)
    return entry


def _refuse_scales(name: str, scales: Entry, expected: tuple[int, ...]) -> PymlaError:
    return PymlaError(f"{scales.path}: tensor {name} has shape {scales.shape}; its weights ask for {expected}")


def _e4m3(entries: Mapping[str, Entry], name: str, codes: Entry, folder: Path, block: tuple[int, int]) -> Encoding:
    shape = codes.shape
    if len(shape) < 2:
        raise PymlaError(f"{codes.path}: tensor {name} is float8 of shape {shape}; only matrices are read")
    mistral = name.removesuffix(".weight") + _MISTRAL_SCALE
    scales_name = next((each for each in (name + _SCALE, mistral) if each in entries), name + _SCALE_INV)
    scales = _scales(entries, scales_name, "F8_E4M3", folder)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    blocks = *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
    # Blocks of an expert must not reach into the next one, where they are seen as one matrix.
    if scales.shape == blocks and (len(shape) == 2 or shape[-2] % block[0] == 0):
        shared = block
    elif math.prod(scales.shape) == 1:
        shared = max(1, rows), max(1, columns)
    elif scales_name == name + _SCALE and scales.shape in (shape[:-1], (*shape[:-1], 1)):
        shared = 1, max(1, columns)
    elif len(shape) == 3 and scales.shape in (shape[:1], (shape[0], 1, 1)):
        shared = max(1, shape[1]), max(1, columns)
    else:
        raise _refuse_scales(scales_name, scales, blocks)
    return Encoding("F8_E4M3", shape, codes, scales, shared)


def _int4(entries: Mapping[str, Entry], name: str, codes: Entry, folder: Path, group: int) -> Encoding:
    for suffix in ("_zero_point", "_g_idx"):
        if name + suffix in entries:
            raise PymlaError(f"{folder}: tensor {name + suffix} is there; only symmetric weights in order are read")
    if len(codes.shape) < 2:
        raise PymlaError(f"{codes.path}: tensor {name + _PACKED} has shape {codes.shape}; only matrices are read")
    scales = _scales(entries, name + _SCALE, "INT4", folder)
    columns = _INT4_COLUMNS * codes.shape[-1]
    if scales.shape != (*codes.shape[:-1], columns // group) or columns % group or group % _INT4_COLUMNS:
        raise _refuse_scales(name + _SCALE, scales, (*codes.shape[:-1], columns // group))
    return Encoding("INT4", (*codes.shape[:-1], columns), codes, scales, (1, group))


def _mxfp4(entries: Mapping[str, Entry], name: str, codes: Entry, folder: Path) -> Encoding:
    if len(codes.shape) < 2:
        raise PymlaError(f"{codes.path}: tensor {name} has shape {codes.shape}; only matrices are read")
    scales = _scales(entries, name + _SCALE, "MXFP4", folder)
    columns = _MXFP4_COLUMNS * codes.shape[-1]
    if scales.shape != (*codes.shape[:-1], columns // MX_GROUP) or columns % MX_GROUP:
        raise _refuse_scales(name + _SCALE, scales, (*codes.shape[:-1], columns // MX_GROUP))
    return Encoding("MXFP4", (*codes.shape[:-1], columns), codes, scales, (1, MX_GROUP))
