"""Questions with several answers: files, which tasks are taken, and scores against their definition."""

import math
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import question_files
from hypothesis import given, settings
from hypothesis import strategies as st

import pymla
from pymla.errors import PymlaError
from pymla.make import choices
from pymla.make.choices import Answer, Question, Score, Task

MODEL = Path(__file__).parent / "golden" / "v3.gguf"
TEXT = question_files.TEXT.read_text()
MADE = question_files.questions(TEXT, 12)
WHERE = Path("tasks")


@pytest.fixture(scope="module")
def loaded():
    with pymla.load(MODEL, device="cpu", cache_type="f32", ctx=128, cache_tokens=640) as found:
        yield found


# Files


def test_hellaswag():
    data = question_files.hellaswag(MADE)
    for each in (data, data.removesuffix(b"\n"), data.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + data):
        found = choices.read_hellaswag(each, WHERE)
        assert len(found) == 12
        for question, (context, endings, right) in zip(found, MADE, strict=True):
            assert question.texts == tuple(f"{context} {ending}" for ending in endings)
            assert question.right == {right}
    assert found[1].name == "tasks: the task of line 7"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "has 0 lines"),
        (b"a\n0\nb\nc\nd", "has 5 lines"),
        (b"a\n4\nb\nc\nd\ne\n", "line 2 is '4'"),
        (b"a\n\nb\nc\nd\ne\n", "line 2 is ''"),
        (b"a\n1\nb\n\nd\ne\n", "lines 1 to 6 has an empty context or ending"),
        (b"a\n1\nb\n\xff\nd\ne\n", "not valid UTF-8"),
    ],
)
def test_damaged_hellaswag(data, words):
    with pytest.raises(PymlaError, match=words):
        choices.read_hellaswag(data, WHERE)


def test_winogrande():
    found = choices.read_winogrande(question_files.winogrande(), WHERE)
    assert found[0].texts[1] == "The function returns the sum, so the color is added to the result."
    assert found[0].starts == (
        "The function returns the sum, so the value",
        "The function returns the sum, so the color",
    )
    assert [question.right for question in found] == [{right - 1} for *_, right in question_files.SENTENCES]
    assert found[7].texts[0] == 'An object with the name "x" is returned, and the other one is not.'


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "has no tasks"),
        (b"0,a _ b,c,1\n", "row 1 has 4 values"),
        (b"0,a b,c,d,1\n", "row 1 has no _"),
        (b"0,a _ b,c,,1\n", "an empty word"),
        (b"\n0,a _ b,c,d,3\n", "row 2 has the right word '3'"),
        (b'0,"a _ b,c,d,1\n', "comma-separated values"),
    ],
)
def test_damaged_winogrande(data, words):
    with pytest.raises(PymlaError, match=words):
        choices.read_winogrande(data, WHERE)


def test_multiple_choice():
    found = choices.read_multiple_choice(question_files.multiple_choice(MADE), WHERE)
    assert [len(question.texts) for question in found[:4]] == [3, 4, 4, 4]
    for question, (context, endings, right) in zip(found, MADE, strict=True):
        assert question.texts == tuple(f"{context} {ending}" for ending in endings)[: len(question.texts)]
        assert question.right == {right}


def one_task(question=b"\1\0\0\0q", answers=None, labels=(0, 1)):
    answers = question_files.answers(["a", "b"], labels) if answers is None else answers
    return struct.pack("<II", 1, 8) + question + answers + question_files.answers([], [])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\1\0", "the number of tasks begins at byte 0 and has 4 bytes, and the file has 2"),
        (b"\0\0\0\0", "says that it has 0 tasks"),
        (b"\xff\0\0\0abc", "says that it has 255 tasks"),
        (one_task()[:-1], "the number of answers of task 0 begins"),
        (one_task(question=b"\xff\xff\xff\xff"), "the question of task 0 begins at byte 12 and has 4294967295 bytes"),
        (one_task(question=b"\0\0\0\0"), "an empty question or answer"),
        (one_task(question=b"\1\0\0\0\xff"), "the question of task 0 is no UTF-8"),
        (one_task(answers=question_files.answers(["a", ""], (0, 1))), "an empty question or answer"),
        (one_task(answers=question_files.answers([], ())), "or no answers"),
        (one_task(answers=struct.pack("<I", 101)), "task 0 has 101 answers; 100 are the most"),
        (one_task(labels=(0, 2)), "task 0 has no right answer"),
        (struct.pack("<II", 1, 1000), "begins at byte 1000"),
    ],
)
def test_damaged_multiple_choice(data, words):
    with pytest.raises(PymlaError, match=words):
        choices.read_multiple_choice(data, WHERE)


