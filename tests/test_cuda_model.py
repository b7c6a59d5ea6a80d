"""Whole models on the CUDA backend, in the simulator, against the reference's logits.

The models are as small as the kernels allow, and their vocabulary is cut: the simulator takes milliseconds for a block.
Fresh memory is NaN there, so that a cache row which no token should see would show.
"""

import dataclasses
import functools

import numpy as np
import pytest
import simulated  # noqa: F401
from cache_checks import give_way_and_come_back, shift_and_compare
from compare import assert_close
from make_model import Shape, make_model

from pymla import cpu, ggml, reference
from pymla.cuda import backend, memory
from pymla.engine import forward
from pymla.engine.model import Model
from pymla.engine.nextn import Span
from pymla.files.gguf_reader import ModelFile
from pymla.make.imatrix import Collector
from pymla.models.config import ModelConfig
from pymla.models.nextn import with_nextn
from pymla.models.placement import Placement
from pymla.models.weights import Weights
from pymla.text.sampling import SamplingParams

#: A layer of experts, as in V2-Lite.
LITE = Shape(
    name="lite",
    hidden_size=32,
    num_hidden_layers=1,
    intermediate_size=32,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    num_attention_heads=2,
    vocab_size=288,
    first_k_dense_replace=0,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    context_length=128,
    yarn_factor=4.0,
    yarn_original=32,
    mscale_all_dim=0.707,
)
#: Where activations are rounded: no rounding chooses other experts.
ALL_EXPERTS = dataclasses.replace(LITE, name="all-experts", num_experts_per_tok=4)
#: A dense layer and one of experts, as in V3.
V3 = dataclasses.replace(
    ALL_EXPERTS,
    name="v3",
    num_hidden_layers=2,
    first_k_dense_replace=1,
    q_lora_rank=32,
    scoring_func="sigmoid",
    norm_topk_prob=True,
    n_shared_experts=2,
    routed_scaling_factor=2.5,
    n_group=2,
    topk_group=2,
)
TEMPERED = dataclasses.replace(LITE, name="tempered", temperature_scale=0.5, temperature_length=16)
DENSE = dataclasses.replace(LITE, n_routed_experts=0, n_shared_experts=0, yarn_factor=1.0, tie_word_embeddings=True)
MINICPM3 = dataclasses.replace(
    DENSE,
    name="minicpm3",
    architecture="minicpm3",
    num_hidden_layers=2,
    q_lora_rank=32,
    rope_factors=(tuple(1.5 + i for i in range(8)), tuple(1 + 0.1 * i for i in range(8))),
    attention_factor=1.2,
)
PLM = dataclasses.replace(DENSE, name="plm", architecture="plm")
#: Sparse attention. The choice is made in the first layer, from numbers that no backend rounds.
V32 = dataclasses.replace(
    ALL_EXPERTS,
    name="v3.2",
    architecture="deepseek32",
    q_lora_rank=32,
    scoring_func="sigmoid",
    index_topk=8,
    index_n_heads=16,
    index_head_dim=32,
)
GLM = dataclasses.replace(
    V32, name="glm", architecture="glm-dsa", num_hidden_layers=2, indexer_types=("full", "shared")
)
VOCABULARY = 24
IDS = np.random.default_rng(0).integers(VOCABULARY, size=100, dtype=np.int32)

HALF = {"rtol_max": 3e-3, "reason": "attention multiplies float16: 11 bits"}
BFLOAT = {"rtol_max": 1e-2, "reason": "attention multiplies bfloat16: 8 bits"}
CODES = {"rtol_max": 5e-2, "reason": "int8 activations"}


