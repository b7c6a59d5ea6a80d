"""The block that predicts a further token, against its formulas (`nextn_oracle`), and its drafts."""

import dataclasses
import itertools

import numpy as np
import pytest
from compare import assert_close
from make_golden import SHAPES, SPARSE_SHAPES
from make_model import PRESETS, make_model

import pymla
from pymla.engine.engine import Engine
from pymla.engine.nextn import Span
from pymla.engine.speculation import NO_DRAFT, Draft, NextnDrafter, Speculation, StepTimes, step_bytes
from pymla.errors import PymlaError
from pymla.pages import PAGE
from pymla.text.sampling import SamplingParams

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

from nextn_oracle import Oracle

FLOAT32 = {"rtol_max": 1e-5, "reason": "float32 throughout"}
DENSE = dataclasses.replace(SHAPES["v3"], num_hidden_layers=2, n_routed_experts=8)
SPARSE = {
    name: dataclasses.replace(shape, num_hidden_layers=2, indexer_types=types)
    for (name, shape), types in zip(SPARSE_SHAPES.items(), (None, ("full", "shared")), strict=True)
}
SHAPES_OF = {"v3": DENSE, **SPARSE}
GREEDY = SamplingParams(temperature=0)
#: More than a page, and more than an indexer chooses.
IDS = np.random.default_rng(5).integers(0, 288, 81, dtype=np.int32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Oracles with their files, by shape and whether the block has all tensors of its own."""
    found, folder = {}, tmp_path_factory.mktemp("nextn")

    def make(name, own=True, layout="split"):
        key = name, own, layout
        if key not in found:
            oracle = Oracle(SHAPES_OF[name], 40, own)
            found[key] = oracle, oracle.write(folder / f"{len(found)}.gguf", layout=layout)
        return found[key]

    return make


def load(path, **options):
    fixed = {"device": "reference", "cache_type": "f32", "ctx": 128, "cache_tokens": 512, "nextn": True}
    return pymla.load(path, **fixed | options)


@pytest.mark.parametrize(
    ("name", "own", "options"),
    [
        ("v3", True, {}),
        ("v3", False, {}),
        ("v3", True, {"device": "cpu"}),
        ("v3", True, {"mla": "0"}),
        ("v3", True, {"mla": "2"}),
        ("v3.2", True, {}),
        ("v3.2", True, {"device": "cpu"}),
        ("glm-5", True, {}),
    ],
)
def test_the_block_equals_its_formulas(made, name, own, options):
    """On a prompt at once; on its last token, behind rows that were filled; and on its own hidden states, of two texts
    at a time, in recorded steps where the mode has them."""
    oracle, path = made(name, own)
    tokens, behind = IDS[:80], IDS[1:81]
    with load(path, **options) as language_model:
        model = language_model.model
        whole, filled = model.new_sequence(), model.new_sequence()
        for sequence in (whole, filled):
            outputs = model.step([(sequence, tokens)], hidden=True)
        hidden = outputs.hidden.astype(np.float64)
        assert_close(hidden, oracle.hidden(tokens), rtol_max=1e-4, reason="float32 through all layers")
        logits, own_hidden = oracle.outputs(hidden, behind)
        actual = model.nextn_step([Span(whole, 0, behind)], outputs.hidden)
        assert_close(actual.logits, logits[-1:], **FLOAT32)
        assert_close(actual.hidden, own_hidden, **FLOAT32)
        model.nextn_fill(Span(filled, 0, behind[:70]), outputs.hidden[:70])
        model.nextn_fill(Span(filled, 70, behind[70:79]), outputs.hidden[70:79])
        actual = model.nextn_step([Span(filled, 79, behind[79:])], outputs.hidden[79:])
        assert_close(actual.logits, logits[-1:], **FLOAT32)
        # From its own hidden state and another token on.
        last = actual.hidden.repeat(2, axis=0)
        both = [Span(sequence, 80, np.array([token], np.int32)) for sequence, token in ((whole, 7), (filled, 9))]
        actual = model.nextn_step(both, last)
        for i, token in enumerate((7, 9)):
            wanted = oracle.outputs(np.concatenate([hidden, own_hidden[-1:]]), np.append(behind, token))
            assert_close(actual.logits[i], wanted[0][-1], **FLOAT32)
            assert_close(actual.hidden[i], wanted[1][-1], **FLOAT32)


def test_layouts(made):
    found = []
    for _, path in (made("v3"), made("v3", layout="all")):
        with load(path) as language_model:
            sequence = language_model.model.new_sequence()
            hidden = language_model.model.step([(sequence, IDS[:9])], hidden=True).hidden
            found.append(language_model.model.nextn_step([Span(sequence, 0, IDS[1:10])], hidden).logits)
    assert_close(found[1], found[0], **FLOAT32)


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_hidden_states_of_recorded_steps(made, device):
    """Logits are what they are without hidden states; of tokens one by one both are what they are of a prompt."""
    _, path = made("v3")
    with load(path, device=device) as language_model:
        model = language_model.model
        sequences = [model.new_sequence() for _ in range(3)]
        wanted = model.step([(sequences[0], IDS[:6])], "all", hidden=True)
        logits, hidden = np.array(wanted.logits), np.array(wanted.hidden)
        np.testing.assert_array_equal(model.step([(sequences[1], IDS[:6])], "all"), logits)
        for i in range(6):
            outputs = model.step([(sequences[2], IDS[i : i + 1])], hidden=True)
            assert_close(outputs.logits, logits[i : i + 1], **FLOAT32)
            assert_close(outputs.hidden, hidden[i : i + 1], **FLOAT32)


# Drafts ---------------------------------------------------------------------------------------------------------------


def begun(drafter, model, prompt, slices):
    """A text whose prompt was computed in slices of some lengths, and its first token."""
    sequence = model.new_sequence()
    state, start = drafter.begin(prompt, GREEDY, sequence), 0
    for count in slices:
        with model.turn:
            outputs = model.step([(sequence, prompt[start : start + count])], hidden=True)
            token = int(np.argmax(outputs.logits[-1]))
            drafter.read(state, start, outputs.hidden)
            if start + count == len(prompt):
                drafter.commit(state, [token], outputs.hidden[-1:])
        start += count
    return state, token


def test_drafts_are_those_of_the_formulas(made):
    """Of two texts together, before and behind drafts of which parts are accepted."""
    oracle, path = made("v3")
    with load(path) as language_model:
        model = language_model.model
        drafter = NextnDrafter(model)
        texts = [list(IDS[:70]), list(IDS[40:50])]
        states = []
        for text, slices in zip(texts, ((30, 40), (10,)), strict=True):
            state, token = begun(drafter, model, np.array(text, np.int32), slices)
            text.append(token)
            states.append(state)
        for accepted in ([2, 0], [0, 1], [3, 3]):
            drafts = drafter.draft(states, [3, 4])
            for text, draft, count in zip(texts, drafts, (3, 4), strict=True):
                assert draft.probabilities is None
                assert draft.tokens == oracle.drafted(oracle.hidden(text[:-1]), text[1:], count)
            for text, state, draft, count in zip(texts, states, drafts, accepted, strict=True):
                # As if the model had chosen the first `count` of them, and then another token.
                hidden = model.step([(state.sequence, np.array([text[-1], *draft.tokens], np.int32))], hidden=True)[1]
                new = [*draft.tokens[:count], (text[-1] + 100) % 288]
                drafter.commit(state, new, hidden[: len(new)])
                text.extend(new)
                model.cache.truncate(state.sequence, len(text) - 1)


def test_a_text_without_drafts_catches_up(made):
    """Rows of more than a page of tokens, without any draft between them."""
    oracle, path = made("v3")
    with load(path) as language_model:
        model = language_model.model
        drafter = NextnDrafter(model)
        text = list(IDS[:5])
        state, first = begun(drafter, model, IDS[:5], [5])
        assert drafter.draft([state], [0]) == [NO_DRAFT]
        for token in [first, *IDS[: PAGE + 20].tolist()]:
            text.append(int(token))
            if len(text) > 6:
                hidden = model.step([(state.sequence, np.array(text[-2:-1], np.int32))], hidden=True).hidden
                drafter.commit(state, text[-1:], hidden)
        assert drafter.draft([state], [2])[0].tokens == oracle.drafted(oracle.hidden(text[:-1]), text[1:], 2)


def test_drafts_behind_a_context_shift(made):
    """Hidden states whose rows are missing move with their text."""
    _, path = made("v3")
    with load(path) as language_model:
        model = language_model.model
        drafter = NextnDrafter(model)
        state, token = begun(drafter, model, IDS[:70], [70])
        for shifts in (False, True):
            if shifts:
                model.shift(state.sequence, 0, 64)
            hidden = model.step([(state.sequence, np.array([token], np.int32))], hidden=True).hidden
            drafter.commit(state, [5], hidden)
            token = 5
        model.nextn_step, spans = watched(model.nextn_step)
        model.nextn_fill, filled = watched(model.nextn_fill)
        assert len(drafter.draft([state], [2])[0].tokens) == 2
    # The text's last three hidden states are those of positions 69 and 70, now 5 and 6, and 7.
    assert [(span.start, len(span.tokens)) for span in filled] == [(5, 2)]
    assert [span.start for (span,) in spans] == [7, 8]


def watched(function):
    """A function that remembers the first argument of each call, and the list of these."""
    seen = []

    def call(first, *rest):
        seen.append(first)
        return function(first, *rest)

    return call, seen


@pytest.mark.parametrize("name", ["v3", "glm-5"])
def test_a_text_is_the_one_without_drafts(made, name):
    """Of a model whose block is random, so that drafts are wrong: rows that they left are overwritten."""
    _, path = made(name)
    with load(path) as language_model:
        model, prompt = language_model.model, IDS[:40].tolist()
        expected = language_model.generation(prompt, max_tokens=40, temperature=0)
        "".join(expected)
        times = StepTimes(step_bytes(language_model.config, language_model.file.tensors))
        speculation = Speculation(NextnDrafter(model), times, most=3, adapts=False)
        sequence, sampler = model.new_sequence(), model.sampler(GREEDY, prompt)
        text, tokens = speculation.begin(prompt, GREEDY, sequence), list(prompt)
        while len(tokens) < 80:
            drafted = speculation.draft([text], [3])[0].tokens if len(tokens) > 40 else []
            new = np.array([*tokens[sequence.length :], *drafted], np.int32)
            outputs = model.step([(sequence, new)], np.arange(len(new) - len(drafted) - 1, len(new)), hidden=True)
            if len(tokens) == 40:
                speculation.read(text, 0, outputs.hidden)
            own = outputs.hidden[len(new) - len(drafted) - 1 :]
            chosen = speculation.verify(text, sampler, outputs.logits, Draft(drafted), hidden=own)
            tokens += [each.token for each in chosen]
            model.cache.truncate(sequence, len(tokens) - 1)
    assert tokens[40:80] == expected.tokens


def test_texts_that_the_engine_computes_together(made):
    """With prompts in slices, one that begins as another one, and forks."""
    _, path = made("v3")
    with load(path) as language_model:
        options = {"max_tokens": 12, "temperature": 0}
        prompts = [IDS[:40].tolist(), IDS.tolist(), [*IDS[:70].tolist(), 7], IDS[5:9].tolist()]
        expected = [language_model.generation(prompt, **options) for prompt in prompts]
        for generation in expected:
            list(generation)
    with load(path) as language_model:
        times = StepTimes(step_bytes(language_model.config, language_model.file.tensors))
        options["speculation"] = Speculation(NextnDrafter(language_model.model), times, most=3, adapts=False)
        engine = Engine(language_model, step_tokens=30)
        generations = [engine.generations(prompt, 2, **options) for prompt in prompts]
        for pieces in itertools.zip_longest(*itertools.chain(*generations)):
            assert any(pieces)
        for texts, alone in zip(generations, expected, strict=True):
            assert [each.tokens for each in texts] == [alone.tokens] * 2


def test_drafts_end_with_the_context(made):
    """A text and its draft fit the context: the last drafted token is the last that has room."""
    _, path = made("v3")
    with load(path, ctx=64) as language_model:
        drafter = NextnDrafter(language_model.model)
        states = [begun(drafter, language_model.model, IDS[:n], [n])[0] for n in (60, 62, 63, 64)]
        assert [len(draft.tokens) for draft in drafter.draft(states, [5, 5, 5, 5])] == [3, 1, 0, 0]


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_without_a_block(tmp_path):
    path = make_model(tmp_path / "plain.gguf", PRESETS["tiny"])
    with pytest.raises(PymlaError, match=r"plain\.gguf: the file has no block .*deepseek2\.nextn_predict_layers"):
        load(path)
    with pytest.raises(PymlaError, match="architecture plm have no block that `nextn` loads"):
        load(make_model(tmp_path / "plm.gguf", PRESETS["tiny-plm"]))
    with load(path, nextn=False) as language_model:
        assert not language_model.model.has_nextn
        with pytest.raises(PymlaError, match="load the model with `nextn`"):
            NextnDrafter(language_model.model)
        with pytest.raises(PymlaError, match="load the model with `nextn`"):
            language_model.model.nextn_step([], np.zeros((0, 64), np.float32))


@pytest.mark.parametrize("missing", ["nextn.eh_proj.weight", "attn_output.weight"])
def test_an_incomplete_block_is_refused_where_it_is_asked_for(made, tmp_path, missing):
    from test_cli import rewritten

    _, path = made("v3")
    name = f"blk.2.{missing}"
    broken = rewritten(path, tmp_path / "broken.gguf", tensors={name: (None, None)})
    with load(broken, nextn=False) as language_model:
        assert language_model.logits(IDS[:2]).shape == (2, 288)
    with pytest.raises(PymlaError, match=f"tensor {name} is missing"):
        load(broken)
