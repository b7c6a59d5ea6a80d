"""Speculation in steps: with a model and a clock that do as they are told, a draft model, and the demo model."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

import pymla
from pymla.engine import costs
from pymla.engine.cache import PagedCache, Sequence
from pymla.engine.speculation import Draft, DraftModel, NgramDrafter, Speculation, StepTimes, step_bytes
from pymla.engine.speculation.length import ALLOWANCE, LIMIT
from pymla.errors import PymlaError
from pymla.text.sampling import Sampler, SamplingParams

GREEDY = SamplingParams(temperature=0)
VOCABULARY = 6


class Oracle:
    """Drafts the text that it knows, but for some tokens, and takes its time."""

    wants_hidden = True

    def __init__(self, clock, text, wrong=(), seconds=0.0):
        self.clock, self.text, self.wrong, self.seconds = clock, text, frozenset(wrong), seconds
        self.asked, self.ended = [], []

    def begin(self, prompt, params, sequence=None):
        return list(prompt)

    def kind(self, state):
        return 0

    def draft(self, states, most):
        self.asked.append(list(most))
        drafts = []
        for state, count in zip(states, most, strict=True):
            places = range(len(state), min(len(state) + count, len(self.text)))
            drafts.append(Draft([(self.text[i] + (i in self.wrong)) % VOCABULARY for i in places]))
        self.clock.now += self.seconds * max((len(draft.tokens) for draft in drafts), default=0)
        return drafts

    def commit(self, state, tokens, hidden=None):
        assert hidden is None or len(hidden) == len(tokens)
        state.extend(tokens)

    def end(self, state):
        self.ended.append(state)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(now=0.0)
    monkeypatch.setattr("pymla.engine.speculation.step.time.perf_counter", lambda: now.now)
    return now


def generate(clock, speculation, target, seconds, others=0):
    """Generate texts that are known, with steps of so many seconds by their tokens. Returns seconds for each number of
    tokens of the first text."""
    texts = [speculation.begin(text[:1], GREEDY) for text in target]
    sampler, began, times = [Sampler(GREEDY) for _ in target], clock.now, {}
    while len(texts[0].state) < len(target[0]):
        drafts = speculation.draft(texts, [len(t) - len(x.state) - 1 for t, x in zip(target, texts, strict=True)])
        tokens = sum(1 + len(draft.tokens) for draft in drafts) + others
        clock.now += seconds(tokens)
        for i, (text, draft) in enumerate(zip(texts, drafts, strict=True)):
            at = len(text.state)
            logits = np.eye(VOCABULARY, dtype=np.float32)[target[i][at : at + len(draft.tokens) + 1]]
            if at < len(target[i]):
                speculation.verify(text, sampler[i], logits, draft, hidden=np.zeros((len(logits), 3)))
        speculation.took(seconds(tokens), others)
        times[len(texts[0].state) - 1] = clock.now - began
    assert [text.state for text in texts] == target
    for text in texts:
        speculation.end(text)
    return texts, times


def text_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def test_a_text_by_drafts_that_are_right(clock):
    target = text_of(400)
    oracle = Oracle(clock, target)
    speculation = Speculation(oracle, StepTimes(lambda tokens: 1.0), most=5)
    (text,), times = generate(clock, speculation, [target], lambda tokens: 0.9 + 0.1 * tokens)
    # Six tokens take 1.5 s. The first two steps and the 64th have no draft, and the last one may have none.
    assert times[399] == pytest.approx(1.5 * 399 / 6, rel=0.1)
    assert oracle.ended == [target]
    assert text.counts.acceptance == 1
    assert text.counts.steps <= text.counts.steps_with_draft + 4
    assert oracle.asked[0] == [5]


@pytest.mark.parametrize("prior", [lambda tokens: 0.4 + 0.6 * tokens, lambda tokens: 1.0 + 0.01 * tokens])
def test_it_is_never_slower_than_the_bound(clock, prior):
    """Drafts that are always wrong, by a drafter that is slow. A prior that is far too low costs the first step with
    each number of tokens, which teaches nothing."""
    target = text_of(2000)
    oracle = Oracle(clock, target, wrong=range(2000), seconds=0.3)
    speculation = Speculation(oracle, StepTimes(prior))
    (text,), times = generate(clock, speculation, [target], lambda tokens: 0.4 + 0.6 * tokens)
    most = 0.3 * 15 + 0.6 * 15
    unknown = sum(0.4 + 0.6 * tokens - prior(tokens) for tokens in range(2, 17))
    for tokens, seconds in times.items():
        assert seconds <= tokens * (1 + ALLOWANCE) + LIMIT + most + unknown
    assert text.counts.accepted == 0
    assert 1 < text.counts.steps_with_draft < 100
    assert not text.is_on


def test_texts_share_a_step(clock):
    """What drafts cost is shared by tokens: the text with good drafts goes on, the other one stops."""
    target = [text_of(600), text_of(600)]
    texts = generate_two(Speculation(Oracle(clock, target[0]), StepTimes(lambda tokens: 1.0)), target)
    assert texts[0].counts.acceptance == 1
    assert texts[1].counts.acceptance == 0
    assert texts[0].counts.drafted > 10 * texts[1].counts.drafted


def generate_two(speculation, target):
    """Two texts side by side; whatever is drafted for the second one is wrong."""
    texts = [speculation.begin(text[:1], GREEDY) for text in target]
    samplers = [Sampler(GREEDY), Sampler(GREEDY)]
    while len(texts[0].state) < len(target[0]):
        drafts = speculation.draft(texts, [len(target[0]) - len(texts[0].state) - 1] * 2)
        tokens = sum(1 + len(draft.tokens) for draft in drafts)
        for i, (text, draft) in enumerate(zip(texts, drafts, strict=True)):
            following = [*draft.tokens, target[0][min(len(text.state) + len(draft.tokens), len(target[0]) - 1)]]
            if i == 1:
                following = [(token + 1) % VOCABULARY for token in following]
            speculation.verify(text, samplers[i], np.eye(VOCABULARY, dtype=np.float32)[following], draft)
        speculation.took(0.4 + 0.3 * tokens)
    return texts


def test_kinds_of_drafts_have_accounts_of_their_own(clock):
    """Drafts of one kind are always right and those of the other one always wrong; each is half of the text."""
    target = text_of(1200)
    oracle = Oracle(clock, target, wrong=[i for i in range(1200) if i // 10 % 2])
    oracle.kind = lambda state: len(state) // 10 % 2
    speculation = Speculation(oracle, StepTimes(lambda tokens: 1.0), most=4)
    (text,), times = generate(clock, speculation, [target], lambda tokens: 0.5 + 0.5 * tokens)
    assert text.is_on
    assert [text.lengths[kind].is_on for kind in (0, 1)] == [True, False]
    assert text.counts.acceptance > 0.7
    assert times[1199] < 1000


def test_fixed_lengths(clock):
    oracle = Oracle(clock, text_of(50), wrong=range(50))
    speculation = Speculation(oracle, StepTimes(lambda tokens: 1.0), most=3, adapts=False)
    generate(clock, speculation, [oracle.text], lambda tokens: 1.0 * tokens)
    assert {most for (most,) in oracle.asked} == {1, 2, 3}
    assert oracle.asked[:40] == [[3]] * 40


def test_steps_with_prompts_teach_no_times(clock):
    times = StepTimes(lambda tokens: 1.0)
    speculation = Speculation(Oracle(clock, text_of(9)), times)
    text = speculation.begin([0], GREEDY)
    for seconds in (None, None, 5.0, 4.0):
        assert not times.is_measured
        assert speculation.draft([text], [3]) == [Draft([])]
        speculation.verify(text, Sampler(GREEDY), np.eye(6, dtype=np.float32)[:1], Draft([]))
        speculation.took(seconds, others=2)
    assert times.seconds(3) == 4


# A draft model --------------------------------------------------------------------------------------------------------


class Scribe:
    """A model whose logits depend on every token in the cache."""

    def __init__(self, ctx=80):
        self.ctx, self.steps, self.kept = ctx, [], {}
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.cache = SimpleNamespace(truncate=self.truncate, pages=1000)
        self.turn = threading.RLock()

    def new_sequence(self):
        sequence = Sequence()
        self.kept[sequence] = []
        return sequence

    def free(self, sequence):
        del self.kept[sequence]

    def truncate(self, sequence, length):
        del self.kept[sequence][length:]
        del sequence.tokens[length:]

    def sampler(self, params, history):
        return Sampler(params, history)

    def step(self, batch):
        self.steps.append([len(new) for _, new in batch])
        for sequence, new in batch:
            self.kept[sequence].extend(new.tolist())
            assert len(self.kept[sequence]) <= self.ctx
        PagedCache.advance(batch)
        return np.stack([logits_after(self.kept[sequence]) for sequence, _ in batch])


def logits_after(tokens):
    seed = int.from_bytes(bytes(tokens), "little")
    return np.random.default_rng(seed).normal(0, 2, VOCABULARY + 2).astype(np.float32)


@pytest.fixture
def scribe():
    return Scribe()


def language_model(model=None, tokens="abcdef", path="a.gguf"):
    return SimpleNamespace(
        model=model,
        config=SimpleNamespace(vocab_size=VOCABULARY),
        tokenizer=SimpleNamespace(tokens=list(tokens)),
        file=SimpleNamespace(path=path),
    )


def written(tokens, count):
    """The likeliest tokens behind a text."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(logits_after(tokens)[:VOCABULARY].argmax()))
    return tokens[len(tokens) - count :]


