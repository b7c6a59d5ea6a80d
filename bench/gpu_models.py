"""Sections of `bench/gpu.py` on whole models: logits against the CPU backend, and the sweep."""

import dataclasses
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from make_model import PRESETS, make_model

import pymla
from pymla import ggml
from pymla.engine.model import Model
from pymla.files.gguf_reader import ModelFile
from pymla.measure import sweep as measuring
from pymla.models.config import ModelConfig
from pymla.models.placement import Placement
from pymla.models.weights import Weights
from pymla.tensor import QTensor

LOGITS = {
    "rtol_max": 0.05,
    "reason": "16-bit factors, and int8 activations a step apart; without the tenth of the tokens that differ most: "
    "where experts are nearly tied, others are chosen",
}
DIVERGENCE = {"rtol_max": 1e-3, "reason": "mean Kullback-Leibler divergence over the tokens, as a share of one nat"}

#: What the sweep runs, its context, and the tokens of its prompts and of generation.
SHAPE, CTX, PROMPT, TG = PRESETS["v2-lite"], 32768, 1024, 128

#: A model as small as the kernels take: a dense layer and one of experts.
SMALL = dataclasses.replace(
    SHAPE,
    name="small",
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=32,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_attention_heads=1,
    vocab_size=260,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
)


def logits(records, simulate):
    """Logits of models made on the spot, and of the demo model, against the CPU's."""
    shape, tokens = (SMALL, 12) if simulate else (dataclasses.replace(SHAPE, num_hidden_layers=3), 300)
    cases = (
        [("f16", "auto")]
        if simulate
        else [(cache, mla) for cache in ("f16", "q8_0") for mla in ("auto", "0", "1", "2")]
    )
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder) / "model.gguf", shape, qtype=ggml.Q4_0)
        ids = np.random.default_rng(1).integers(shape.vocab_size, size=tokens, dtype=np.int32)
        for cache_type, mla in cases:

            def compare(cache_type=cache_type, mla=mla):
                options = {"cache_type": cache_type, "mla": mla, "ctx": 512}
                actual, expected = (
                    step_by_step(path, device, ids, generated=2 if simulate else 6, **options)
                    for device in ("cuda", "cpu")
                )
                worst = np.abs(actual - expected).max(1) / np.abs(expected).max(1)
                kept = worst <= np.quantile(worst, 0.9)
                return [(actual[kept], expected[kept])]

            name = f"{shape.name}, {shape.num_hidden_layers} layers, {cache_type} cache, --mla {mla}"
            records.check(name, compare, **LOGITS)
    if not simulate:
        records.check("demo model", demo_divergence, **DIVERGENCE)


def step_by_step(path, device, ids, generated, **options):
    """Logits after every token: of most as one prompt, of the last ones as they would be generated."""
    with pymla.load(path, device=device, **options) as loaded:
        model = loaded.model
        sequence = model.new_sequence()
        rows = [model.forward([(sequence, ids[:-generated])], logits="all")]
        rows += [model.forward([(sequence, ids[at : at + 1])]) for at in range(len(ids) - generated, len(ids))]
        return np.concatenate(rows).astype(np.float64)


def demo_divergence():
    """The distributions of the demo model on a piece of Python, against the CPU's."""
    text = (Path(pymla.__file__).parent / "text" / "tokenizer.py").read_text(encoding="utf-8")
    found = []
    for device in ("cuda", "cpu"):
        with pymla.load(device=device, cache_type="f16", ctx=512) as model:
            rows = model.logits(model.tokenize(text)[:400]).astype(np.float64)
        rows -= rows.max(1, keepdims=True)
        found.append(rows - np.log(np.exp(rows).sum(1, keepdims=True)))
    actual, expected = found
    # relative_error takes a difference as a share of what is expected: 1 and 1 + the divergence.
    yield 1 + (np.exp(expected) * (expected - actual)).sum(1).mean(), 1.0


def sweep(records, quick):
    """Speed of V2-Lite in Q4_0 with random weights, as the context grows to 32k; with and without a graph."""
    from pymla.cuda import limits
    from pymla.cuda.graph import Graph

    deepest, tg = CTX - PROMPT, TG // 4 if quick else TG
    found = limits.measure()
    with tempfile.TemporaryDirectory() as folder:
        model = v2_lite(Path(folder))
        for graph, depths, pp in (
            ("on", (0, deepest) if quick else (0, *range(CTX // 8, deepest, CTX // 8), deepest), PROMPT),
            ("off", (0, deepest), 0),
        ):
            Graph.enabled = graph == "on"
            for row in measuring.sweep(model, measuring.Settings(pp=pp, tg=tg, depths=depths)):
                pp_share, tg_share = row.shares(found)
                text = f"PP {row.s_pp or 0:8.0f} t/s   TG {row.s_tg:7.1f} t/s, {tg_share:.1%} of copy bandwidth"
                values = {"n_kv": row.n_kv, "pp": pp, "tg": tg, "t_pp": row.t_pp, "t_tg": row.t_tg, "s_pp": row.s_pp}
                values |= {"s_tg": row.s_tg, "pp_share": pp_share, "tg_share": tg_share, "graph": graph}
                records.add("sweep", f"graph {graph}, N_KV {row.n_kv}", text, **values)


def v2_lite(folder):
    """V2-Lite on the device, as `sweep` takes it. Its file has two layers; the others are copies of the second one in
    memory of their own, so that they are read as those of a real model."""
    from pymla.cuda import backend

    path = make_model(folder / "v2-lite-q4_0.gguf", SHAPE, layers=2, qtype=ggml.Q4_0)
    file = ModelFile.open(path)
    small, layers = ModelConfig.from_gguf(file), SHAPE.num_hidden_layers
    config = dataclasses.replace(small, num_hidden_layers=layers)
    weights = Weights.from_gguf(file, small, placement=Placement.on(backend, small.num_hidden_layers))
    last = weights.layers[-1]
    weights = dataclasses.replace(weights, layers=[*weights.layers, *(copied(last) for _ in range(layers - 2))])
    model = Model(config, weights, backend, cache_type="f16", ctx=CTX)
    backend.compile_for(model)
    file = SimpleNamespace(path=path, tensors=repeated(file, layers))
    return SimpleNamespace(config=config, model=model, file=file, device="cuda")


def repeated(file, layers):
    """The tensors of a file of two layers, as if the second came again and again."""
    tensors = dict(file.tensors)
    for name, tensor in file.tensors.items():
        if name.startswith("blk.1."):
            tensors |= {name.replace("blk.1.", f"blk.{i}.", 1): tensor for i in range(2, layers)}
    return tensors


def copied(layer):
    """A layer whose matrices have memory of their own."""
    from pymla.cuda import memory

    def again(tensor):
        if not isinstance(tensor, QTensor):
            return tensor
        data = memory.empty(tensor.data.shape, tensor.data.dtype)
        memory.copy(tensor.data, data)
        return QTensor(tensor.qtype, data)

    return dataclasses.replace(
        layer, **{each.name: again(getattr(layer, each.name)) for each in dataclasses.fields(layer)}
    )
