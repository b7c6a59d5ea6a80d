"""Sections of `bench/gpu.py` that compare the GPU's kernels with the reference."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import shapes
from cases import as_multiplied, latent_layout, poisoned_cache, ragged_step, random_qtensor
from shapes import normal

from pymla import ggml, reference
from pymla.pages import CACHE_TYPES, HADAMARD_TYPES, PAGE, Step
from pymla.reference.quant import dequantise
from pymla.tensor import QTensor
from pymla.text.sampling import SamplingParams

INT8 = {"rtol_max": 1e-5, "reason": "the reference multiplies the same int8 activations, in float64"}
EXACT = {"rtol_max": 1e-5, "reason": "order of summation"}
HIDDEN = {"rtol_max": 0.03, "reason": "hidden activations are int8"}
HALF = {"rtol_max": 3e-3, "reason": "queries, softmax weights and float32 rows become float16: 11 bits"}
BFLOAT = {"rtol_max": 1e-2, "reason": "queries and softmax weights become bfloat16: 8 bits"}
WEIGHTS = {"rtol_max": 1e-5, "reason": "exponentials of 2 ulp"}
SAME = {"rtol_max": 1e-30, "reason": "the same integers"}
DRAWS = {"rtol_max": 0.1, "reason": "four standard deviations of the share of the likeliest token"}
SCALE = 0.1


class Sizes(NamedTuple):
    """Of what is checked."""

    types: tuple  # of weights
    rows: int
    hidden: int
    inner: int
    experts: int
    used: int
    heads: int
    many_heads: int
    rank: int
    nope: int
    rope: int
    v: int
    tokens: tuple  # one, few, many
    wide: tuple  # rows and tokens of a product that fills the device with its largest tiles
    lengths: tuple  # of sequences
    index: tuple  # the indexer's heads, numbers of a key, and positions that are chosen
    vocab: int
    draws: int


REAL = Sizes(
    types=ggml.SUPPORTED,
    rows=1003,
    hidden=shapes.HIDDEN,
    inner=shapes.INNER // 256 * 256,
    experts=16,
    used=shapes.USED,
    heads=shapes.HEADS,
    many_heads=128,
    rank=shapes.RANK,
    nope=shapes.NOPE,
    rope=shapes.ROPE,
    v=shapes.V,
    tokens=(1, 5, 100),
    wide=(4000, 1000),
    lengths=(1, 63, 2500, 4097),
    index=(64, 128, 512),
    vocab=102400,
    draws=4096,
)
#: For the simulator: as small as the kernels take.
TOY = Sizes(
    types=(ggml.F16, ggml.Q4_0),
    rows=5,
    hidden=64,
    inner=32,
    experts=4,
    used=2,
    heads=2,
    many_heads=17,
    rank=32,
    nope=16,
    rope=16,
    v=16,
    tokens=(1, 2, 9),
    wide=(5, 9),
    lengths=(1, 35),
    index=(2, 32, 20),
    vocab=300,
    draws=1,
)


def on_device(w):
    """A QTensor there."""
    from pymla.cuda import memory

    return QTensor(w.qtype, memory.to_device(w.data))


def products(records, sizes):
    """Every product with every type: `quant`."""
    from pymla.cuda import memory, quant

    for qtype in sizes.types:
        name = ggml.NAME[qtype]
        w = random_qtensor(qtype, sizes.rows, sizes.hidden)
        there = on_device(w)
        for tokens in sizes.tokens:

            def matmul(w=w, there=there, tokens=tokens):
                x = normal(tokens, sizes.hidden)
                out = memory.empty((tokens, sizes.rows), np.float32)
                quant.matmul(there, quant.Activation(memory.to_device(x)), out)
                seen = reference.quant.Activation(as_multiplied(x, w.qtype).astype(np.float64))
                yield memory.to_host(out), reference.quant.matmul(w, seen, np.empty((tokens, sizes.rows)))

            records.check(f"matmul {name}, {tokens} tokens", matmul, **INT8)

        def wide(qtype=qtype):
            rows, tokens = sizes.wide
            w, x = random_qtensor(qtype, rows, sizes.inner), normal(tokens, sizes.inner)
            out = memory.empty((tokens, rows), np.float32)
            quant.matmul(on_device(w), quant.Activation(memory.to_device(x)), out)
            seen = reference.quant.Activation(as_multiplied(x, qtype).astype(np.float64))
            yield memory.to_host(out), reference.quant.matmul(w, seen, np.empty((tokens, rows)))

        records.check(f"matmul {name}, {sizes.wide[1]} tokens, {sizes.wide[0]} rows", wide, **INT8)

        def embedding(w=w, there=there):
            ids = np.array([sizes.rows - 1, 0, 3, 3], np.int32)
            out = memory.empty((4, sizes.hidden), np.float32)
            quant.embedding_rows(there, memory.to_device(ids), 1.5, out)
            expected = np.empty((4, sizes.hidden), np.float32)
            yield memory.to_host(out), reference.quant.embedding_rows(w, ids, 1.5, expected)

        records.check(f"embedding_rows {name}", embedding, **EXACT)
        # Rows as wide as the latent space, where the type's blocks fit it.
        rank = max(sizes.rank, ggml.BLOCK_SIZE[qtype])
        for tokens in sizes.tokens[::2]:

            def heads(qtype=qtype, rank=rank, tokens=tokens):
                w, x = random_qtensor(qtype, sizes.heads, sizes.v, rank), normal(tokens, sizes.heads, rank)
                out = memory.empty((tokens, sizes.heads, sizes.v), np.float32)
                quant.matmul_heads(on_device(w), memory.to_device(x), out)
                seen = as_multiplied(x.reshape(-1, rank), qtype).reshape(x.shape).astype(np.float64)
                yield memory.to_host(out), reference.quant.matmul_heads(w, seen, np.empty(out.shape))

            def absorb(qtype=qtype, rank=rank, tokens=tokens):
                from pymla.cuda import attention

                k_b = random_qtensor(qtype, sizes.heads, sizes.nope, rank)
                q = normal(tokens, sizes.heads, sizes.nope + sizes.rope)
                out = memory.empty((tokens, sizes.heads, rank + sizes.rope), np.float32)
                attention.absorb(memory.to_device(q), on_device(k_b), out)
                yield memory.to_host(out), reference.attention.absorb(q, k_b, np.empty(out.shape, np.float32))

            records.check(f"matmul_heads {name}, {tokens} tokens", heads, **INT8)
            records.check(f"absorb {name}, {tokens} tokens", absorb, **EXACT)


def layers(records, sizes):
    """`norm`, `rope`, and the router."""
    from pymla.cuda import memory, moe, norm, rope

    tokens = sizes.tokens[-1]

    def rms_norm():
        x, weight = normal(tokens, sizes.hidden), normal(sizes.hidden, seed=1)
        out = memory.empty(x.shape, np.float32)
        norm.rms_norm(memory.to_device(x), memory.to_device(weight), 1e-6, out)
        yield memory.to_host(out), reference.norm.rms_norm(x, weight, 1e-6, np.empty_like(x))

    def layer_norm():
        x, weight, bias = normal(tokens, sizes.hidden), normal(sizes.hidden, seed=1), normal(sizes.hidden, seed=2)
        out = memory.empty(x.shape, np.float32)
        norm.layer_norm(*map(memory.to_device, (x, weight, bias)), 1e-6, out)
        yield memory.to_host(out), reference.norm.layer_norm(x, weight, bias, 1e-6, np.empty_like(x))

    def normed():
        x, y = normal(tokens, sizes.hidden), normal(tokens, sizes.hidden, seed=1)
        weight = normal(sizes.hidden, seed=2)
        there, out = memory.to_device(x), memory.empty(x.shape, np.float32)
        activation = norm.normed(there, memory.to_device(weight), 1e-6, out, memory.to_device(y))
        here, actual = x.copy(), memory.to_host(out)
        yield actual, reference.norm.normed(here, weight, 1e-6, np.empty_like(x), y).x
        yield memory.to_host(there), here
        codes, scale = reference.quant.quantise_activations(actual)
        yield memory.to_host(activation.codes).astype(np.float32), codes.astype(np.float32)
        yield memory.to_host(activation.scales)[..., 0], scale

    def add():
        x, y = normal(tokens, sizes.hidden), normal(tokens, sizes.hidden, seed=1)
        yield memory.to_host(norm.add(memory.to_device(x), memory.to_device(y))), x + y

    def rotated():
        positions = np.linspace(0, 160_000, tokens).astype(np.int32)
        inv_freq = np.geomspace(1, 1e-4, sizes.rope // 2)
        angles = reference.rope.angles(positions, inv_freq, 1.2, np.empty((tokens, sizes.rope // 2, 2), np.float32))
        there = memory.empty(angles.shape, np.float32)
        rope.angles(memory.to_device(positions), memory.to_device(inv_freq), 1.2, there)
        yield memory.to_host(there), angles
        x = normal(tokens, sizes.heads, sizes.nope + sizes.rope)
        for name in ("rope_interleaved", "rope_neox"):
            actual = memory.to_host(getattr(rope, name)(memory.to_device(x), there))
            yield actual, getattr(reference.rope, name)(x.copy(), angles)

    def squared():
        x = normal(tokens, sizes.hidden)
        yield memory.to_host(moe.relu_squared(memory.to_device(x))), reference.moe.relu_squared(x.copy())

    def tempered():
        positions = np.linspace(0, 160_000, tokens).astype(np.int32)
        x = normal(tokens, sizes.heads, sizes.nope + sizes.rope)
        there = rope.temper(memory.to_device(x), memory.to_device(positions), 0.1, 8192)
        yield memory.to_host(there), reference.rope.temper(x.copy(), positions, 0.1, 8192)

    records.check("rms_norm", rms_norm, **EXACT)
    records.check("layer_norm", layer_norm, **EXACT)
    records.check("normed", normed, **EXACT)
    records.check("add", add, **SAME)
    records.check("relu_squared", squared, **SAME)
    records.check("angles, rope_interleaved and rope_neox", rotated, **EXACT)
    records.check("temper", tempered, **EXACT)
    routers = {
        "V2-Lite": (64, 6, {"scoring_func": "softmax"}, False),
        "V2": (160, 6, {"scoring_func": "softmax", "n_group": 8, "topk_group": 3}, False),
        "V3": (256, 8, {"scoring_func": "sigmoid", "n_group": 8, "topk_group": 4, "group_score": "top2"}, True),
        "Kimi-K2": (384, 8, {"scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.8}, True),
    }
    for name, (experts, used, fields, biased) in routers.items():
        plain = {"n_group": 1, "topk_group": 1, "group_score": "max"}
        config = SimpleNamespace(**plain | {"norm_topk_prob": False, "routed_scaling_factor": 1.0} | fields)

        def router(experts=experts, used=used, config=config, biased=biased):
            logits, bias = normal(tokens, experts), normal(experts, seed=1) if biased else None
            expected = np.empty((tokens, used), np.int32), np.empty((tokens, used), np.float32)
            reference.moe.router(logits, bias, config, *expected)
            actual = memory.empty((tokens, used), np.int32), memory.empty((tokens, used), np.float32)
            there = memory.to_device(bias) if biased else None
            moe.router(memory.to_device(logits), there, config, *actual)
            return zip(map(memory.to_host, actual), expected, strict=True)

        records.check(f"router of {name}", router, **WEIGHTS)


def experts(records, sizes):
    """Routed experts, for few tokens and in tiles, and the dense network."""
    from pymla.cuda import memory, moe, quant

    def run(qtype, tokens):
        rng = np.random.default_rng(3)
        ids = np.argsort(rng.random((tokens, sizes.experts)), axis=1)[:, : sizes.used].astype(np.int32)
        weights = rng.random((tokens, sizes.used), dtype=np.float32)
        gate, up = (random_qtensor(qtype, sizes.experts, sizes.inner, sizes.hidden, seed=i) for i in (1, 2))
        # Rows of 256 fit only some models.
        down_type = qtype if sizes.inner % ggml.BLOCK_SIZE[qtype] == 0 else ggml.Q8_0
        down = random_qtensor(down_type, sizes.experts, sizes.hidden, sizes.inner, seed=3)
        x = as_multiplied(normal(tokens, sizes.hidden), qtype).astype(np.float32)
        there, out = quant.Activation(memory.to_device(x)), memory.empty(x.shape, np.float32)
        chosen = memory.to_device(ids), memory.to_device(weights)
        moe.experts(there, *chosen, *map(on_device, (gate, up, down)), out)
        here, expected = reference.quant.Activation(x), np.empty_like(x)
        yield memory.to_host(out), reference.moe.experts(here, ids, weights, gate, up, down, expected)
        one = [QTensor(w.qtype, w.data[0]) for w in (gate, up, down)]
        moe.ffn(there, *map(on_device, one), out)
        yield memory.to_host(out), reference.moe.ffn(here, *one, expected)
        # Two shared experts, whose result is added with that of the others.
        shared = [random_qtensor(qtype, 2 * sizes.inner, sizes.hidden, seed=i) for i in (4, 5)]
        shared.append(random_qtensor(down_type, sizes.hidden, 2 * sizes.inner, seed=6))
        moe.experts(there, *chosen, *map(on_device, (gate, up, down)), out, list(map(on_device, shared)), add=True)
        yield memory.to_host(out), reference.moe.experts(here, ids, weights, gate, up, down, expected, shared, add=True)

    for qtype in sizes.types:
        for tokens in sizes.tokens:
            tolerance = HIDDEN if qtype in ggml.QUANTISED else EXACT
            name = f"experts and ffn {ggml.NAME[qtype]}, {tokens} tokens"
            records.check(name, lambda qtype=qtype, tokens=tokens: run(qtype, tokens), **tolerance)


def attention(records, sizes):
    """Every form of attention with every type of cache; rows that no token may see are NaN."""
    from pymla.cuda import attention as forms
    from pymla.cuda import memory

    size, pages = sizes.nope + sizes.rope, sum(-(-n // PAGE) for n in sizes.lengths) + 2
    single, several = (1,) * len(sizes.lengths), tuple(min(n, sizes.tokens[-1]) for n in sizes.lengths)

    def run(form, layout, heads, wide, narrow, new, some_heads):
        step = ragged_step(sizes.lengths, new, pages)
        cache = poisoned_cache(layout, step, sizes.lengths, pages)
        q = normal(len(step.positions), heads, wide, seed=2)
        out = memory.empty((len(q), heads, narrow), np.float32)
        there = map(on_device, cache)
        getattr(forms, form)(memory.to_device(q), *there, Step(*map(memory.to_device, step)), SCALE, out)
        # Of many heads the reference computes some.
        compute = getattr(reference.attention, form)
        expected = np.empty((len(q), some_heads, narrow), np.float32)
        yield memory.to_host(out)[:, -some_heads:], compute(q[:, -some_heads:].copy(), *cache, step, SCALE, expected)

    for cache_type, qtype in CACHE_TYPES.items():
        tensor_cores = BFLOAT if cache_type == "bf16" else HALF
        latent = latent_layout(cache_type, sizes.rank, sizes.rope)
        whole = (qtype, sizes.heads * size), (qtype, sizes.heads * sizes.v)
        sized = {"heads": sizes.heads, "wide": sizes.rank + sizes.rope, "narrow": sizes.rank, "some_heads": sizes.heads}
        of_full = sized | {"wide": size, "narrow": sizes.v}
        cases = {
            "absorbed, single tokens": ("absorbed", latent, {"new": single} | sized, tensor_cores),
            "absorbed, prompts": ("absorbed", latent, {"new": several} | sized, tensor_cores),
            "absorbed, many heads": (
                "absorbed", latent, sized | {"new": single, "heads": sizes.many_heads, "some_heads": 2}, tensor_cores,
            ),
            "absorbed_materialised": ("absorbed_materialised", latent, {"new": single} | sized, EXACT),
        }  # fmt: skip
        if qtype not in HADAMARD_TYPES:
            cases["full, single tokens"] = ("full", whole, {"new": single} | of_full, EXACT)
            cases["full, prompts"] = ("full", whole, {"new": several} | of_full, tensor_cores)
        for name, (form, layout, options, tolerance) in cases.items():
            if layout is whole and (size % ggml.BLOCK_SIZE[qtype] or sizes.v % ggml.BLOCK_SIZE[qtype]):
                continue  # such a cache does not exist

            def case(form=form, layout=layout, options=options):
                return run(form, layout, **options)

            records.check(f"{name}, {cache_type} cache", case, **tolerance)

        def stored(layout=latent):
            for qtype, width in layout:
                rows, slots = normal(5, width), np.array([3, 70, 64, 127, 1], np.int32)
                cache = QTensor(qtype, np.zeros((2 * PAGE, ggml.row_bytes(qtype, width)), np.uint8))
                there = on_device(cache)
                forms.store(memory.to_device(rows), memory.to_device(slots), there)
                reference.attention.store(rows, slots, cache)
                yield memory.to_host(there.data), cache.data
                table, expected = np.array([1], np.int32), np.empty((3, width), np.float32)
                out = memory.empty(expected.shape, np.float32)
                forms.load(there, memory.to_device(table), out)
                yield memory.to_host(out), reference.attention.load(cache, table, expected)

        records.check(f"store and load, {cache_type} cache", stored, **SAME)

    def expanded():
        length, tokens, heads = sizes.lengths[-1], sizes.tokens[-1], sizes.heads
        k_b, v_b = (random_qtensor(ggml.Q4_0, heads, rows, max(sizes.rank, 32)) for rows in (sizes.nope, sizes.v))
        c_kv, k_pe = normal(length, max(sizes.rank, 32)), normal(length, sizes.rope, seed=1)
        own = forms.keys_values(length, heads, sizes.nope, sizes.rope, sizes.v, True)
        forms.expand(memory.to_device(c_kv), memory.to_device(k_pe), on_device(k_b), on_device(v_b), own)
        seen = as_multiplied(c_kv, ggml.Q4_0).astype(np.float32)
        rows = reference.attention.keys_values(length, heads, sizes.nope, sizes.rope, sizes.v, True)
        reference.attention.expand(seen, k_pe, k_b, v_b, rows)
        for mine, other in zip(own, rows, strict=True):
            yield memory.to_host(mine), other
        q, positions = normal(tokens, heads, size), np.arange(length - tokens, length, dtype=np.int32)
        out = memory.empty((tokens, heads, sizes.v), np.float32)
        forms.expanded(memory.to_device(q), own, memory.to_device(positions), SCALE, out)
        yield (
            memory.to_host(out),
            reference.attention.expanded(q, rows, positions, SCALE, np.empty(out.shape, np.float32)),
        )

    records.check("expand and expanded", expanded, **HALF)


def sparse(records, sizes):
    """The indexer's choice over every type of keys, and attention over chosen positions with every type of cache; rows
    that no token may see, or that were not chosen, are NaN."""
    from pymla.cuda import attention as forms
    from pymla.cuda import memory

    heads, width, most = sizes.index
    pages = sum(-(-n // PAGE) for n in sizes.lengths) + 2
    single, several = (1,) * len(sizes.lengths), tuple(min(n, sizes.tokens[-1]) for n in sizes.lengths)

    def choose(qtype, new, whole):
        """The scores of the chosen positions beside the largest ones; of small whole numbers, which nothing rounds, the
        positions themselves."""
        step = ragged_step(sizes.lengths, new, pages)
        (keys,) = poisoned_cache([(qtype, width)], step, sizes.lengths, pages)
        q, weights = normal(len(step.positions), heads, width), normal(len(step.positions), heads, seed=1)
        if whole:
            rows = keys.data.view(np.float32)
            q, weights, rows[...] = np.rint(q), np.rint(weights), np.rint(rows)
        out = memory.to_device(np.zeros((len(q), most), np.int32))
        forms.choose(*map(memory.to_device, (q, weights)), on_device(keys), Step(*map(memory.to_device, step)), out)
        actual, expected = memory.to_host(out), np.empty((len(q), most), np.int32)
        reference.attention.choose(q.astype(np.float64), weights.astype(np.float64), keys, step, expected)
        yield actual < 0, expected < 0
        if whole:
            yield actual, expected
            return
        for t in range(len(q)):
            count = min(most, int(step.positions[t]) + 1)
            table = step.block_tables[step.seq_of[t]]
            found = [each[t, :count] for each in (actual, expected)]
            yield np.diff(found[0], prepend=-1) > 0, np.ones(count)
            rows = [dequantise(keys.data[table[p // PAGE] * PAGE + p % PAGE], qtype) for p in found]
            yield tuple(np.sort(weights[t] @ np.maximum(q[t] @ each.T, 0)) for each in rows)

    for qtype in (ggml.F32, ggml.F16, ggml.BF16, ggml.Q8_0):
        tolerance = {ggml.F32: EXACT, ggml.BF16: BFLOAT}.get(qtype, HALF)
        for name, new in (("single tokens", single), ("prompts", several)):
            case = f"choose, {name}, {ggml.NAME[qtype]} keys"
            records.check(case, lambda qtype=qtype, new=new: choose(qtype, new, False), **tolerance)
    for name, new in (("single tokens", single), ("prompts", several)):
        records.check(f"choose, {name}, equal scores", lambda new=new: choose(ggml.F32, new, True), **SAME)

    def attend(layout, new, heads):
        step, rng = ragged_step(sizes.lengths, new, pages), np.random.default_rng(4)
        chosen = np.full((len(step.positions), most), -1, np.int32)
        for row, position in zip(chosen, step.positions, strict=True):
            count = min(most, int(position) + 1)
            row[:count] = np.sort(rng.choice(position + 1, count, replace=False))
        cache = poisoned_cache(layout, step, sizes.lengths, pages)
        kept = np.unique(
            np.concatenate(
                [
                    step.block_tables[sequence, row[row >= 0] // PAGE] * PAGE + row[row >= 0] % PAGE
                    for sequence, row in zip(step.seq_of, chosen, strict=True)
                ]
            )
        )
        for rows in cache:
            data = rows.data[kept]
            rows.data[...] = 0xFF
            rows.data[kept] = data
        q = normal(len(chosen), heads, sizes.rank + sizes.rope, seed=2)
        out, there = memory.empty((len(q), heads, sizes.rank), np.float32), map(on_device, cache)
        arrays = Step(*map(memory.to_device, step))
        forms.sparse(memory.to_device(q), *there, arrays, memory.to_device(chosen), SCALE, out)
        expected = np.empty((len(q), 2, sizes.rank), np.float32)
        last = q[:, -2:].copy()
        yield memory.to_host(out)[:, -2:], reference.attention.sparse(last, *cache, step, chosen, SCALE, expected)

    for cache_type in CACHE_TYPES:
        tolerance = BFLOAT if cache_type == "bf16" else HALF
        layout = latent_layout(cache_type, sizes.rank, sizes.rope)
        for name, new in (("single tokens", single), ("prompts", several)):
            case = f"sparse, {name}, {cache_type} cache"
            records.check(case, lambda layout=layout, new=new: attend(layout, new, sizes.many_heads), **tolerance)


def sampling(records, sizes):
    """The likeliest token, and the distribution of draws."""
    from pymla.cuda import memory
    from pymla.cuda import sampling as there

    def greedy():
        logits = normal(3, sizes.vocab)
        out = memory.to_host(there.greedy(memory.to_device(logits), memory.empty((3, 2), np.int32)))
        yield out[:, 0], logits.argmax(1)
        largest = logits.max(1)
        expected = -np.log(np.exp(logits - largest[:, None]).sum(1))
        yield out[:, 1].copy().view(np.float32), expected

    def draws():
        """Every row has a token of probability 1/4 beside 20 of equal ones that top-k keeps."""
        logits = np.full((sizes.draws, sizes.vocab), -9, np.float32)
        logits[:, 7] = np.log(20 / 3)
        logits[:, 100 : 100 + 20] = 0
        params = SamplingParams(temperature=1, top_k=21, top_p=1, min_p=0, seed=1)
        state = there.new_state(list(range(sizes.draws)))
        out = memory.empty((sizes.draws, 2), np.int32)
        tokens = memory.to_host(there.sample(memory.to_device(logits), params, state, out))[:, 0]
        allowed = (tokens == 7) | ((tokens >= 100) & (tokens < 120))
        yield allowed.astype(float), np.ones(sizes.draws)
        if sizes.draws > 1000:
            yield np.mean(tokens == 7), 0.25

    records.check("greedy", greedy, **WEIGHTS)
    records.check("sample", draws, **DRAWS)