def test_a_draft_model_writes_what_it_finds_likeliest(scribe):
    """Whatever part of its drafts is accepted, and however long nothing is drafted, it goes on from the text."""
    drafter = DraftModel(language_model(scribe), language_model())
    random, texts = np.random.default_rng(3), [[1, 2, 3], [4]]
    states = [drafter.begin(text, GREEDY) for text in texts]
    for _ in range(12):
        most = random.integers(0, 4, 2).tolist()
        drafts = drafter.draft(states, most)
        for text, state, count, draft in zip(texts, states, most, drafts, strict=True):
            assert draft.tokens == written(text, count)
            assert draft.probabilities is None
            taken = random.integers(0, count + 1)
            new = [*draft.tokens[:taken], int(random.integers(VOCABULARY))]
            drafter.commit(state, new)
            text.extend(new)
            assert scribe.kept[state.sequence] == text[: len(scribe.kept[state.sequence])]
    for state in states:
        drafter.end(state)
    assert not scribe.kept


def test_texts_are_drafted_together(scribe):
    drafter = DraftModel(language_model(scribe), language_model())
    first, second, third = (drafter.begin(text, GREEDY) for text in ([1, 2, 3], [4], [5, 5]))
    drafts = drafter.draft([first, second, third], [3, 1, 0])
    assert scribe.steps == [[3, 1], [1], [1]]
    drafter.commit(first, [*drafts[0].tokens, 0])
    drafter.commit(second, [(drafts[1].tokens[0] + 1) % VOCABULARY])
    scribe.steps.clear()
    drafter.draft([first, second], [1, 1])
    # The last drafted token of the first text was not read, and the token behind it is new.
    assert scribe.steps == [[2, 1]]