READERS = {
    choices.read_hellaswag: question_files.hellaswag(MADE[:3]),
    choices.read_winogrande: question_files.winogrande(),
    choices.read_multiple_choice: question_files.multiple_choice(MADE[:3]),
}


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_bytes(read, data):
    found = bytearray(READERS[read])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(found)) | st.integers(0, 20))
        odd = st.sampled_from([b"\n", b"\r", b",", b'"', b"_", b"\0", b"\xff\xff\xff\xff", b"\1\0\0\0", b"\n\n"])
        found[at : at + data.draw(st.integers(0, 6))] = data.draw(st.binary(max_size=8) | odd)
    message = ""
    try:
        for question in read(bytes(found), WHERE):
            assert question.right
            assert max(question.right) < len(question.texts)
            assert all(question.texts)
    except PymlaError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 1000


# Which tasks


def mersenne_twister(seed, count):
    """The first numbers of ``std::mt19937`` (Matsumoto and Nishimura, 1998)."""
    state = [seed]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) & 0xFFFFFFFF)
    for i in range(count):
        word = state[i] & 0x80000000 | state[i + 1] & 0x7FFFFFFF
        state.append(state[i + 397] ^ word >> 1 ^ 0x9908B0DF * (word & 1))
        number = state[-1]
        number ^= number >> 11
        number ^= number << 7 & 0x9D2C5680
        number ^= number << 15 & 0xEFC60000
        yield number ^ number >> 18


def test_random_numbers_are_those_of_cpp():
    draws = choices._draws()
    found = [next(draws) for _ in range(600)]
    assert found[:2] == [1791095845, 4282876139]
    assert found == list(mersenne_twister(1, 600))


def test_tasks_that_are_taken():
    questions = [Question((str(i),), frozenset((0,))) for i in range(50)]
    for take in (choices.shuffled, choices.sampled):
        some = take(questions, 20)
        assert len({question.texts for question in some}) == 20
        assert take(questions, 10) == some[:10]
        assert len(take(questions, 51)) == len(take(questions, None)) == 50
        with pytest.raises(PymlaError, match="`tasks` is 0"):
            take(questions, 0)
    assert choices.sampled(questions, None) == questions
    assert sorted(question.texts for question in choices.shuffled(questions, None)) == sorted(
        q.texts for q in questions
    )
    # 1791095845 * 50 >> 32, and of 49 that are left 4282876139 * 49 >> 32.
    assert [question.texts[0] for question in choices.shuffled(questions, 2)] == ["20", "49"]
    assert [question.texts[0] for question in choices.sampled(questions, 2)] == ["20", "48"]


# Tokens


class Letters:
    """A tokenizer with a token for every character, and BOS."""

    @staticmethod
    def encode(text):
        return [1, *map(ord, text)]


def ranges(*texts, starts=()):
    task = choices.tokenised(Question(texts, frozenset((0,)), starts, "q"), Letters)
    return task.shared, [(answer.start, answer.stop) for answer in task.answers]


def test_tokens_that_count():
    assert ranges("ab cd", "ab efg") == (4, [(4, 6), (4, 7)])
    assert ranges("ab", "abc") == (2, [(2, 3), (2, 4)])  # an answer that begins another one has its last token
    assert ranges("ab", "ab") == (2, [(2, 3), (2, 3)])
    # Behind the word in question, but for the full stop; and from the word on, where too little follows.
    assert ranges("a x bcd.", "a yy bcd.", starts=("a x", "a yy")) == (3, [(4, 8), (5, 9)])
    assert ranges("a x.", "a yy.", starts=("a x", "a yy")) == (3, [(3, 4), (3, 5)])
    assert ranges("a x", "a y", starts=("a x", "a y")) == (3, [(3, 4), (3, 4)])
    assert ranges("a xyzuv", "a yzuvw", starts=("a xyzuv", "a yzuvw")) == (3, [(3, 7), (3, 7)])