@functools.cache
def file_of(folder, shape, qtype):
    return ModelFile.open(make_model(folder / f"{shape.name}-{qtype}.gguf", shape, qtype=qtype))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def made(folder, shape, qtype, placement, **options):
    """A model of few tokens on a backend or Placement."""
    file = file_of(folder, shape, qtype)
    config = ModelConfig.from_gguf(file)
    nextn = bool(shape.num_nextn_predict_layers)
    config = with_nextn(config, file.tensors) if nextn else config
    if not isinstance(placement, Placement):
        placement = Placement.on(placement, config.num_hidden_layers)
    weights = Weights.from_gguf(file, config, placement=placement, nextn=nextn)
    rows = {name: getattr(weights, name).rows(0, VOCABULARY) for name in ("token_embd", "output")}
    if weights.nextn is not None:
        shared = {"embed_tokens": rows["token_embd"], "shared_head_head": rows["output"]}
        rows["nextn"] = dataclasses.replace(weights.nextn, **shared)
    return Model(
        dataclasses.replace(config, vocab_size=VOCABULARY),
        dataclasses.replace(weights, **rows),
        placement,
        **({"cache_type": "f16", "ctx": 128} | options),
    )


class Pair:
    """The same sequences in a model under test and in the reference."""

    def __init__(self, folder, shape, qtype, placement, **options):
        self.models = [made(folder, shape, qtype, each, **options) for each in (placement, reference)]
        self.sequences = {}

    def step(self, tokens, tolerance, logits="last"):
        """Append ``IDS[a:b]`` to named sequences; compare the logits."""
        results = []
        for model in self.models:
            batch = []
            for name, (start, stop) in tokens.items():
                sequence = self.sequences.setdefault((id(model), name), model.new_sequence())
                batch.append((sequence, IDS[start:stop]))
            results.append(model.forward(batch, logits=logits))
        actual, expected = results
        assert actual.dtype == np.float32
        assert_close(actual, expected, **tolerance)

    def truncate(self, name, length):
        for model in self.models:
            model.cache.truncate(self.sequences[id(model), name], length)


@pytest.mark.parametrize(
    ("shape", "qtype", "cache_type", "tolerance"),
    [
        (LITE, ggml.F32, "f16", HALF),
        (V3, ggml.Q8_0, "q8_0", CODES),
        (TEMPERED, ggml.F32, "f16", HALF),
        (MINICPM3, ggml.F32, "f16", HALF),
        (PLM, ggml.Q8_0, "f16", CODES),
    ],
    ids=["lite", "v3", "tempered", "minicpm3", "plm"],
)
def test_a_prompt_and_generated_tokens(folder, shape, qtype, cache_type, tolerance):
    pair = Pair(folder, shape, qtype, backend, cache_type=cache_type)
    pair.step({"a": (0, 10)}, tolerance, logits="all")
    pair.step({"a": (10, 11)}, tolerance)
    pair.step({"a": (11, 12)}, tolerance)


def test_logits_of_chosen_tokens(folder):
    """Of several sequences, and of a recorded step."""
    pair = Pair(folder, LITE, ggml.F32, backend)
    pair.step({"a": (0, 5), "b": (5, 8)}, HALF, logits=np.array([3, 4, 7]))
    pair.step({"a": (8, 9), "b": (9, 10)}, HALF, logits=np.array([1]))


@pytest.mark.parametrize(
    ("mla", "cache_type", "tolerance"),
    [("0", "f16", HALF), ("1", "bf16", BFLOAT), ("2", "q8_0", HALF), ("3", "f32", HALF)],
)
def test_forms_of_attention_and_cache_types(folder, mla, cache_type, tolerance, monkeypatch):
    # Keys and values of a head at a time.
    monkeypatch.setattr(backend.attention, "heads_at_once", lambda *_: 1)
    pair = Pair(folder, LITE, ggml.F32, backend, cache_type=cache_type, mla=mla)
    pair.step({"a": (0, 9)}, tolerance, logits="all")
    pair.step({"a": (9, 10)}, tolerance)


@pytest.mark.parametrize("shape", [V32, GLM], ids=["v3.2", "glm"])
def test_sparse_attention(folder, shape):
    """A prompt of which the last token chooses, a generated token, and a step of tokens that choose and that do not."""
    pair = Pair(folder, shape, ggml.F32, backend, cache_type="f32", cache_tokens=2 * 64)
    pair.step({"a": (0, 9)}, HALF, logits="all")
    pair.step({"a": (9, 10)}, HALF)
    pair.step({"b": (30, 31), "a": (10, 11)}, HALF)


