"""Scores of a model on questions with several answers: HellaSwag, Winogrande, and multiple choice (ARC, MMLU,
TruthfulQA).

An answer's score is the mean log-probability of its tokens, and the model chooses the answer with the best one. Files
and definitions are those of llama.cpp's tools/perplexity/perplexity.cpp (`hellaswag_score`, `multiple_choice_score`,
`winogrande_score`); where it takes some of the tasks of a file, the same ones are taken here, in the same order.

Two things differ from there. An answer has its first token's probability right where Winogrande's answers are compared
from their first different token on (a note in llama.cpp's source says that it has not), and an answer that begins
another one is scored by its last token instead of by a token that it does not have.
"""

import csv
import io
import math
import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pymla import checks
from pymla.engine.cache import Sequence as CachedSequence
from pymla.engine.model import Model
from pymla.errors import PymlaError
from pymla.files.textfile import decode
from pymla.make.perplexity import LOGITS_BYTES, log_sums_of, step_logits
from pymla.pages import pages_of
from pymla.printable import shown
from pymla.text.tokenizer import Tokenizer

#: Tasks of a step at most.
MOST_TASKS = 64
#: The answers of a question at most, as in llama.cpp.
MOST_ANSWERS = 100

#: The normal distribution's value that 95 % lie within.
_Z = 1.95996398454
#: Winogrande scores what follows the word in question where both sentences have more tokens than this from their first
#: different one on; otherwise the word counts as well.
_TRAILING = 3


class Question(NamedTuple):
    """A task as a file has it."""

    texts: tuple[str, ...]  # a whole text for each answer
    right: frozenset[int]  # numbers of the right answers
    starts: tuple[str, ...] = ()  # for each answer, what comes before the tokens that are scored; or nothing
    name: str = ""  # for messages: the file, and where in it


class Answer(NamedTuple):
    """Tokens of an answer with its question, of which those from `start` to `stop` - 1 are scored."""

    tokens: np.ndarray  # int32 (n,)
    start: int  # 1 at least
    stop: int


class Task(NamedTuple):
    """A question as tokens."""

    answers: tuple[Answer, ...]
    shared: int  # first tokens that all answers have in common
    right: frozenset[int]
    name: str

    @property
    def longest(self) -> int:
        """Tokens of its longest answer."""
        return max(len(answer.tokens) for answer in self.answers)


