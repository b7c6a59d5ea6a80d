"""Models with sparse attention: against logits of transformers (tools/make_golden.py), and what no other model has."""

import dataclasses
import functools

import numpy as np
import pytest
from cache_checks import give_way_and_come_back
from compare import assert_close, relative_error
from make_golden import SPARSE_SHAPES
from make_model import make_model
from test_golden import EXACT, GOLDEN, golden

import pymla
from pymla import cpu, ggml, reference, scratch
from pymla.engine.model import Model
from pymla.engine.runs import runs_of
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.models.config import ModelConfig
from pymla.models.weights import Weights
from pymla.pages import CACHE_TYPES, PAGE, IndexedCache, LatentCache

NAMES = tuple(SPARSE_SHAPES)
BACKENDS = {"reference": reference, "cpu": cpu}
MLA = ("auto", "1", "3")
#: Positions that are chosen.
TOP_K = 24

each_model = pytest.mark.parametrize("name", NAMES)
each_device = pytest.mark.parametrize("device", BACKENDS)


@functools.cache
def parts(name):
    """The configuration and the weights of a golden model, in the host's memory."""
    file = ModelFile.open(GOLDEN / f"{name}.gguf")
    config = ModelConfig.from_gguf(file)
    return config, Weights.from_gguf(file, config)


def made(name, device, *, top_k=None, dense=False, **options):
    """A model on golden weights."""
    config, weights = parts(name)
    if top_k:
        config = dataclasses.replace(config, indexer=dataclasses.replace(config.indexer, top_k=top_k))
    config = config.dense() if dense else config
    return Model(config, weights, BACKENDS[device], **({"cache_type": "f32", "ctx": 128} | options))


def stepped(model, ids, *cuts):
    """Logits of every token of a sequence that is appended in pieces."""
    sequence = model.new_sequence()
    pieces = np.split(ids, cuts)
    return np.concatenate([model.forward([(sequence, piece)], logits="all") for piece in pieces])


# Against transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mla", MLA)
@each_device
@each_model
def test_logits_equal_those_of_transformers(name, device, mla):
    with pymla.load(GOLDEN / f"{name}.gguf", device=device, mla=mla, cache_type="f32") as model:
        for prompt in ("one", "short", "long"):
            assert_close(model.logits(golden(name)[f"{prompt}_ids"]), golden(name)[f"{prompt}_logits"], **EXACT)


@each_device
@each_model
def test_a_token_at_a_time_equals_the_prompt_at_once(name, device):
    ids, expected = golden(name)["long_ids"], golden(name)["long_logits"]
    assert_close(stepped(made(name, device), ids, *range(1, len(ids))), expected, **EXACT)


@each_device
@each_model
def test_a_prompt_in_pieces_equals_the_prompt_at_once(name, device):
    """Pieces that end before, at and behind the last token that sees no more positions than are chosen, and a page."""
    ids, expected = golden(name)["long_ids"], golden(name)["long_logits"]
    for cuts in ([TOP_K - 1, TOP_K, TOP_K + 1, PAGE - 1, PAGE, PAGE + 1], [10, 40, 90]):
        assert_close(stepped(made(name, device), ids, *cuts), expected, **EXACT)


@each_device
@each_model
def test_sequences_in_one_batch_do_not_touch_each_other(name, device):
    """Steps of tokens that attend to all positions, of some that choose, and of both, also recorded ones."""
    ids, expected = golden(name)["long_ids"], golden(name)["long_logits"]
    model = made(name, device, cache_tokens=4 * 128)
    sequences = [model.new_sequence() for _ in range(4)]
    lengths = [70, 20, 1, 30]
    model.forward([(s, ids[:n]) for s, n in zip(sequences, lengths, strict=True)])
    for counts in [(1, 1, 1, 1)] * 6 + [(5, 40, 1, 2), (1, 1, 1, 1), (9, 1, 30, 1)]:
        actual = model.forward([(s, ids[s.length :][:n]) for s, n in zip(sequences, counts, strict=True)])
        assert_close(actual, [expected[s.length - 1] for s in sequences], **EXACT)
    few = model.forward([(s, ids[s.length :][:1]) for s in sequences[1:3]])
    assert_close(few, [expected[s.length - 1] for s in sequences[1:3]], **EXACT)


# The choice -----------------------------------------------------------------------------------------------------------