def test_a_draft_that_nobody_verified(scribe):
    """Such as before a step that was interrupted: the next one is drafted anew."""
    drafter = DraftModel(language_model(scribe), language_model())
    state = drafter.begin([1, 2, 3], GREEDY)
    assert drafter.draft([state], [3]) == drafter.draft([state], [3]) == [Draft(written([1, 2, 3], 3))]


def test_a_cache_without_room_for_all(scribe):
    scribe.cache.pages = 3
    drafter = DraftModel(language_model(scribe), language_model())
    states = [drafter.begin([1] * length, GREEDY) for length in (63, 64, 3)]
    drafts = drafter.draft(states, [1, 1, 1])
    assert [len(draft.tokens) for draft in drafts] == [1, 1, 0]


def test_drawn_drafts(scribe):
    """Each token is drawn from the distribution that is reported: that of the text's parameters."""
    drafter = DraftModel(language_model(scribe), language_model())
    params = SamplingParams(temperature=0.7, top_k=3, presence_penalty=1.0)
    states = [drafter.begin([1, 2], params) for _ in range(400)]
    drafts = drafter.draft(states, [2] * 400)
    assert all(draft.probabilities.shape == (2, VOCABULARY) for draft in drafts)
    first = np.bincount([draft.tokens[0] for draft in drafts], minlength=VOCABULARY)
    behind = [draft.tokens[1] for draft in drafts if draft.tokens[0] == first.argmax()]
    second = np.bincount(behind, minlength=VOCABULARY)
    for text, row, seen in (([1, 2], 0, first), ([1, 2, int(first.argmax())], 1, second)):
        expected = Sampler(params, text).distribution(logits_after(text)[:VOCABULARY])
        q = next(draft for draft in drafts if row == 0 or draft.tokens[0] == text[-1]).probabilities[row]
        np.testing.assert_allclose(q[expected.ids], expected.probabilities, rtol=1e-6)
        assert np.count_nonzero(q) == len(expected.ids)
        np.testing.assert_allclose(seen / seen.sum(), q, atol=0.08)


def test_drafts_of_texts_with_a_seed_are_certain(scribe):
    drafter = DraftModel(language_model(scribe), language_model())
    (draft,) = drafter.draft([drafter.begin([1], SamplingParams(seed=1))], [2])
    assert draft == Draft(written([1], 2), None)


