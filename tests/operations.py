"""Calls of every public operation of a backend, with arguments that fit and with spoiled ones."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.pages import CACHE_TYPES, PAGE, Step
from pymla.reference.quant import quantise
from pymla.tensor import QTensor

#: Types of matrices and of others beside them. Few, and those that `test_experts` compiles as well: kernels for two
#: types take seconds, and checks of arguments know only the sizes of a type's blocks.
MATRIX_TYPES = (ggml.F32, ggml.Q8_0), (ggml.Q4_0, ggml.Q8_0), (ggml.Q4_0, ggml.BF16), (ggml.F16, ggml.F16)


def tensor(rng, qtype, *shape):
    return QTensor(qtype, quantise(rng.standard_normal(shape, dtype=np.float32), qtype))


def floats(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def unset(*shape):
    return np.full(shape, np.nan, np.float32)


def sizes(rng, *most):
    return [int(rng.integers(1, size + 1)) for size in most]


def step_of(rng, tokens, pages, slots):
    """Tokens of one or two sequences, at any position in their pages."""
    sequences = min(tokens, int(rng.integers(1, 3)))
    seq_of = np.sort(rng.integers(0, sequences, tokens)).astype(np.int32)
    positions = rng.integers(0, pages * PAGE, tokens).astype(np.int32)
    tables = rng.integers(0, slots // PAGE, (sequences, pages)).astype(np.int32)
    return Step(positions, positions, seq_of, positions, tables)


def latent(rng, backend, rank, rope, slots):
    """A latent cache of a type, with rows in it."""
    name = list(CACHE_TYPES)[rng.integers(len(CACHE_TYPES))]
    qtype = CACHE_TYPES[name]
    layout = [(qtype, rank), (ggml.F16 if ggml.BLOCK_SIZE[qtype] > 1 else qtype, rope)]
    cache = backend.attention.latent_cache(layout, slots)
    every = backend.memory.to_device(np.arange(slots, dtype=np.int32))
    for rows, width in zip(cache, (rank, rope), strict=True):
        backend.attention.store(backend.memory.to_device(floats(rng, slots, width)), every, rows)
    return cache


def index(rng, backend, width, slots):
    """A cache of the indexer's keys of a type, with rows in it."""
    qtype = (ggml.F32, ggml.F16, ggml.BF16, ggml.Q8_0)[rng.integers(4)]
    keys = backend.attention.index_cache(qtype, width, slots)
    every = backend.memory.to_device(np.arange(slots, dtype=np.int32))
    backend.attention.store(backend.memory.to_device(floats(rng, slots, width)), every, keys)
    return keys


class Case(NamedTuple):
    """Sizes and types of one call of every operation."""

    tokens: int
    heads: int
    rows: int
    columns: int
    nope: int
    v: int
    rank: int
    rope: int
    qtype: int
    other: int  # another type of matrices

    @classmethod
    def draw(cls, rng):
        tokens, heads = sizes(rng, 7, 3)
        rows, columns, nope, v = (16 * size for size in sizes(rng, 3, 3, 3, 3))
        qtype, other = MATRIX_TYPES[rng.integers(len(MATRIX_TYPES))]
        (rank,) = sizes(rng, 2)
        return cls(tokens, heads, rows, 2 * columns, nope, v, 32 * rank, 16, qtype, other)


def calls(rng, backend):
    """(operation, arguments by name) for every operation, of random sizes that fit."""
    case = Case.draw(rng)
    yield from _products(rng, backend.quant, case)
    yield from _norms(rng, backend, case)
    yield from _experts(rng, backend.moe, case)
    yield from _attention(rng, backend, case)


def _products(rng, quant, s):
    yield (
        quant.matmul,
        {
            "w": tensor(rng, s.qtype, s.rows, s.columns),
            "activation": floats(rng, s.tokens, s.columns),
            "out": unset(s.tokens, s.rows),
        },
    )
    yield (
        quant.matmul_heads,
        {
            "w": tensor(rng, s.qtype, s.heads, s.rows, s.columns),
            "x": floats(rng, s.tokens, s.heads, s.columns),
            "out": unset(s.tokens, s.heads, s.rows),
        },
    )
    yield (
        quant.matmul_heads_transposed,
        {
            "w": tensor(rng, s.qtype, s.heads, s.rows, s.columns),
            "x": floats(rng, s.tokens, s.heads, s.rows),
            "out": unset(s.tokens, s.heads, s.columns),
        },
    )
    yield (
        quant.embedding_rows,
        {
            "w": tensor(rng, s.qtype, s.rows, s.columns),
            "tokens": rng.integers(0, s.rows, s.tokens).astype(np.int32),
            "scale": 2.0,
            "out": unset(s.tokens, s.columns),
        },
    )


