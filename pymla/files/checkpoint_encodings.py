"""How the files of a checkpoint store a weight: as floats, or as codes with scales, which are tensors of their own.

| kind | codes of tensor ``x`` | scales | in |
| --- | --- | --- | --- |
| F64, F32, F16, BF16 | ``x`` | | |
| F8_E4M3 | ``x`` | ``x_scale_inv`` or ``x_scale``: of blocks, rows, experts or all of it | DeepSeek V3, GLM-5 |
| INT4 | ``x_packed``, I32: eight columns in a word | ``x_scale``: of groups of columns | Kimi-K2-Thinking |
| MXFP4 | ``x_packed`` or ``x``, U8 or I8: two columns in a byte | ``x_scale``: E8M0, of 32 columns | Quark, K3 |
| NVFP4 | ``x``, U8: two columns in a byte | ``x_scale``: E4M3, of 16 columns; ``x_scale_2`` | DeepSeek-R1-NVFP4 |
| GPTQ, AWQ | ``m.qweight``, I32, with columns first | ``m.scales``, ``m.qzeros``: of groups | DeepSeek-R1-AWQ |

INT4 is ``pack-quantized`` of compressed-tensors, symmetric; MXFP4 its ``mxfp4-pack-quantized``, or AMD Quark's. NVFP4
is that of NVIDIA's Model Optimizer; a scale is the product of both. Mistral calls the scale of ``m.weight``
``m.qscale_weight`` in files of its own. `pymla.files.int4_columns` describes GPTQ and AWQ, which have no ``m.weight``.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pymla.errors import PymlaError
from pymla.small_floats import MX_GROUP, NV_GROUP

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
    "NVFP4": ("F8_E4M3",),
    "GPTQ": ("F16", "BF16", "F32"),
    "AWQ": ("F16", "BF16", "F32"),
}
#: Columns, or rows, of a word of INT4, GPTQ and AWQ, and of a byte of MXFP4 and NVFP4.
INT4_COLUMNS, _FP4_COLUMNS = 8, 2

#: What is in place of ``.weight`` in the names of GPTQ's and AWQ's tensors.
QWEIGHT, QZEROS, SCALES, GROUPS = ".qweight", ".qzeros", ".scales", ".g_idx"
_WEIGHT, _FACTOR = ".weight", "_scale_2"
_PACKED, _SCALE_INV, _SCALE, _MISTRAL_SCALE = "_packed", "_scale_inv", "_scale", ".qscale_weight"
#: Tensors beside the codes of a weight.
_BESIDE = (_SCALE_INV, _SCALE, _FACTOR, "_shape", "_zero_point", "_g_idx")
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
    zeros_from: int = 1  # what GPTQ's zero points lack


class Encoding(NamedTuple):
    """How a weight is stored."""

    kind: str  # of the table above
    shape: tuple[int, ...]  # of the weight
    codes: Entry
    scales: Entry | None = None
    block: tuple[int, int] = (1, 1)  # rows and columns that share a scale, all leading dimensions being rows
    zeros: Entry | None = None  # zero points of GPTQ and AWQ
    zeros_from: int = 0  # what they lack
    groups: Entry | None = None  # the group of each column of GPTQ
    factor: Entry | None = None  # of all scales of NVFP4


def weights(entries: Mapping[str, Entry]) -> set[str]:
    """Names of the weights among all tensors of a checkpoint."""
    found = set()
    for name in entries:
        base = next((name.removesuffix(suffix) for suffix in _BESIDE if name.endswith(suffix)), None)
        if base is not None and (base in entries or base + _PACKED in entries):
            continue
        if name.endswith(_MISTRAL_SCALE) and f"{name.removesuffix(_MISTRAL_SCALE)}.weight" in entries:
            continue
        module = next(
            (name.removesuffix(each) for each in (QWEIGHT, QZEROS, SCALES, GROUPS) if name.endswith(each)), ""
        )
        if module + QWEIGHT in entries:
            found.add(module + _WEIGHT)
        elif not name.endswith(_UNUSED):
            found.add(name.removesuffix(_PACKED))
    return found


def encoding(entries: Mapping[str, Entry], name: str, folder: Path, quantisation: Quantisation) -> Encoding:
    """How a weight is stored.

    Raises
    ------
    PymlaError
        The weight or its scales are missing, of a type or a shape that is not read, or truncated.
    """
    if name.removesuffix(_WEIGHT) + QWEIGHT in entries:
        return _by_columns(entries, name.removesuffix(_WEIGHT), folder, quantisation.zeros_from)
    packed = entries.get(name + _PACKED)
    codes = packed or entries.get(name)
    if codes is None:
        raise PymlaError(f"{folder}: tensor {name} is missing; config.json and weights do not belong together")
    codes_name = name + _PACKED if packed else name
    if packed and packed.dtype == "I32":
        found = _int4(entries, name, packed, folder, quantisation.group)
    elif codes.dtype in _BYTES and name + _FACTOR in entries:
        found = _nvfp4(entries, name, codes, folder)
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
    columns = INT4_COLUMNS * codes.shape[-1]
    if scales.shape != (*codes.shape[:-1], columns // group) or columns % group or group % INT4_COLUMNS:
        raise _refuse_scales(name + _SCALE, scales, (*codes.shape[:-1], columns // group))
    return Encoding("INT4", (*codes.shape[:-1], columns), codes, scales, (1, group))


def _mxfp4(entries: Mapping[str, Entry], name: str, codes: Entry, folder: Path) -> Encoding:
    return _fp4(entries, name, codes, folder, "MXFP4", MX_GROUP)


def _nvfp4(entries: Mapping[str, Entry], name: str, codes: Entry, folder: Path) -> Encoding:
    factor = entries[name + _FACTOR]
    if factor.dtype != "F32" or math.prod(factor.shape) != 1:
        raise PymlaError(
            f"{factor.path}: tensor {name + _FACTOR} is of type {factor.dtype}, shape {factor.shape}; one F32 is read"
        )
    _check_bytes(name + _FACTOR, factor)
    return _fp4(entries, name, codes, folder, "NVFP4", NV_GROUP)._replace(factor=factor)


def _fp4(entries: Mapping[str, Entry], name: str, codes: Entry, folder: Path, kind: str, group: int) -> Encoding:
    if len(codes.shape) < 2:
        raise PymlaError(f"{codes.path}: tensor {name} has shape {codes.shape}; only matrices are read")
    scales = _scales(entries, name + _SCALE, kind, folder)
    columns = _FP4_COLUMNS * codes.shape[-1]
    if scales.shape != (*codes.shape[:-1], columns // group) or columns % group:
        raise _refuse_scales(name + _SCALE, scales, (*codes.shape[:-1], columns // group))
    return Encoding(kind, (*codes.shape[:-1], columns), codes, scales, (1, group))


def _by_columns(entries: Mapping[str, Entry], module: str, folder: Path, zeros_from: int) -> Encoding:
    """GPTQ, whose words hold columns, or AWQ, whose words hold rows: the number of scales says which."""
    codes, scales = entries[module + QWEIGHT], _scales(entries, module + SCALES, "GPTQ", folder)
    if codes.dtype != "I32" or len(codes.shape) != 2 or len(scales.shape) != 2 or not all(scales.shape):
        raise PymlaError(f"{codes.path}: tensor {module + QWEIGHT} is of type {codes.dtype} and shape {codes.shape}")
    rows, is_gptq = scales.shape[1], codes.shape[1] == scales.shape[1]
    columns = codes.shape[0] * (INT4_COLUMNS if is_gptq else 1)
    group, rest = divmod(columns, scales.shape[0])
    if rest or not group or group % INT4_COLUMNS or rows % INT4_COLUMNS:
        raise _refuse_scales(module + SCALES, scales, (max(1, columns // 128), rows))
    if not is_gptq and codes.shape[1] * INT4_COLUMNS != rows:
        raise _refuse_scales(module + SCALES, scales, (scales.shape[0], codes.shape[1] * INT4_COLUMNS))
    zeros, groups = entries.get(module + QZEROS), entries.get(module + GROUPS)
    if zeros is None or zeros.dtype != "I32" or zeros.shape != (scales.shape[0], rows // INT4_COLUMNS):
        raise PymlaError(f"{folder}: tensor {module + QZEROS} is missing or of another shape than its scales ask for")
    if groups is not None and (groups.dtype != "I32" or groups.shape != (columns,)):
        raise PymlaError(f"{groups.path}: tensor {module + GROUPS} is of type {groups.dtype} and shape {groups.shape}")
    for suffix, entry in ((QWEIGHT, codes), (QZEROS, zeros), (GROUPS, groups)):
        if entry is not None:
            _check_bytes(module + suffix, entry)
    kind, start = ("GPTQ", zeros_from) if is_gptq else ("AWQ", 0)
    return Encoding(kind, (rows, columns), codes, scales, (1, group), zeros, start, groups)
