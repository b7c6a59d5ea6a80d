"""Inputs shared by tests and benchmarks."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace

import numpy as np
from definitions import cached
from make_golden import SHAPES, SPARSE_SHAPES
from make_model import PRESETS, Shape
from random_weights import ONE, put_scales, random_blocks

from pymla import cpu, ggml
from pymla.cpu.matmul.activations import Input
from pymla.cpu.runtime.isa import AMX
from pymla.pages import CACHE_TYPES, PAGE, LatentCache, Step
from pymla.reference.quant import quantise, quantise_activations
from pymla.tensor import QTensor

#: Small models of every structure, for `make_model`. Tests vary them with `dataclasses.replace`.
TINY: dict[str, Shape] = {**SHAPES, **SPARSE_SHAPES, "tiny": PRESETS["tiny"]}

#: Types for tests of whole operations. Among them is one with each value of each of their `features`, which is what the
#: code around a type's own functions knows of it; the functions themselves are tested for every type
#: (tests/test_cpu_formats.py, tests/test_cuda_formats.py).
REPRESENTATIVES: tuple[int, ...] = (
    ggml.F32,
    ggml.F16,
    ggml.Q4_0,
    ggml.Q4_1,
    ggml.Q5_0,
    ggml.Q8_0,
    ggml.Q6_K,
    ggml.Q2_K,
    ggml.Q4_K,
    ggml.IQ4_KS,
)

#: The same for the GPU, whose kernels know less, and which is simulated.
GPU_REPRESENTATIVES: tuple[int, ...] = (
    ggml.F32,
    ggml.F16,
    ggml.Q4_0,
    ggml.Q4_1,
    ggml.Q6_K,
    ggml.Q2_K,
    ggml.IQ4_KS,
)

#: The representatives whose products are taken on integers, and those whose products are taken in float32.
QUANTISED_REPRESENTATIVES = tuple(qtype for qtype in REPRESENTATIVES if qtype in ggml.QUANTISED)
FLOAT_REPRESENTATIVES = tuple(qtype for qtype in REPRESENTATIVES if qtype not in ggml.QUANTISED)

#: Rows of a matrix: one, fewer than a panel of 16, whole panels, and a panel with a rest.
ROWS = (1, 5, 16, 33)

#: Tokens of a step: generation, a small batch, a batch with a rest, more than a page of 64.
TOKENS = (1, 3, 17, 65)


def features(qtype: int) -> dict[str, object]:
    """What products on the CPU know of a type besides its functions."""
    form = cpu.formats.FORMATS[qtype]
    return {
        "bytes of a float": form.number_bytes if qtype in ggml.FLOATS else None,
        "bits of a panel's codes": form.code_bits,
        "weights per scale of a panel": form.scale_each,
        "zero point": form.zero_point > 0,
        "weights per minimum": form.minimum_each,
        "order of activations": form.order,
        "super-blocks": ggml.BLOCK_SIZE[qtype] == 256,
        "row header": ggml.ROW_HEADER[qtype] > 0,
    }


def unrepresented(
    qtypes: Iterable[int], representatives: Iterable[int], features: Callable[[int], dict[str, object]]
) -> list[str]:
    """The types that have a feature which none of the representatives has: their names and the feature."""
    found = {feature for qtype in representatives for feature in features(qtype).items()}
    return [
        f"{ggml.NAME[qtype]}: {name} {value}"
        for qtype in qtypes
        for name, value in features(qtype).items()
        if (name, value) not in found
    ]


def columns(qtype: int) -> tuple[int, ...]:
    """Row lengths that the type's block divides, beginning with a single block."""
    block = max(32, ggml.BLOCK_SIZE[qtype])
    return (256, 768) if block == 256 else (block, 3 * block, 1408)


def random_qtensor(qtype: int, *shape: int, seed: int = 0) -> QTensor:
    """Random weights of mean 0 and standard deviation 1/sqrt(columns).

    Parameters
    ----------
    qtype : a type of ``ggml.SUPPORTED``
    shape : (rows, columns) or (matrices, rows, columns)
    """
    pieces = random_blocks(seed, "case", shape, qtype, shape[-1] ** -0.5)
    data = np.concatenate([piece.reshape(-1).view(np.uint8) for piece in pieces])
    data.flags.writeable = False
    return QTensor(qtype, data.reshape(*shape[:-1], -1))