def _norms(rng, backend, s):
    norm, rope = backend.norm, backend.rope
    for operation in (norm.rms_norm, norm.normed):
        yield (
            operation,
            {
                "x": floats(rng, s.tokens, s.columns),
                "weight": floats(rng, s.columns),
                "eps": 1e-5,
                "out": unset(s.tokens, s.columns),
            },
        )
    yield (
        norm.layer_norm,
        {
            "x": floats(rng, s.tokens, s.columns),
            "weight": floats(rng, s.columns),
            "bias": floats(rng, s.columns),
            "eps": 1e-5,
            "out": unset(s.tokens, s.columns),
        },
    )
    yield norm.add, {"x": floats(rng, s.tokens, s.columns), "y": floats(rng, s.tokens, s.columns)}
    yield (
        rope.angles,
        {
            "positions": np.arange(s.tokens, dtype=np.int32),
            "inv_freq": rng.random(8),
            "magnitude": 1.0,
            "out": unset(s.tokens, 8, 2),
        },
    )
    for operation in (rope.rope_interleaved, rope.rope_neox):
        yield operation, {"x": floats(rng, s.tokens, s.heads, 32), "cos_sin": floats(rng, s.tokens, 8, 2)}
    yield (
        rope.temper,
        {
            "x": floats(rng, s.tokens, s.heads, 32),
            "positions": np.arange(s.tokens, dtype=np.int32),
            "scale": 0.1,
            "length": 2,
        },
    )


def _experts(rng, moe, s):
    (experts,) = sizes(rng, 5)
    used = int(rng.integers(1, experts + 1))
    routing = {"scoring_func": "sigmoid", "n_group": 1, "topk_group": 1, "group_score": "max"}
    routing |= {"norm_topk_prob": True, "routed_scaling_factor": 1.5}
    yield (
        moe.router,
        {
            "logits": floats(rng, s.tokens, experts),
            "bias": floats(rng, experts),
            "config": SimpleNamespace(**routing),
            "ids": np.zeros((s.tokens, used), np.int32),
            "weights": unset(s.tokens, used),
        },
    )
    inner = 32 * int(rng.integers(1, 3))
    yield (
        moe.experts,
        {
            "activation": floats(rng, s.tokens, s.columns),
            "ids": rng.integers(0, experts, (s.tokens, used)).astype(np.int32),
            "weights": floats(rng, s.tokens, used),
            "gate": tensor(rng, s.qtype, experts, inner, s.columns),
            "up": tensor(rng, s.qtype, experts, inner, s.columns),
            "down": tensor(rng, s.other, experts, s.columns, inner),
            "out": unset(s.tokens, s.columns),
        },
    )
    yield (
        moe.ffn,
        {
            "activation": floats(rng, s.tokens, s.columns),
            "gate": tensor(rng, s.qtype, inner, s.columns),
            "up": tensor(rng, s.other, inner, s.columns),
            "down": tensor(rng, s.qtype, s.columns, inner),
            "out": unset(s.tokens, s.columns),
        },
    )
    yield moe.relu_squared, {"x": floats(rng, s.tokens, inner)}