@each_device
@each_model
def test_more_positions_than_tokens_are_all_positions(name, device):
    ids = golden(name)["long_ids"]
    expected = stepped(made(name, device, dense=True), ids)
    for top_k in (len(ids), 2048):
        assert_close(stepped(made(name, device, top_k=top_k), ids, 50), expected, **EXACT)
    assert np.abs(stepped(made(name, device), ids) - expected).max() > 0.1


@each_device
@each_model
def test_tokens_that_see_few_positions_choose_none(name, device, monkeypatch):
    """The key of the indexer is stored all the same."""
    ids, expected = golden(name)["long_ids"], golden(name)["long_logits"]
    model, sequence = made(name, device), None

    def refuse(*arguments):
        raise AssertionError("nothing is to be chosen")

    with monkeypatch.context() as patch:
        patch.setattr(BACKENDS[device].attention, "choose", refuse)
        sequence = model.new_sequence()
        model.forward([(sequence, ids[: TOP_K - 3])])
        for token in range(TOP_K - 3, TOP_K):
            model.forward([(sequence, ids[token : token + 1])])
    assert_close(model.forward([(sequence, ids[TOP_K:])], logits="all"), expected[TOP_K:], **EXACT)


@pytest.mark.parametrize("cache_type", ["f32", "bf16"])
@each_device
@each_model
def test_rows_that_are_not_chosen_are_never_read(name, device, cache_type, monkeypatch):
    """Whole rows are NaN, of this sequence and in all other pages, as soon as the layer has chosen."""
    ids = golden(name)["long_ids"]
    model = made(name, device, cache_type=cache_type)
    sequence = model.new_sequence()
    expected = model.forward([(sequence, ids)])
    model.cache.truncate(sequence, len(ids) - 1)
    attention, sparse = BACKENDS[device].attention, BACKENDS[device].attention.sparse
    poisoned = []

    def poison(q, latent, rope, step, chosen, scale, out):
        positions = chosen[0]
        assert len(set(positions.tolist())) == TOP_K
        slots = step.block_tables[0][positions // PAGE] * PAGE + positions % PAGE
        others = np.setdiff1d(np.arange(len(latent.data)), slots)
        latent.data[others] = rope.data[others] = 0xFF
        poisoned.append(len(others))
        return sparse(q, latent, rope, step, chosen, scale, out)

    monkeypatch.setattr(attention, "sparse", poison)
    batch = [(sequence, ids[-1:])]
    step, runs = model.cache.extend(batch), runs_of(model.config, model.mla, batch)
    actual = model._forward.logits({BACKENDS[device]: step}, runs, None)  # past the recorded steps, which call nothing
    assert poisoned == [2 * PAGE - TOP_K] * model.config.num_hidden_layers
    assert_close(actual, expected, **EXACT)


@each_device
def test_layers_share_the_choice_of_the_last_one_with_an_indexer(device, monkeypatch):
    attention = BACKENDS[device].attention
    calls, choose, sparse = [], attention.choose, attention.sparse
    monkeypatch.setattr(attention, "choose", lambda *a: (calls.append("choose"), choose(*a))[1])
    monkeypatch.setattr(attention, "sparse", lambda *a: (calls.append(a[4].copy()), sparse(*a))[1])
    model = made("glm-5", device)
    model.forward([(model.new_sequence(), golden("glm-5")["long_ids"][:60])])
    assert [type(call) is str for call in calls] == [True, False, False, False, True, False]
    first, second, third, last = (call for call in calls if type(call) is not str)
    assert (first == second).all()
    assert (first == third).all()
    assert (first != last).any()


# The cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@each_device
@each_model
def test_what_a_layer_keeps(name, device, cache_type):
    model = made(name, device, cache_type=cache_type)
    assert model.config.indexer.full == ((True, False, False, True) if name == "glm-5" else (True, True, True))
    for full, layer in zip(model.config.indexer.full, model.cache.layers, strict=True):
        assert type(layer) is (IndexedCache if full else LatentCache)
    wanted = {"f32": ggml.F32, "f16": ggml.F16, "bf16": ggml.BF16}.get(cache_type, ggml.Q8_0)
    if device == "reference":
        index = model.cache.layers[0].index_keys
        assert (index.qtype, index.data.shape) == (wanted, (2 * PAGE, ggml.row_bytes(wanted, 64)))
    assert all(type(layer) is LatentCache for layer in made(name, device, dense=True).cache.layers)


#: Median error of a token's logits: a rounding that changes a choice changes them entirely. Tokens that choose nothing
#: have no choice that could change.
@pytest.mark.parametrize(
    ("cache_type", "allowed"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 6e-2), ("q6_0", 0.2), ("q4_0", 0.6)]
)
@each_device
@each_model
def test_smaller_caches_stay_close(name, device, cache_type, allowed):
    ids, expected = golden(name)["long_ids"][:48], golden(name)["long_logits"][:48]
    actual = stepped(made(name, device, cache_type=cache_type), ids)
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    print(f"{name} {device} {cache_type}: median {np.median(errors):.1e}, worst {max(errors):.1e}")
    assert np.median(errors) < allowed


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@each_device
@each_model
def test_rows_come_back_as_they_were(name, device, cache_type):
    give_way_and_come_back(parts(name)[0], BACKENDS[device], cache_type, "auto")