def test_a_draft_model_with_a_short_context(scribe):
    scribe.ctx = 8
    drafter = DraftModel(language_model(scribe), language_model())
    state = drafter.begin([1] * 6, GREEDY)
    assert len(drafter.draft([state], [5])[0].tokens) == 2
    drafter.commit(state, [1, 1, 1])
    assert drafter.draft([state], [5]) == [Draft([])]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("abcde", "b.gguf cannot draft for a.gguf: its vocabulary has 5 tokens, and the other one 6"),
        ("abXdeY", "b.gguf cannot draft for a.gguf: token 2 is 'X', and 'c' in the other one"),
    ],
)
def test_another_vocabulary(tokens, message):
    with pytest.raises(PymlaError, match=message):
        DraftModel(language_model(tokens=tokens, path="b.gguf"), language_model())


# The demo model -------------------------------------------------------------------------------------------------------

PROMPT = "def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n    return"


@pytest.fixture(scope="module")
def demo():
    with pymla.load(ctx=160, cache_tokens=1000, device="reference", cache_type="f32") as language_model:
        yield language_model


def spoken(language_model, drafter, prompt, params, count):
    """A text of `count` tokens by drafts of three, with the logits that each token was chosen from."""
    model, speculation = language_model.model, Speculation(drafter, prior(language_model), most=3, adapts=False)
    sequence, sampler, tokens, rows = model.new_sequence(), model.sampler(params, prompt), list(prompt), []
    text = speculation.begin(prompt, params)
    while len(tokens) < len(prompt) + count:
        (draft,) = speculation.draft([text], [3]) if rows else [Draft([])]
        batch = np.array([*tokens[sequence.length :], *draft.tokens], np.int32)
        end = len(batch) - len(draft.tokens) - 1
        logits = model.forward([(sequence, batch)], np.arange(end, len(batch)))
        chosen = [each.token for each in speculation.verify(text, sampler, logits, draft)]
        tokens += chosen
        rows += list(logits[: len(chosen)])
        model.cache.truncate(sequence, len(tokens) - 1)
    speculation.end(text)
    model.free(sequence)
    return tokens[len(prompt) :][:count], rows[:count], text.counts


def prior(language_model):
    return StepTimes(step_bytes(language_model.config, language_model.file.tensors))


def drafters(language_model):
    return {"ngram": NgramDrafter(), "draft": DraftModel(language_model, language_model)}


@pytest.mark.parametrize("kind", ["ngram", "draft"])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=4, presence_penalty=0.3)])
def test_texts_of_the_demo_model_are_those_without_speculation(demo, kind, params):
    prompt, count = demo.tokenize(PROMPT), 12
    alone = demo.generation(prompt, max_tokens=count, **vars(params))
    list(alone)
    tokens, rows, counts = spoken(demo, drafters(demo)[kind], prompt, params, len(alone.tokens))
    at = next((i for i, pair in enumerate(zip(tokens, alone.tokens, strict=True)) if len(set(pair)) > 1), None)
    if at is not None:
        # Only two tokens that are as likely as each other may change places.
        first, second = np.sort(rows[at])[-2:]
        assert second - first < 1e-3
    assert counts.drafted > 0
    assert counts.accepted > 3 or params is not GREEDY


def test_a_step_of_a_few_tokens_is_a_recorded_one(demo):
    """Tokens of several sequences, some of them of the same one: as in a step that is not recorded."""
    model, ids = demo.model, np.arange(40, dtype=np.int32) * 7
    results = []
    for progress in (None, lambda done, total: None):
        sequences = [model.new_sequence() for _ in range(3)]
        model.forward(list(zip(sequences, (ids[:20], ids[5:30], ids[:1]), strict=True)))
        batch = list(zip(sequences, (ids[20:23], ids[30:31], ids[1:5]), strict=True))
        rows = (np.array([0, 2, 7]), "all", "last")
        results.append([])
        for wanted in rows:
            results[-1].append(model.forward(batch, wanted, progress=progress))
            for sequence, (_, new) in zip(sequences, batch, strict=True):
                model.cache.truncate(sequence, sequence.length - len(new))
        for sequence in sequences:
            model.free(sequence)
    assert (8, "absorbed") in model._recorded[False]._steps
    for one, other, shape in zip(*results, (3, 8, 3), strict=True):
        assert one.shape == (shape, demo.config.vocab_size)
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_prior_of_a_model(demo):
    bytes_of = step_bytes(demo.config, demo.file.tensors)
    sizes = [bytes_of(tokens) for tokens in (1, 2, 8)]
    assert sizes[0] < sizes[1] < sizes[2] < 8 * sizes[0]
    assert sizes[0] == costs.token_bytes(demo.config, demo.file.tensors, 1)