def _attention(rng, backend, s):
    """Over a latent cache, over a cache of whole keys and values, and over expanded keys and values."""
    attention, pages = backend.attention, int(rng.integers(1, 4))
    slots, length = PAGE * 5, int(rng.integers(1, pages * PAGE + 1))
    cache, step = latent(rng, backend, s.rank, s.rope, slots), step_of(rng, s.tokens, pages, slots)
    size, out = s.nope + s.rope, unset(s.tokens, s.heads, s.v)
    for operation in (attention.absorbed, attention.absorbed_materialised):
        latents = {"latent": cache.latent, "rope": cache.rope, "step": step, "scale": 0.1}
        q = floats(rng, s.tokens, s.heads, s.rank + s.rope)
        yield operation, {"q": q, **latents, "out": unset(s.tokens, s.heads, s.rank)}
    most = int(rng.integers(1, pages * PAGE + 1))
    chosen = [list(range(p + 1))[-most:] for p in step.positions.tolist()]
    chosen = np.array([each + [-1] * (most - len(each)) for each in chosen], np.int32)
    q = floats(rng, s.tokens, s.heads, s.rank + s.rope)
    latents = {"latent": cache.latent, "rope": cache.rope, "step": step, "chosen": chosen, "scale": 0.1}
    yield attention.sparse, {"q": q, **latents, "out": unset(s.tokens, s.heads, s.rank)}
    keys = index(rng, backend, s.rank, slots)
    indexed = {"q": floats(rng, s.tokens, s.heads, s.rank), "weights": floats(rng, s.tokens, s.heads), "keys": keys}
    yield attention.choose, {**indexed, "step": step, "out": np.zeros((s.tokens, most), np.int32)}
    written = rng.permutation(slots)[: s.tokens].astype(np.int32)
    yield attention.store, {"rows": floats(rng, s.tokens, s.rank), "slots": written, "cache": cache.latent}
    table = rng.integers(0, 5, pages).astype(np.int32)
    yield attention.load, {"cache": cache.latent, "block_table": table, "out": unset(length, s.rank)}
    q = floats(rng, s.tokens, s.heads, size)
    k_b = tensor(rng, s.qtype, s.heads, s.nope, s.rank)
    yield attention.absorb, {"q": q, "k_b": k_b, "out": unset(s.tokens, s.heads, s.rank + s.rope)}
    kind = ggml.F16 if rng.integers(2) else ggml.F32
    whole = {name: on(backend, tensor(rng, kind, slots, s.heads * n)) for name, n in (("keys", size), ("values", s.v))}
    yield attention.full, {"q": q, **whole, "step": step, "scale": 0.1, "out": out}
    v_b = tensor(rng, s.qtype, s.heads, s.v, s.rank)
    for exact in (True, False):
        made = attention.keys_values(length, s.heads, s.nope, s.rope, s.v, exact)
        filling = {"c_kv": floats(rng, length, s.rank), "k_pe": floats(rng, length, s.rope), "k_b": k_b, "v_b": v_b}
        yield attention.expand, {**filling, "out": made}
        attention.expand(*(on(backend, each) for each in filling.values()), made)
        positions = rng.integers(0, length, s.tokens).astype(np.int32)
        yield (
            attention.expanded,
            {"q": q, "keys_values": made, "positions": positions, "scale": 0.1, "out": out},
        )


def on(backend, value):
    """An argument in the memory of a backend, unless the backend made it there."""
    if isinstance(value, QTensor):
        return value._replace(data=on(backend, value.data))
    if isinstance(value, Step):
        return Step(*(on(backend, each) for each in value))
    return backend.memory.to_device(value) if isinstance(value, np.ndarray) else value


def run(backend, operation, arguments):
    """Call an operation with arguments in the host's memory; an `activation` is made of its array."""
    there = {name: on(backend, value) for name, value in arguments.items()}
    if "activation" in there:
        there["activation"] = backend.quant.Activation(there["activation"])
    return operation(**there)


def spoiled(rng, value, indices=True):
    """An argument changed in one way, or None where there is nothing to change; with `indices` perhaps such that
    indices point to nothing."""
    if isinstance(value, QTensor):
        if rng.integers(3) == 0:
            return QTensor(int(rng.choice([0, 1, 2, 3, 8, 12, 14, 30, 77, 1016])), value.data)
        changed = spoiled(rng, value.data, indices)
        return None if changed is None else QTensor(value.qtype, changed)
    if isinstance(value, Step):
        name = ("seq_of", "positions", "block_tables")[rng.integers(3)]
        changed = spoiled(rng, getattr(value, name), indices)
        return None if changed is None else value._replace(**{name: changed})
    if isinstance(value, tuple) and hasattr(value, "_replace"):  # expanded keys and values
        name = value._fields[rng.integers(2)]
        changed = spoiled(rng, getattr(value, name), indices)
        return None if changed is None or hasattr(value, "sizes") else value._replace(**{name: changed})
    if not isinstance(value, np.ndarray) or not value.size:
        return None
    axis, kind = rng.integers(value.ndim), rng.integers(7)
    if kind == 0 and (indices or value.dtype.kind == "f"):  # shorter, which may leave indices nothing to point to
        return np.ascontiguousarray(value.take(range(value.shape[axis] - 1), axis))
    if kind == 1:  # longer
        return np.concatenate([value, value], axis)
    if kind == 2:
        with np.errstate(invalid="ignore"):
            return value.astype([np.float64, np.float16, np.int64, np.uint8, np.int8][rng.integers(5)])
    if kind == 3:  # every other element of an array that is twice as long
        wide = np.repeat(value, 2, axis)
        return wide[(slice(None),) * axis + (slice(None, None, 2),)]
    if kind == 4:
        return value[None] if rng.integers(2) else value.reshape(-1)
    if kind == 5:
        return np.asfortranarray(value) if rng.integers(2) else value[..., ::-1]
    if indices and value.dtype == np.int32:
        changed = value.copy()
        changed.flat[rng.integers(value.size)] = rng.choice([-1, 5, 64, 320, 10**6, -(2**31), 2**31 - 1])
        return changed
    return None


def copied(value):
    return value.copy() if isinstance(value, np.ndarray) else value