@each_device
@each_model
def test_sequences_that_take_turns_in_a_small_cache(name, device):
    ids, expected = golden(name)["long_ids"], golden(name)["long_logits"]
    model = made(name, device, cache_tokens=128)
    sequences = [model.new_sequence() for _ in range(3)]
    for stop in (20, 66, 67, 68, 100):
        for sequence in sequences:
            actual = model.forward([(sequence, ids[sequence.length : stop])])
            assert_close(actual, expected[stop - 1 : stop], **EXACT)
    assert sum(each.saved is not None for each in sequences) == 2


# Steps of many tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 7, 64])
@each_device
@each_model
def test_a_long_prompt_goes_through_the_layers_in_portions(name, device, tokens, monkeypatch):
    monkeypatch.setattr(scratch, "MOST_CHOSEN", 4 * TOP_K * tokens)
    ids, expected = golden(name)["long_ids"], golden(name)["long_logits"]
    model = made(name, device, cache_tokens=256)
    told = []
    batch = [(model.new_sequence(), ids), (model.new_sequence(), ids[:30])]
    actual = model.forward(batch, logits="all", progress=lambda done, total: told.append((done, total)))
    assert_close(actual, np.concatenate([expected, expected[:30]]), **EXACT)
    portions = -(-(100 - TOP_K + 30 - TOP_K) // tokens)
    total = portions * model.config.num_hidden_layers
    assert told == [(i + 1, total) for i in range(total)]
    last = made(name, device, cache_tokens=256)
    actual = last.forward([(last.new_sequence(), ids), (last.new_sequence(), ids[:30])])
    assert_close(actual, [expected[-1], expected[29]], **EXACT)


# Options --------------------------------------------------------------------------------------------------------------


@each_device
def test_dsa_off_attends_to_all_positions(device):
    path, ids = GOLDEN / "v3.2.gguf", golden("v3.2")["long_ids"]
    with pymla.load(path, device=device, dsa=False, cache_type="f32") as model:
        assert model.config.indexer is None
        dense = model.logits(ids)
    assert_close(dense, stepped(made("v3.2", device, dense=True), ids), **EXACT)
    for mla in ("0", "2"):
        with pymla.load(path, device=device, dsa=False, mla=mla, cache_type="f32") as model:
            assert_close(model.logits(ids), dense, **EXACT)


@pytest.mark.parametrize("mla", ["0", "2"])
def test_modes_that_attend_to_all_positions_are_refused(mla):
    words = f"`mla` is {mla}, which attends to all positions.*choose auto, 1, 3.*`dsa`"
    with pytest.raises(PymlaError, match=words):
        pymla.load(GOLDEN / "v3.2.gguf", device="reference", mla=mla)
    with pytest.raises(PymlaError, match=words):
        made("v3.2", "reference", mla=mla)


def test_dsa_is_a_flag():
    with pytest.raises(PymlaError, match=r"`dsa` is 'off'.*"):
        pymla.load(GOLDEN / "v3.2.gguf", device="reference", dsa="off")


def test_quantised_files(tmp_path):
    """The indexer's matrices in a type of blocks; all positions are chosen, so that no rounding changes the choice."""
    shape = dataclasses.replace(SPARSE_SHAPES["v3.2"], num_experts_per_tok=8, n_group=1, topk_group=1, index_topk=96)
    path = make_model(tmp_path / "model.gguf", shape, layout="split", qtype=ggml.Q8_0)
    ids = np.arange(1, 100, dtype=np.int32)
    found = []
    for device in BACKENDS:
        with pymla.load(path, device=device, ctx=128) as model:
            found.append(model.logits(ids))
    assert_close(found[1], found[0], rtol_max=0.1, reason="int8 activations, keys and values")