def with_scales(data: np.ndarray, qtype: int, columns: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Rows of random bytes (..., row_bytes), with scales and minima that are finite: random numbers, or 1."""
    one = ONE[ggml.SCALES[qtype].kind]
    if rng is None:
        table = np.full(256, one)
    elif one.dtype == np.uint8:
        table = rng.integers(one - 20, one + 20, 256, np.uint8)
    else:
        table = rng.standard_normal(256).astype(one.dtype)
    put_scales(data.reshape(-1, ggml.unit_bytes(qtype, columns)), qtype, table, 1.0 if rng is None else 0.7)
    return data


def random_bytes(qtype: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes as rows of blocks, with scales and minima that are finite numbers."""
    rng = np.random.default_rng(seed)
    if qtype in ggml.FLOATS:
        return quantise(rng.standard_normal((rows, columns), dtype=np.float32), qtype)
    data = rng.integers(0, 256, (rows, ggml.row_bytes(qtype, columns)), dtype=np.uint8)
    return with_scales(data, qtype, columns, rng)


def bytes_alike(qtype: int, rows: int, columns: int, byte: int) -> np.ndarray:
    """Rows of blocks whose bytes are all `byte`, but for scales and minima, which are 1."""
    return with_scales(np.full((rows, ggml.row_bytes(qtype, columns)), byte, np.uint8), qtype, columns)


def as_multiplied(x: np.ndarray, qtype: int) -> np.ndarray:
    """The activations (T, K) that a CPU product with `qtype` really sees."""
    if qtype not in ggml.QUANTISED:
        return x
    codes, scale = quantise_activations(x)
    return (codes.reshape(*scale.shape, 32) * scale[..., None]).reshape(x.shape).astype(np.float32)


def panel_codes(x: Input) -> np.ndarray:
    """The codes (T, K) of activations for panels of 4 bits."""
    tokens, k = x.x.shape
    return x.codes.reshape(k // 32, -1, 32)[:, :tokens].transpose(1, 0, 2).reshape(tokens, k) if AMX else x.codes


def ragged_step(lengths, new, pages: int) -> Step:
    """Sequences of some lengths, whose last `new` tokens make the step, on shuffled pages of `pages`. A block table
    names no page behind its sequence's end."""
    order = iter(np.random.default_rng(5).permutation(pages))
    tables = np.full((len(lengths), max(-(-n // PAGE) for n in lengths)), 10**6, np.int32)
    for b, n in enumerate(lengths):
        tables[b, : -(-n // PAGE)] = [next(order) for _ in range(-(-n // PAGE))]
    positions = np.concatenate([np.arange(n - k, n) for n, k in zip(lengths, new, strict=True)]).astype(np.int32)
    seq_of = np.repeat(np.arange(len(lengths), dtype=np.int32), new)
    slots = tables[seq_of, positions // PAGE] * PAGE + positions % PAGE
    return Step(np.zeros_like(positions), positions, seq_of, slots.astype(np.int32), tables)


def latent_layout(cache_type: str, rank: int, rope: int):
    """ggml types and widths of the rows of ``c_kv`` and ``k_pe``."""
    qtype = CACHE_TYPES[cache_type]
    return (qtype, rank), (ggml.F16 if ggml.BLOCK_SIZE[qtype] > 1 else qtype, rope)


def poisoned_cache(layout, step: Step, lengths, pages: int) -> list[QTensor]:
    """A cache of random rows of some ggml types and widths, with NaN in every row that no token of the step may see."""
    seen = np.concatenate(
        [step.block_tables[b, p // PAGE] * PAGE + p % PAGE for b, n in enumerate(lengths) for p in [np.arange(n)]]
    )
    result = []
    for seed, (qtype, width) in enumerate(layout):
        data = np.full((pages * PAGE, ggml.row_bytes(qtype, width)), 0xFF, np.uint8)
        rows = np.random.default_rng(seed).standard_normal((len(seen), width), dtype=np.float32)
        data[seen] = quantise(rows, qtype)
        result.append(QTensor(qtype, data))
    return result


def on_cpu(layout, cache: list[QTensor]) -> LatentCache:
    """A latent cache of ggml blocks with the types that the CPU has for it. Rows that are not numbers are filled with
    bytes of 255, as in `poisoned_cache`."""
    result = cpu.attention.latent_cache(layout, len(cache[0].data))
    for source, target in zip(cache, result, strict=True):
        target.data[:] = 0xFF
        with np.errstate(invalid="ignore"):
            rows = cached(source).astype(np.float32)
        slots = np.flatnonzero(np.isfinite(rows).all(1)).astype(np.int32)
        cpu.attention.store(rows[slots], slots, target)
    return result


def routing(**changes) -> SimpleNamespace:
    """What a router reads of a `ModelConfig`: plain softmax, unless told otherwise."""
    plain = {
        "scoring_func": "softmax",
        "n_group": 1,
        "topk_group": 1,
        "group_score": "max",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    }
    return SimpleNamespace(**plain | changes)


#: Logits of a router with equal ones among them, its `routing`, and the experts that are chosen: of equal experts, and
#: of equal groups, the lower ones.
TIES = {
    "experts": ([0, 1, 1, 0, 1, 1], {}, [1, 2, 4]),
    "all of 48": ([0] * 48, {}, [0, 1, 2, 3, 4, 5, 6]),
    "the last of 300": ([0] * 298 + [5, 5], {}, [298, 299, 0]),
    "groups by their best": ([1, 3, 2, 3, 3, 0, 0, 3], {"n_group": 4, "topk_group": 2}, [1, 3, 2, 0]),
    "groups by two": (
        [0, 0, 0, 2, 1, 0, 1, 0, 2, 0, 2, 1],
        {"scoring_func": "sigmoid", "n_group": 4, "topk_group": 2, "group_score": "top2"},
        [3, 8, 4, 6],
    ),
    "forty groups": ([0, 0, 1, 1] * 20, {"n_group": 40, "topk_group": 3}, [2, 3, 6, 7, 10]),
    "all groups": ([0] * 24, {"n_group": 8, "topk_group": 3, "group_score": "top2"}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
}


def rows_to_norm(columns: int):
    """Rows of ordinary, small, tiny and no values, in float64, a weight, and an eps far above the squares of the tiny
    values."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((4, columns)) * np.array([[1], [1e-2], [1e-6], [0]])
    return x, rng.standard_normal(columns).astype(np.float32), 1e-4
