"""Sections of `bench/gpu.py` that measure the GPU and its kernels, in the sizes of DeepSeek-V2-Lite.

Launches are timed by events on the device. Several of them are recorded as a graph, so that the host is never the
slower one, and go through copies of their matrix, which come from memory and not from the second-level cache.
"""

import statistics
import time

import numpy as np
from gpu_checks import SCALE, on_device
from shapes import EXPERTS, HEADS, HIDDEN, INNER, MATRICES, NOPE, RANK, ROPE, USED, V, matrix, normal

from pymla import ggml
from pymla.pages import CACHE_TYPES, PAGE, Step
from pymla.reference.quant import quantise
from pymla.tensor import QTensor

#: Bytes that are gone through before a matrix is used again: several times the second-level cache.
COLD = 256 << 20
#: Sizes of DeepSeek-V3.2's sparse attention: heads and numbers of the indexer, chosen positions, heads.
INDEX_HEADS, INDEX_WIDTH, CHOSEN, SPARSE_HEADS = 64, 128, 2048, 128
#: Launches of a graph, at least, and from Python, for their time.
LAUNCHES, HOST_LAUNCHES = 16, 1000


def device(records, simulate):
    """What the device is, and its limits."""
    from pymla import cuda
    from pymla.cuda import limits, norm
    from pymla.cuda.memory import zeros
    from pymla.cuda.runtime.driver import synchronise

    for name, value in cuda.describe().items():
        records.add("fact", name, str(value), value=value)
    if simulate:
        return
    found = limits.measure()
    facts = {"copy bandwidth, TB/s": found.read / 1e12, "int8 on tensor cores, TOP/s": 2 * found.int8 / 1e12}
    x, y = zeros((1, 32), np.float32), zeros((1, 32), np.float32)
    facts["launch in a graph, µs"] = 1e6 * seconds([lambda: norm.add(x, y)] * (16 * LAUNCHES))
    synchronise()
    began = time.perf_counter()
    for _ in range(HOST_LAUNCHES):
        norm.add(x, y)
    facts["launch from Python, µs"] = 1e6 * (time.perf_counter() - began) / HOST_LAUNCHES
    synchronise()
    for name, value in facts.items():
        records.add("fact", name, f"{value:.2f}", value=round(value, 3))