def test_sparse_attention_over_mixed_rows(folder):
    """Keys of the indexer have 8 bits then, whose rounding changes no choice of all positions but one."""
    pair = Pair(folder, dataclasses.replace(V32, name="v3.2-most", index_topk=9), ggml.F32, backend, cache_type="q4_0")
    pair.step({"a": (0, 9)}, HALF)
    pair.step({"a": (9, 10)}, {"rtol_max": 0.3, "reason": "one position of ten may be another one"})


@pytest.mark.parametrize(
    ("shape", "placement"),
    [(V32, backend), (V3, Placement(cpu, (cpu, backend), (cpu, cpu), backend))],
    ids=["v3.2", "v3, a layer and experts on the processor"],
)
def test_the_nextn_block(folder, shape, placement):
    """Rows that are filled, and a step of two texts behind them, of which one chooses positions in sparse attention."""
    options = {"num_nextn_predict_layers": 1} | ({"index_topk": 2} if shape.index_topk else {})
    shape = dataclasses.replace(shape, name=f"{shape.name}-nextn", **options)
    results = []
    for where in (placement, reference):
        model = made(folder, shape, ggml.F32, where, cache_type="f32", cache_tokens=2 * 64)
        to_host, found = model.backend.memory.to_host, []
        sequences, lasts = [model.new_sequence(), model.new_sequence()], []
        for sequence, count in zip(sequences, (3, 2), strict=True):
            outputs = model.step([(sequence, IDS[:count])], hidden=True)
            found += [to_host(outputs.logits), to_host(outputs.hidden)]
            model.nextn_fill(Span(sequence, 0, IDS[1:count]), outputs.hidden[: count - 1])
            lasts.append(found[-1][-1])
        spans = [Span(each, each.length - 1, IDS[20:21]) for each in sequences]
        results.append(found + [to_host(each) for each in model.nextn_step(spans, np.stack(lasts))])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, **HALF)


def test_a_choice_that_layers_share_goes_to_the_gpu(folder):
    placement = Placement(cpu, (cpu, backend), (cpu, backend), backend)
    pair = Pair(folder, GLM, ggml.F32, placement, cache_type="f32")
    pair.step({"a": (0, 9)}, HALF)
    pair.step({"a": (9, 10)}, HALF)


def test_sequences_in_one_batch(folder):
    """Prompts and generation in one step, in another order than before, over the border of a page."""
    pair = Pair(folder, ALL_EXPERTS, ggml.Q8_0, backend, cache_tokens=4 * 64)
    pair.step({"a": (0, 62), "b": (70, 72)}, CODES)
    pair.step({"b": (72, 73), "c": (80, 87), "a": (62, 65)}, CODES)
    pair.step({"a": (65, 66), "c": (87, 88)}, CODES)


def test_a_recorded_step_of_more_sequences(folder, monkeypatch):
    """The last sequence stands for those that are not there, whose cache it shares."""
    monkeypatch.setattr(backend.Graph, "size", lambda sequences: 3)
    pair = Pair(folder, LITE, ggml.F32, backend, cache_tokens=2 * 64)
    pair.step({"a": (0, 1), "b": (5, 6)}, HALF)
    pair.step({"b": (6, 7)}, HALF)
    pair.step({"a": (1, 2), "b": (7, 8)}, HALF)


def test_sizes_of_recorded_steps():
    sizes = [backend.Graph.size(sequences) for sequences in range(1, 66)]
    assert sizes[:10] == [1, 2, 3, 4, 5, 6, 7, 8, 16, 16]
    assert sizes[-3:] == [64, 64, None]
    assert len(set(sizes)) == 8 + 7 + 1


@pytest.mark.parametrize(("cache_type", "mla"), [("q8_0", "auto"), ("f16", "0")])
def test_rows_that_left_the_cache_come_back_as_they_were(folder, cache_type, mla):
    give_way_and_come_back(made(folder, LITE, ggml.F32, backend).config, backend, cache_type, mla)