class Score(NamedTuple):
    """How many of some tasks a model did well."""

    right: int
    tasks: int

    @property
    def share(self) -> float:
        """The share of right tasks, 0 to 1; at least one task."""
        return self.right / self.tasks

    @property
    def error(self) -> float:
        """The standard error of `share`; NaN for one task."""
        return math.sqrt(self.share * (1 - self.share) / (self.tasks - 1)) if self.tasks > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The bounds that hold the true share with a probability of 95 % (Wilson, 1927)."""
        z = _Z * _Z / self.tasks
        centre = self.share + z / 2
        half = z / (2 * _Z) * math.sqrt(self.tasks * (4 * self.share * (1 - self.share) + z))
        return (centre - half) / (1 + z), (centre + half) / (1 + z)


def chance(tasks: Sequence[Task]) -> float:
    """The share that a guess has right: tasks over answers, as llama.cpp counts."""
    return len(tasks) / sum(len(task.answers) for task in tasks)


# Files ---------------------------------------------------------------------------------------------------------------


def read_hellaswag(data: bytes, path: Path) -> list[Question]:
    """HellaSwag's tasks: six lines each, the context, the number of the right ending, and four endings.

    Raises
    ------
    PymlaError
        The number of lines is no multiple of six, the right ending is none of the four, or a line is empty.
    """
    lines = [line.removesuffix("\r") for line in decode(data, path).split("\n")]
    if lines and not lines[-1]:
        lines.pop()
    if not lines or len(lines) % 6:
        raise PymlaError(f"{path}: has {len(lines)} lines; a task of HellaSwag has 6")
    questions = []
    for first in range(0, len(lines), 6):
        context, right, *endings = lines[first : first + 6]
        if right.strip() not in ("0", "1", "2", "3"):
            raise PymlaError(f"{path}: line {first + 2} is {shown(right)}; the number of the right ending is 0 to 3")
        if not (context and all(endings)):
            raise PymlaError(f"{path}: the task of lines {first + 1} to {first + 6} has an empty context or ending")
        texts = tuple(f"{context} {ending}" for ending in endings)
        questions.append(Question(texts, frozenset((int(right),)), name=f"{path}: the task of line {first + 1}"))
    return questions


def read_winogrande(data: bytes, path: Path) -> list[Question]:
    """Winogrande's tasks: a line each of comma-separated values, a number, a sentence with ``_``, two words to stand in
    its place, and the right one, 1 or 2.

    Raises
    ------
    PymlaError
        A line is no such task.
    """
    questions = []
    lines = io.StringIO(decode(data, path), newline="")
    try:
        rows = [(number, row) for number, row in enumerate(csv.reader(lines, strict=True), 1) if row]
    except csv.Error as error:
        raise PymlaError(f"{path}: cannot be read as comma-separated values: {error}") from None
    for number, row in rows:
        where = f"{path}: row {number}"
        if len(row) != 5:
            raise PymlaError(f"{where} has {len(row)} values; a task of Winogrande has 5")
        _, sentence, *words, right = row
        before, blank, behind = sentence.partition("_")
        if not blank or not all(words):
            raise PymlaError(f"{where} has no _ in its sentence, or an empty word to stand in its place")
        if right.strip() not in ("1", "2"):
            raise PymlaError(f"{where} has the right word {shown(right)}; 1 or 2 is expected")
        texts = tuple(before + word + behind for word in words)
        starts = tuple(before + word for word in words)
        questions.append(Question(texts, frozenset((int(right) - 1,)), starts, where))
    if not questions:
        raise PymlaError(f"{path}: has no tasks")
    return questions


def read_multiple_choice(data: bytes, path: Path) -> list[Question]:
    """Tasks in llama.cpp's binary form, of which public files have ARC, MMLU and TruthfulQA.

    Little-endian: uint32, the number of tasks; the offset of each, uint32; at each offset the question and two lists of
    answers, of which the first has one right answer and counts. A text is its bytes behind their number, uint32. A list
    is a number, uint32, so many texts, and so many int32, 1 for a right answer and 0 for others.

    Raises
    ------
    PymlaError
        The file is cut or damaged, or a task has an empty text or no right answer.
    """
    reader = _Binary(data, path)
    count = reader.number("the number of tasks")
    if not count or 4 + 4 * count > len(data):
        raise PymlaError(f"{path}: has {len(data)} bytes, and says that it has {count} tasks: it is no file of tasks")
    offsets = [reader.number("an offset") for _ in range(count)]
    return [reader.task(offset, number) for number, offset in enumerate(offsets)]


class _Binary:
    """Reads texts and numbers of a file one after the other."""

    def __init__(self, data: bytes, path: Path):
        self._data, self._path, self._at = data, path, 0

    def task(self, offset: int, number: int) -> Question:
        """The task at an offset."""
        where, self._at = f"{self._path}: task {number}", offset
        question = self._text(f"the question of task {number}")
        answers, labels = self._answers(number)
        self._answers(number)
        if not question or not answers or not all(answers):
            raise PymlaError(f"{where} has an empty question or answer, or no answers")
        right = frozenset(i for i, label in enumerate(labels) if label == 1)
        if not right:
            raise PymlaError(f"{where} has no right answer")
        return Question(tuple(f"{question} {answer}" for answer in answers), right, name=where)

    def number(self, what: str) -> int:
        """A uint32."""
        return int(struct.unpack("<I", self._take(4, what))[0])

    def _answers(self, number: int) -> tuple[list[str], tuple[int, ...]]:
        count = self.number(f"the number of answers of task {number}")
        if count > MOST_ANSWERS:
            raise PymlaError(f"{self._path}: task {number} has {count} answers; {MOST_ANSWERS} are the most")
        texts = [self._text(f"an answer of task {number}") for _ in range(count)]
        return texts, struct.unpack(f"<{count}i", self._take(4 * count, f"the right answers of task {number}"))

    def _text(self, what: str) -> str:
        data = self._take(self.number(f"the length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise PymlaError(f"{self._path}: {what} is no UTF-8 ({error.reason} at its byte {error.start})") from None

    def _take(self, count: int, what: str) -> bytes:
        data = self._data[self._at : self._at + count]
        if len(data) < count:
            raise PymlaError(
                f"{self._path}: {what} begins at byte {self._at} and has {count} bytes, and the file has "
                f"{len(self._data)}: it was cut, or is damaged"
            )
        self._at += count
        return data


# Which tasks ---------------------------------------------------------------------------------------------------------


def shuffled(questions: Sequence[Question], count: int | None) -> list[Question]:
    """Some of HellaSwag's tasks, or all, in the order in which llama.cpp takes them: of those that are left, each time
    one that a Mersenne twister of seed 1 chooses (GCC's `std::uniform_int_distribution`, after Lemire, 2019)."""
    draws, left, taken = _draws(), list(questions), []
    for _ in range(_count(count, len(left))):
        product = next(draws) * len(left)
        while product & 0xFFFFFFFF < (-len(left) & 0xFFFFFFFF) % len(left):
            product = next(draws) * len(left)
        taken.append(left.pop(product >> 32))
    return taken


def sampled(questions: Sequence[Question], count: int | None) -> list[Question]:
    """Some of the tasks of other files, as llama.cpp chooses them; all in the order of the file."""
    wanted = _count(count, len(questions))
    if wanted == len(questions):
        return list(questions)
    draws, left, taken = _draws(), list(range(len(questions))), []
    for _ in range(wanted):
        # In float32, as there.
        at = int(np.float32(2.0**-32) * np.float32(next(draws)) * np.float32(len(left)))
        at = min(at, len(left) - 1)
        taken.append(questions[left[at]])
        left[at] = left[-1]
        left.pop()
    return taken


def _count(count: int | None, most: int) -> int:
    return most if count is None else min(checks.integer("tasks", count, 1), most)


def _draws() -> Iterator[int]:
    """The numbers of ``std::mt19937(1)``."""
    twister = np.random.RandomState(1)  # NumPy's newer generators take other numbers from a seed
    while True:
        yield from twister.randint(0, 1 << 32, 256, np.uint32).tolist()


# Tokens --------------------------------------------------------------------------------------------------------------


def tokenised(question: Question, tokenizer: Tokenizer) -> Task:
    """A question as tokens.

    Raises
    ------
    PymlaError
        An answer is a single token that nothing stands before.
    """
    ids = [np.asarray(tokenizer.encode(text), np.int32) for text in question.texts]
    shortest = min(len(each) for each in ids)
    # One token at least is not shared, so that every answer has a score.
    same = [all(each[i] == ids[0][i] for each in ids) for i in range(max(shortest - 1, 0))]
    shared = same.index(False) if False in same else len(same)
    starts, stops = [max(shared, 1)] * len(ids), [len(each) for each in ids]
    if question.starts and min(stops) - shared > _TRAILING:
        for i, text in enumerate(question.starts):
            start = max(len(tokenizer.encode(text)), shared, 1)
            if start < stops[i]:
                starts[i] = start
    if question.starts:
        # The last token, mostly a full stop, says nothing.
        stops = [stop - (stop - start > 1) for start, stop in zip(starts, stops, strict=True)]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        raise PymlaError(f"{question.name} has an answer of one token, with none before it")
    answers = tuple(map(Answer, ids, starts, stops))
    return Task(answers, shared, question.right, question.name)


# Scores --------------------------------------------------------------------------------------------------------------


def answer_scores(
    model: Model, tasks: Sequence[Task], progress: Callable[[int, int], object] | None = None
) -> Generator[np.ndarray, None, None]:
    """Mean log-probabilities of the answers of one task after the other, float64 (answers,), in nats.

    What the answers of a task share goes through the model once. Several tasks go through it together.

    Parameters
    ----------
    model : Model
    tasks : list of Task
    progress : callable(done, total), optional
        Told of tasks.

    Raises
    ------
    PymlaError
        A task does not fit the context, or a logit is not finite.
    """
    for task in tasks:
        if task.longest > model.ctx:
            raise PymlaError(f"{task.name} has {task.longest} tokens, and the context holds {model.ctx}: raise `ctx`")
    done = 0
    for group in _groups(model, tasks):
        yield from _Group(model, group).scores()
        done += len(group)
        if progress:
            progress(done, len(tasks))


def score(tasks: Sequence[Task], scores: Sequence[np.ndarray]) -> Score:
    """How many of the first tasks are right, by their answers' scores; of equal scores the first answer is chosen."""
    pairs = zip(tasks, scores, strict=False)
    return Score(sum(int(found.argmax()) in task.right for task, found in pairs), len(scores))


def _groups(model: Model, tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Tasks that fit the cache together, and whose logits are no more than a step may have."""
    most = max(1, LOGITS_BYTES // (4 * model.config.vocab_size))
    group: list[Task] = []
    pages = rows = 0
    for task in tasks:
        own_pages = pages_of(task.longest)
        own_rows = max(answer.stop - answer.start for answer in task.answers)
        if group and (pages + own_pages > model.cache.pages or rows + own_rows > most or len(group) == MOST_TASKS):
            yield group
            group, pages, rows = [], 0, 0
        group.append(task)
        pages, rows = pages + own_pages, rows + own_rows
    if group:
        yield group


class _Group:
    """Tasks that go through the model together: one step reads what the answers of each task share, then there is a
    step for every number of an answer."""

    def __init__(self, model: Model, tasks: Sequence[Task]):
        self._model, self._tasks = model, tasks
        self._sequences = [model.new_sequence() for _ in tasks]
        self._sums = [np.zeros(len(task.answers)) for task in tasks]
        self._where = f"{tasks[0].name} or of {len(tasks) - 1} tasks behind it"

    def scores(self) -> list[np.ndarray]:
        """Mean log-probabilities of the tasks' answers."""
        try:
            self._read_shared()
            for number in range(max(len(task.answers) for task in self._tasks)):
                self._read_answers(number)
        finally:
            for sequence in self._sequences:
                self._model.free(sequence)
        return [
            sums / [answer.stop - answer.start for answer in task.answers]
            for task, sums in zip(self._tasks, self._sums, strict=True)
        ]

    def _read_shared(self) -> None:
        """Read what answers share, and add the log-probabilities of the tokens right behind it."""
        some = [i for i, task in enumerate(self._tasks) if task.shared]
        if not some:
            return
        batch = [(self._sequences[i], self._tasks[i].answers[0].tokens[: self._tasks[i].shared]) for i in some]
        logits = step_logits(self._model, batch, np.cumsum([len(tokens) for _, tokens in batch]) - 1)
        log_sums = log_sums_of(logits, self._where)
        for row, i in enumerate(some):
            task = self._tasks[i]
            for j, answer in enumerate(task.answers):
                if answer.start == task.shared:
                    self._sums[i][j] += logits[row, answer.tokens[task.shared]] - log_sums[row]

    def _read_answers(self, number: int) -> None:
        """Read the answers of a number, add the log-probabilities of their other tokens, and forget them again."""
        batch: list[tuple[CachedSequence, np.ndarray]] = []
        wanted: list[np.ndarray] = []
        predicted: list[tuple[int, np.ndarray]] = []  # numbers of tasks, and tokens of theirs
        length = 0
        for i, task in enumerate(self._tasks):
            answer = task.answers[number] if number < len(task.answers) else None
            # The token right behind what is shared is predicted without any of the answer's.
            first = max(answer.start, task.shared + 1) if answer else 0
            if not answer or first >= answer.stop:
                continue
            tokens = answer.tokens[task.shared : answer.stop - 1]
            batch.append((self._sequences[i], tokens))
            wanted.append(length + np.arange(first - 1 - task.shared, len(tokens)))
            predicted.append((i, answer.tokens[first : answer.stop]))
            length += len(tokens)
        if not batch:
            return
        logits = step_logits(self._model, batch, np.concatenate(wanted))
        log_sums, row = log_sums_of(logits, self._where), 0
        for i, targets in predicted:
            rows = np.arange(row, row + len(targets))
            self._sums[i][number] += (logits[rows, targets] - log_sums[rows]).sum()
            self._model.cache.truncate(self._sequences[i], self._tasks[i].shared)
            row += len(targets)