def seconds(runs):
    """Seconds of one of several functions' launches, on the device."""
    from pymla.cuda import limits
    from pymla.cuda.graph import Graph

    runs = runs * -(-LAUNCHES // len(runs))

    def all_of_them():
        for run in runs:
            run()

    graph = Graph(all_of_them)
    graph.replay()  # calls them; the next one records
    return statistics.median(limits.seconds(graph.replay)) / len(runs)


def cold(w):
    """As many copies of a matrix on the device as fill `COLD` bytes."""
    from pymla.cuda import memory

    def again():
        data = memory.empty(w.data.shape, w.data.dtype)
        memory.copy(w.data, data)
        return QTensor(w.qtype, data)

    return [w, *(again() for _ in range(min(LAUNCHES, COLD // w.data.nbytes)))]


def kernels(records, quick):
    """Times of the kernels that a step spends its time in."""
    from pymla.cuda import limits

    found = limits.measure()
    types = (ggml.Q4_0, ggml.Q8_0) if quick else ggml.SUPPORTED
    for qtype in types:
        matvec(records, found, qtype, *MATRICES["output"], tokens=1)
    for tokens in (4,) if quick else (2, 4, 8):
        matvec(records, found, ggml.Q4_0, *MATRICES["output"], tokens=tokens)
    for name, shape in MATRICES.items():
        if name != "output":
            matvec(records, found, ggml.Q4_0, *shape, tokens=1)
    for qtype in types:
        matmul(records, found, qtype, 4096, 4096, 4096)
    for name, shape in MATRICES.items():
        if name != "output":
            matmul(records, found, ggml.Q4_0, *shape, 512)
    for cache_type in ("f16", "q8_0") if quick else CACHE_TYPES:
        decode(records, found, "absorbed", cache_type, 128, 4096, HEADS)
    for sequences, length in ((1, 4096), (1, 32768), (8, 16384), (128, 512)):
        decode(records, found, "absorbed", "f16", sequences, length, HEADS)
    decode(records, found, "absorbed", "f16", 32, 4096, 128)
    decode(records, found, "absorbed_materialised", "f16", 1, 32768, HEADS)
    decode(records, found, "full", "f16", 8, 4096, HEADS)
    for length in (1024, 32768) if quick else (512, 1024, 4096, 16384, 32768):
        prompt(records, length)
    for length in (8192, 131072) if quick else (8192, 32768, 131072):
        for tokens in (1, 512):
            choose(records, found, "f16", tokens, length)
            sparse(records, "f16", tokens, length)
    choose(records, found, "q8_0", 1, 131072)
    for tokens in (1, 512) if quick else (1, 2, 8, 64, 512, 1024):
        experts(records, found, tokens)


def matvec(records, found, qtype, rows, columns, tokens):
    """A product with few tokens, as a share of the copy bandwidth."""

    def measure():
        from pymla.cuda import memory, quant

        copies = cold(on_device(matrix(qtype, rows, columns)))
        x, out = activation(tokens, columns, qtype), memory.empty((tokens, rows), np.float32)
        return seconds([lambda w=w: quant.matmul(w, x, out) for w in copies])

    of_tokens = "" if tokens == 1 else f", {tokens} tokens"
    nbytes = rows * ggml.row_bytes(qtype, columns)
    name = f"matvec {ggml.NAME[qtype]} {rows} × {columns}{of_tokens}"
    records.time(name, measure, amount=nbytes, unit="TB/s", limit=found.read)


def matmul(records, found, qtype, rows, columns, tokens):
    """A product with many tokens, as a share of the int8 rate where it is one."""

    def measure():
        from pymla.cuda import memory, quant

        w = on_device(matrix(qtype, rows, columns))
        x, out = activation(tokens, columns, qtype), memory.empty((tokens, rows), np.float32)
        return seconds([lambda: quant.matmul(w, x, out)])

    operations, quantised = 2 * rows * columns * tokens, qtype in ggml.QUANTISED
    limit = {"unit": "TOP/s", "limit": 2 * found.int8} if quantised else {"unit": "TFLOP/s"}
    records.time(f"matmul {ggml.NAME[qtype]} {rows} × {columns}, {tokens} tokens", measure, amount=operations, **limit)


def activation(tokens, columns, qtype):
    """Activations that are quantised, if the type wants them so."""
    from pymla.cuda import memory, quant

    result = quant.Activation(memory.to_device(normal(tokens, columns)))
    result.input(qtype)
    return result


def decode(records, found, form, cache_type, sequences, length, heads):
    """Attention of one token of each sequence, as a share of the copy bandwidth."""
    qtype = CACHE_TYPES[cache_type]
    if form == "full":
        widths, wide, narrow = ((qtype, heads * (NOPE + ROPE)), (qtype, heads * V)), NOPE + ROPE, V
    else:
        rope_type = ggml.F16 if ggml.BLOCK_SIZE[qtype] > 1 else qtype
        widths, wide, narrow = ((qtype, RANK), (rope_type, ROPE)), RANK + ROPE, RANK
    nbytes = sequences * length * sum(ggml.row_bytes(*each) for each in widths)

    def measure():
        from pymla.cuda import attention, memory

        cache = [rows(each, width, sequences * length) for each, width in widths]
        one = np.arange(sequences, dtype=np.int32)
        tables = np.arange(sequences * length // PAGE, dtype=np.int32).reshape(sequences, -1)
        step = Step(one, np.full(sequences, length - 1, np.int32), one, one, tables)
        step = Step(*map(memory.to_device, step))
        q = memory.to_device(normal(sequences, heads, wide))
        out = memory.empty((sequences, heads, narrow), np.float32)
        return seconds([lambda: getattr(attention, form)(q, *cache, step, SCALE, out)])

    name = f"{form} {cache_type}, {sequences} × {length}, {heads} heads"
    records.time(name, measure, amount=nbytes, unit="TB/s", limit=found.read)


def rows(qtype, width, count):
    """Random cache rows on the device; they repeat after 1000."""
    from pymla.cuda import memory

    some = quantise(normal(1000, width), qtype)
    return QTensor(qtype, memory.to_device(np.resize(some, (count, some.shape[1]))))


def prompt(records, length, tokens=512):
    """Attention of the last tokens of a prompt, of which so many are computed at a time."""

    def measure():
        from pymla.cuda import attention, memory

        kv = attention.keys_values(length, HEADS, NOPE, ROPE, V, True)
        for each in kv:
            memory.write(each, np.resize(normal(1 << 16).astype(np.float16), each.shape))
        q = memory.to_device(normal(tokens, HEADS, NOPE + ROPE))
        positions = memory.to_device(np.arange(length - tokens, length, dtype=np.int32))
        out = memory.empty((tokens, HEADS, V), np.float32)
        return seconds([lambda: attention.expanded(q, kv, positions, SCALE, out)])

    operations = 2 * pairs_of(tokens, length) * HEADS * (NOPE + ROPE + V)
    records.time(f"expanded, {tokens} tokens of {length}", measure, amount=operations, unit="TFLOP/s")


def last_tokens(tokens, length):
    """The step of the last tokens of a sequence, on the device."""
    from pymla.cuda import memory

    positions, zeros = np.arange(length - tokens, length, dtype=np.int32), np.zeros(tokens, np.int32)
    table = np.arange(-(-length // PAGE), dtype=np.int32)[None]
    return Step(*map(memory.to_device, Step(zeros, positions, zeros, positions, table)))


def choose(records, found, cache_type, tokens, length):
    """The indexer's choice, in the sizes of DeepSeek-V3.2: of one token as a share of the copy bandwidth."""

    def measure():
        from pymla.cuda import attention, memory

        step, keys = last_tokens(tokens, length), rows(CACHE_TYPES[cache_type], INDEX_WIDTH, step_slots(length))
        q = memory.to_device(normal(tokens, INDEX_HEADS, INDEX_WIDTH))
        weights, out = memory.to_device(normal(tokens, INDEX_HEADS)), memory.empty((tokens, CHOSEN), np.int32)
        return seconds([lambda: attention.choose(q, weights, keys, step, out)])

    name = f"choose {cache_type}, {tokens} of {length}, {INDEX_HEADS} heads"
    if tokens == 1:
        nbytes = length * ggml.row_bytes(CACHE_TYPES[cache_type], INDEX_WIDTH)
        records.time(name, measure, amount=nbytes, unit="TB/s", limit=found.read)
    else:
        operations = 2 * pairs_of(tokens, length) * INDEX_HEADS * INDEX_WIDTH
        records.time(name, measure, amount=operations, unit="TFLOP/s")


def sparse(records, cache_type, tokens, length):
    """Attention of the last tokens of a sequence over chosen positions, in the sizes of DeepSeek-V3.2."""

    def measure():
        from pymla.cuda import attention, memory

        rng, most, qtype = np.random.default_rng(0), min(CHOSEN, length), CACHE_TYPES[cache_type]
        step, slots = last_tokens(tokens, length), step_slots(length)
        cache = rows(qtype, RANK, slots), rows(qtype, ROPE, slots)
        some = [np.sort(rng.choice(length - tokens + 1, most, replace=False)) for _ in range(min(tokens, 16))]
        chosen = memory.to_device(np.resize(np.array(some, np.int32), (tokens, most)))
        q = memory.to_device(normal(tokens, SPARSE_HEADS, RANK + ROPE))
        out = memory.empty((tokens, SPARSE_HEADS, RANK), np.float32)
        return seconds([lambda: attention.sparse(q, *cache, step, chosen, SCALE, out)])

    operations = 2 * tokens * min(CHOSEN, length) * SPARSE_HEADS * (2 * RANK + ROPE)
    name = f"sparse {cache_type}, {tokens} of {length}, {SPARSE_HEADS} heads"
    records.time(name, measure, amount=operations, unit="TFLOP/s")


def step_slots(length):
    """Slots of whole pages for a sequence."""
    return -(-length // PAGE) * PAGE


def pairs_of(tokens, length):
    """Pairs of the last tokens of a sequence and the positions that they see."""
    return tokens * length - tokens * (tokens - 1) // 2


def experts(records, found, tokens):
    """Routed experts: few tokens as a share of the copy bandwidth, by the experts that they touch, many of int8."""
    rng = np.random.default_rng(0)
    choices = [np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :USED].astype(np.int32) for _ in range(LAUNCHES)]

    def measure():
        from pymla.cuda import memory, moe

        gate, up = (on_device(matrix(ggml.Q4_0, EXPERTS, INNER, HIDDEN)) for _ in range(2))
        down = on_device(matrix(ggml.Q4_0, EXPERTS, HIDDEN, INNER))
        x, out = activation(tokens, HIDDEN, ggml.Q4_0), memory.empty((tokens, HIDDEN), np.float32)
        weights = memory.to_device(rng.random((tokens, USED), dtype=np.float32))
        there = [memory.to_device(ids) for ids in choices]
        return seconds([lambda ids=ids: moe.experts(x, ids, weights, gate, up, down, out) for ids in there])

    name = f"experts Q4_0, {tokens} tokens"
    if tokens <= 8:
        touched = np.mean([len(np.unique(ids)) for ids in choices])
        nbytes = touched * 3 * INNER * ggml.row_bytes(ggml.Q4_0, HIDDEN)
        records.time(name, measure, amount=nbytes, unit="TB/s", limit=found.read)
    else:
        operations = 2 * tokens * USED * 3 * INNER * HIDDEN
        records.time(name, measure, amount=operations, unit="TOP/s", limit=2 * found.int8)