def test_answers_without_anything_before_them():
    plain = SimpleNamespace(encode=lambda text: list(map(ord, text)))
    found = choices.tokenised(Question(("ab", "cd"), frozenset((0,))), plain)
    assert found.shared == 0
    assert [(answer.start, answer.stop) for answer in found.answers] == [(1, 2), (1, 2)]
    with pytest.raises(PymlaError, match="q has an answer of one token, with none before it"):
        choices.tokenised(Question(("ab", "c"), frozenset((0,)), name="q"), plain)


# Scores


def by_definition(loaded, answer):
    """The mean log-probability of an answer's tokens, from all logits."""
    logits = loaded.logits(answer.tokens).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.mean([log_p[i - 1, answer.tokens[i]] for i in range(answer.start, answer.stop)])


def tasks_of(loaded):
    """Tasks of all three files, and of tokens alone: nothing shared, one token, several lengths."""
    read = [question for reader, data in READERS.items() for question in reader(data, WHERE)]
    found = [choices.tokenised(question, loaded.tokenizer) for question in read]
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 256, count).astype(np.int32) for count in (2, 9, 5)]
    found.append(Task(tuple(Answer(each, 1, len(each)) for each in tokens), 0, frozenset((2,)), "x"))
    start = rng.integers(0, 256, 7).astype(np.int32)
    longer = [np.concatenate([start, each]) for each in tokens]
    found.append(Task(tuple(Answer(each, 7, 8) for each in longer), 7, frozenset((0, 1)), "y"))
    return [task for task in found if task.longest <= 128]


def test_scores_are_those_of_the_definition(loaded, monkeypatch):
    """In whichever groups tasks go through the model."""
    tasks = tasks_of(loaded)
    assert len(tasks) > 6
    expected = [[by_definition(loaded, answer) for answer in task.answers] for task in tasks]
    for most, row_bytes in ((64, 1 << 30), (2, 4 * 288 * 9)):
        monkeypatch.setattr(choices, "MOST_TASKS", most)
        monkeypatch.setattr(choices, "LOGITS_BYTES", row_bytes)
        told = []
        found = list(choices.answer_scores(loaded.model, tasks, lambda *each, told=told: told.append(each)))
        for got, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5)
        assert told[-1] == (len(tasks), len(tasks))
        assert loaded.model.cache.free_pages == loaded.model.cache.pages
    right = sum(int(np.argmax(each)) in task.right for each, task in zip(expected, tasks, strict=True))
    assert choices.score(tasks, found) == (right, len(tasks))
    assert choices.score(tasks, found[:3]).tasks == 3


def test_a_task_that_does_not_fit(loaded):
    long = Answer(np.zeros(129, np.int32), 1, 129)
    task = Task((long, long), 128, frozenset((0,)), "tasks: task 7")
    with pytest.raises(PymlaError, match="tasks: task 7 has 129 tokens, and the context holds 128"):
        list(choices.answer_scores(loaded.model, [task]))


def test_scores_and_chance():
    score = Score(30, 40)
    assert score.share == 0.75
    assert score.error == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    # Wilson's bounds solve (p - share)² = z² p (1 - p) / n.
    for bound in score.interval:
        assert (bound - 0.75) ** 2 == pytest.approx(1.95996398454**2 * bound * (1 - bound) / 40)
    assert score.interval[0] < 0.75 < score.interval[1]
    assert Score(0, 1).interval[0] == pytest.approx(0, abs=1e-12)
    assert math.isnan(Score(1, 1).error)
    answers = [Answer(np.zeros(2, np.int32), 1, 2)] * 4
    tasks = [Task(tuple(answers[:count]), 1, frozenset((0,)), "") for count in (2, 4, 4)]
    assert choices.chance(tasks) == pytest.approx(0.3)