@pytest.mark.parametrize(("cache_type", "mla"), [("q8_0", "auto"), ("f16", "0")])
def test_keys_are_turned_by_a_context_shift(folder, cache_type, mla):
    config = dataclasses.replace(made(folder, LITE, ggml.F32, backend).config, num_hidden_layers=1)
    shift_and_compare(config, backend, cache_type, mla, 2e-3, positions=(0, 64, 70))


def test_slices(folder, monkeypatch):
    slices = forward.slices
    monkeypatch.setattr(forward, "slices", lambda start, stop, size: slices(start, stop, min(size, 9)))
    pair = Pair(folder, ALL_EXPERTS, ggml.Q8_0, backend)
    pair.step({"a": (0, 18)}, CODES)


def test_what_was_forgotten_is_not_read(folder):
    pair = Pair(folder, LITE, ggml.F32, backend)
    pair.step({"a": (0, 10)}, HALF)
    pair.truncate("a", 6)
    model = pair.models[0]
    page = pair.sequences[id(model), "a"].pages[0]
    for tensor in model.cache.layers[0]:
        memory.fill(tensor.data[64 * page + 6 : 64 * page + 64], 255)
    pair.step({"a": (20, 21)}, HALF)


PLACEMENTS = {
    "the last layer on the GPU": Placement(cpu, (cpu, backend), (cpu, backend), backend),
    "experts on the CPU": Placement(backend, (backend, backend), (backend, cpu), backend),
    "the output on the CPU": Placement(cpu, (cpu, backend), (cpu, backend), cpu),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placements(folder, name):
    placement = PLACEMENTS[name]
    pair = Pair(folder, V3, ggml.Q8_0, placement)
    assert pair.models[0].backend is placement.output
    pair.step({"a": (0, 9)}, CODES)
    pair.step({"a": (9, 10)}, CODES)


def test_tokens_are_chosen_on_the_device(folder, monkeypatch):
    """From the logits where they lie: the host gets the token alone, or where it must all logits."""
    model = made(folder, LITE, ggml.F32, backend)
    sequence = model.new_sequence()
    copied = []
    to_host = memory.to_host

    def watched(array):
        copied.append(array.nbytes)
        return to_host(array)

    monkeypatch.setattr(backend.sampling, "to_host", watched)
    logits = model.step([(sequence, IDS[:9])])
    values = to_host(logits)[0]
    log_probabilities = values - np.log(np.exp(values).sum())
    likeliest = model.sampler(SamplingParams(temperature=0)).sample(logits[0])
    assert likeliest.token == values.argmax()
    assert likeliest.logprob == pytest.approx(log_probabilities.max(), abs=1e-5)
    draws = [model.sampler(SamplingParams(seed=1)).sample(logits[0]) for _ in range(2)]
    assert draws[0] == draws[1]
    assert copied == [8] * 3
    with_alternatives = model.sampler(SamplingParams(temperature=0, logprobs=2)).sample(logits[0])
    assert with_alternatives.token == likeliest.token
    assert [token for token, _ in with_alternatives.alternatives] == np.argsort(-values)[:2].tolist()
    biased = model.sampler(SamplingParams(temperature=0, logit_bias={3: 1e6})).sample(logits[0])
    assert biased.token == 3
    assert copied == [8] * 3 + [4 * VOCABULARY] * 2


def test_what_matrices_read(folder):
    """Importance matrices are collected through the backend, whichever it is."""
    found = []
    for each in (backend, reference):
        collector = Collector(made(folder, LITE, ggml.F32, each), file_of(folder, LITE, ggml.F32), 64)
        collector.read(IDS[:5])
        found.append(collector.importance().entries)
    assert found[0].keys() == found[1].keys()
    for name, entry in found[1].items():
        np.testing.assert_array_equal(found[0][name].counts, entry.counts)
        assert_close(found[0][name].sums, entry.sums, **HALF)
