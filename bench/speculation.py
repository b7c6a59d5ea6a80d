"""Speculation: how much faster it generates, by acceptance and draft length, and on three kinds of texts.

With a model file: a drafter that is right with a set probability, so that gain can be measured against acceptance and
draft length whatever the model's weights are, beside the gain that the bytes of `pymla.engine.costs` predict. Then
prompt lookup with the demo model on three texts: one that is edited, one that is summed up, and one that is free. The
demo model is too small to edit or sum up, and repeats itself instead. So each text is generated twice: as the model
writes it, and as an author wrote it, whose tokens are taken instead of the model's.

Every gain is the rate of a loop with speculation over that of the same loop without, measured in turns. Before anything
is measured, texts with and without speculation are compared.
"""

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from speculation_texts import TEXTS  # noqa: E402

import pymla  # noqa: E402
from pymla.engine.language_model import LanguageModel  # noqa: E402
from pymla.engine.speculation import (  # noqa: E402
    NO_DRAFT,
    Draft,
    Drafter,
    NgramDrafter,
    Speculation,
    StepTimes,
    step_bytes,
)
from pymla.errors import PymlaError  # noqa: E402
from pymla.files import outputs  # noqa: E402
from pymla.measure import facts, plot  # noqa: E402
from pymla.pages import CACHE_TYPES  # noqa: E402
from pymla.text.sampling import Sampled, SamplingParams  # noqa: E402

GREEDY = SamplingParams(temperature=0)
#: Texts with and without speculation may differ where the two best logits are so close: over a cache of 8 bits or fewer
#: attention rounds its queries and weights to 8 bits.
TIE, ROUNDED_TIE = 1e-3, 0.05

EXAMPLES = """\b
Examples:
  python bench/speculation.py
  python bench/speculation.py v2-lite.gguf --acceptance 0.5,0.7,0.9 --lengths 1,2,4,7 --tokens 64
  python bench/speculation.py v2-lite.gguf --no-texts --json build/speculation.json --plot build/speculation.png
"""


class Oracle:
    """Knows the text, and drafts each of its tokens with a set probability, otherwise another one.

    Parameters
    ----------
    text : list of int
        The prompt, and what follows.
    probability : float
    vocab_size : int
    """

    wants_hidden = False

    def __init__(self, text: list[int], probability: float, vocab_size: int):
        self._text, self._probability, self._vocab_size = text, probability, vocab_size
        self._rng = np.random.default_rng(1)

    def begin(self, prompt, params, sequence=None) -> list[int]:
        """The position in the text."""
        return [len(prompt)]

    def read(self, state, start, hidden) -> None:
        """Nothing: it does not follow hidden states."""

    def kind(self, state) -> int:
        """All drafts are of one."""
        return 0

    def draft(self, states, most) -> list[Draft]:
        """Tokens of the text, some of them wrong."""
        return [Draft(self._following(at, count)) for (at,), count in zip(states, most, strict=True)]

    def commit(self, state, tokens, hidden=None) -> None:
        """Move on."""
        state[0] += len(tokens)

    def end(self, state) -> None:
        """Nothing."""

    def _following(self, at: int, count: int) -> list[int]:
        right = self._rng.random(count) < self._probability
        tokens = self._text[at : at + count]
        return [t if ok else (t + 1) % self._vocab_size for t, ok in zip(tokens, right, strict=False)]


class Told:
    """A sampler that looks for the likeliest token and takes that of a text: for texts that a model cannot write, and
    for models with random weights, where at a tie of two logits a text would go on as its drafter does not know."""

    def __init__(self, sampler, text: list[int]):
        self._sampler, self._text = sampler, iter(text)

    def sample(self, logits, mask=None) -> Sampled:
        """The next token of the text."""
        return self._sampler.sample(logits, mask)._replace(token=next(self._text))


@dataclasses.dataclass
class Run:
    """A generated text, how long it took, and what speculation did."""

    tokens: list[int]
    seconds: float
    margins: list[float]  # by how much the likeliest token's logit exceeded the next one's
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    off_at: int | None = None  # the token after which speculation turned itself off for the rest of the text

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return len(self.tokens) / self.seconds

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0


class Bench:
    """A model with a prompt in its cache, from which texts are generated again and again.

    Parameters
    ----------
    language_model : LanguageModel
    prompt : list of int
    """

    def __init__(self, language_model: LanguageModel, prompt: list[int]):
        self.language_model, self.model, self.prompt = language_model, language_model.model, prompt
        self._sequence = self.model.new_sequence()
        self.model.forward([(self._sequence, np.array(prompt, np.int32))])
        self._prior = step_bytes(language_model.config, language_model.file.tensors)
        self._times = StepTimes(self._prior)  # which a program that generates one text after the other keeps

    def relative_bytes(self, tokens: int) -> float:
        """Bytes of a step of so many tokens in relation to one of one token."""
        return self._prior(tokens) / self._prior(1)

    def run(
        self,
        count: int,
        drafter: Drafter[Any] | None = None,
        most: int | None = None,
        adapts: bool = True,
        told: list[int] | None = None,
        margins: bool = False,
    ) -> Run:
        """Generate `count` tokens; without a drafter by plain steps."""
        model, sequence, tokens, result = self.model, self._sequence, [*self.prompt], Run([], 0.0, [])
        model.cache.truncate(sequence, len(tokens) - 1)
        sampler = model.sampler(GREEDY, tokens)
        sampler = sampler if told is None else Told(sampler, told)
        speculation = text = None
        began = time.perf_counter()
        if drafter:
            limits = {} if most is None else {"most": most}
            speculation = Speculation(drafter, self._times, adapts=adapts, **limits)
            text = speculation.begin(tokens, GREEDY)
        while (left := len(self.prompt) + count - len(tokens)) > 0:
            draft = speculation.draft([text], [left - 1])[0] if speculation else NO_DRAFT
            new = np.array([tokens[-1], *draft.tokens], np.int32)
            before = time.perf_counter()
            logits = model.step([(sequence, new)], "all")
            model.backend.memory.to_host(logits[:, :1])
            seconds = time.perf_counter() - before
            if margins:
                best = np.sort(model.backend.memory.to_host(logits), axis=1)[:, -2:]
            if speculation:
                chosen = speculation.verify(text, sampler, logits, draft)
                speculation.took(seconds)
                if text.is_on:
                    result.off_at = None
                elif result.off_at is None and len(tokens) > len(self.prompt):
                    result.off_at = len(tokens) - len(self.prompt)
            else:
                chosen = [sampler.sample(logits[0])]
            result.margins += (best[: len(chosen), 1] - best[: len(chosen), 0]).tolist() if margins else []
            tokens += [each.token for each in chosen]
            model.cache.truncate(sequence, len(tokens) - 1)
            result.steps += 1
        result.seconds, result.tokens = time.perf_counter() - began, tokens[len(self.prompt) :]
        if text:
            result.drafted, result.accepted = text.counts.drafted, text.counts.accepted
        return result

    def check(self, count: int, drafter: Drafter[Any], most: int) -> None:
        """Refuse to measure unless a text is the same with speculation, up to the first tie.

        Raises
        ------
        PymlaError
        """
        tie = TIE if self.model.cache.exact else ROUNDED_TIE
        plain, spoken = self.run(count), self.run(count, drafter, most, adapts=False, margins=True)
        for i, (token, other) in enumerate(zip(plain.tokens, spoken.tokens, strict=True)):
            if token == other:
                continue
            if spoken.margins[i] < tie:
                return
            raise PymlaError(f"token {i} is {other} with speculation and {token} without; no tie: {spoken.margins[i]}")

    def close(self) -> None:
        """Give the cache back."""
        self.model.free(self._sequence)


@dataclasses.dataclass(frozen=True)
class Point:
    """A gain by acceptance and draft length; 0: the length adapts."""

    acceptance: float
    length: int
    gain: float
    predicted: float  # by the bytes of steps; of the best length, where it adapts
    accepted: float  # the share that was
    tokens_per_step: float


def brings(acceptance: float, length: int) -> float:
    """Tokens that a step with a draft gives on average."""
    return sum(acceptance**i for i in range(length + 1))


def by_acceptance(bench: Bench, acceptances, lengths, count: int, repeat: int) -> list[Point]:
    """Gains of a drafter that is right with each probability, for drafts of each length and of adapted ones."""
    vocab_size, points = bench.language_model.config.vocab_size, []
    text = bench.run(count).tokens

    def oracle(acceptance):
        return Oracle([*bench.prompt, *text], acceptance, vocab_size)

    bench.check(min(count, 24), oracle(0.7), max(lengths))
    for length in lengths:  # recorded and replayed
        bench.run(2 * length + 2, oracle(1.0), length, False, text)
    for acceptance in acceptances:
        predicted = {n: brings(acceptance, n) / bench.relative_bytes(n + 1) for n in lengths}
        for length in (*lengths, 0):
            gains, runs = [], []
            for _ in range(repeat):
                runs.append(bench.run(count, oracle(acceptance), length or max(lengths), length == 0, text))
                gains.append(runs[-1].rate / bench.run(max(4, count // 4), told=text).rate)
            accepted = sum(run.accepted for run in runs) / max(1, sum(run.drafted for run in runs))
            per_step = sum(len(run.tokens) for run in runs) / sum(run.steps for run in runs)
            best = max(1.0, *predicted.values()) if length == 0 else predicted[length]
            points.append(Point(acceptance, length, statistics.median(gains), best, accepted, per_step))
            print(line(points[-1]), flush=True)
    return points


@dataclasses.dataclass(frozen=True)
class TextPoint:
    """Prompt lookup on a text."""

    text: str
    writer: str  # "model", or "author" of a text that the model is led through
    gain: float
    acceptance: float
    tokens_per_step: float
    tokens: int
    off_at: int | None


def of_texts(count: int, repeat: int, settings: dict) -> list[TextPoint]:
    """Prompt lookup with the demo model."""
    points = []
    with pymla.load(ctx=1024, **settings) as language_model:
        for name, (prompt, answer) in TEXTS.items():
            bench = Bench(language_model, language_model.tokenize(prompt))
            bench.check(count, NgramDrafter(), 15)
            for writer, told in (("model", None), ("author", language_model.tokenize(answer, add_bos=False))):
                points.append(lookup(bench, name, writer, told, count, repeat))
                print(text_line(points[-1]), flush=True)
            bench.close()
    return points


def lookup(bench: Bench, name: str, writer: str, told: list[int] | None, count: int, repeat: int) -> TextPoint:
    """Prompt lookup on a text. The first runs record steps."""
    tokens, gains = len(told) if told else count, []
    for _ in range(repeat + 1):
        plain, spoken = bench.run(tokens, told=told), bench.run(tokens, NgramDrafter(), told=told)
        gains.append(spoken.rate / plain.rate)
    per_step = tokens / spoken.steps
    return TextPoint(name, writer, statistics.median(gains[1:]), spoken.acceptance, per_step, tokens, spoken.off_at)


def line(point: Point) -> str:
    """A row of the table of gains by acceptance."""
    length = point.length or "adapted"
    return (
        f"| {point.acceptance:>10.2f} | {length:>7} | {point.gain:>5.2f} | {point.predicted:>8.2f} "
        f"| {point.accepted:>8.2f} | {point.tokens_per_step:>11.2f} |"
    )


def text_line(point: TextPoint) -> str:
    """A row of the table of texts."""
    off = "-" if point.off_at is None else str(point.off_at)
    return (
        f"| {point.text:>11} | {point.writer:>10} | {point.gain:>5.2f} | {point.acceptance:>10.2f} "
        f"| {point.tokens_per_step:>11.2f} | {off:>11} |"
    )


def draw(points: list[Point], path: Path, title: str) -> None:
    """Gains against the length, a line for each acceptance, and those of adapted lengths against acceptance."""
    with plot.picture(path, title, (11, 5.2)) as figure:
        left, right = figure.subplots(1, 2)
        for i, acceptance in enumerate(sorted({point.acceptance for point in points})):
            rows = [each for each in points if each.acceptance == acceptance and each.length]
            lengths = [each.length for each in rows]
            left.plot(lengths, [each.gain for each in rows], f"C{i}o-", label=f"right with {acceptance:g}")
            left.plot(lengths, [each.predicted for each in rows], f"C{i}:")
        adapted = [each for each in points if not each.length]
        right.plot([each.acceptance for each in adapted], [each.gain for each in adapted], "C0o-", label="measured")
        right.plot([each.acceptance for each in adapted], [each.predicted for each in adapted], "C0:", label="costs.py")
        left.set_title("drafts of one length (dotted: costs.py)")
        right.set_title("adapted length (dotted: the best length by costs.py)")
        left.set_xlabel("drafted tokens")
        right.set_xlabel("probability that a drafted token is right")
        for axes in (left, right):
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_ylabel("gain over no speculation")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend()


def _numbers(kind):
    def parse(_context, _option, text: str):
        try:
            return tuple(sorted({kind(part) for part in text.split(",")}))
        except ValueError:
            raise click.BadParameter("write numbers with commas between") from None

    return parse


@click.command(epilog=EXAMPLES)
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--acceptance", callback=_numbers(float), default="0.5,0.7,0.8,0.9,1", show_default=True, metavar="P,P,…")
@click.option("--lengths", callback=_numbers(int), default="1,2,3,4,5,7,10,15", show_default=True, metavar="N,N,…")
@click.option("--tokens", type=click.IntRange(min=4), default=64, show_default=True, help="Tokens of each text.")
@click.option("--depth", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of the prompt.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Texts for each figure.")
@click.option("--texts/--no-texts", default=True, help="Prompt lookup with the demo model.  [default: texts]")
@click.option(
    "--text-tokens", type=click.IntRange(min=4), default=256, show_default=True, help="Tokens of each text there."
)
@click.option("--cache-type", type=click.Choice(list(CACHE_TYPES)), default="q8_0", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="[default: all usable cores]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), default=HERE / "results" / "speculation.json")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), default=HERE / "results" / "speculation.png")
def main(model, acceptance, lengths, tokens, depth, repeat, texts, text_tokens, json_path, plot_path, **settings):
    """Measure what speculation gains on MODEL by acceptance and draft length, and with prompt lookup on three texts;
    write a JSON file and, with MODEL, a picture."""
    try:
        if model:
            plot.check(plot_path)
        points = measured(model, acceptance, lengths, tokens, depth, repeat, settings) if model else []
        lookups = []
        if texts:
            print("| text        | written by |  gain | acceptance | tokens/step | off at token |")
            lookups = of_texts(text_tokens, repeat, settings)
        machine = facts.machine()
        result = {
            "machine": machine,
            "date": time.strftime("%Y-%m-%d"),
            "model": model and model.name,
            **settings,
            "depth": depth,
            "tokens": tokens,
            "by_acceptance": [dataclasses.asdict(point) for point in points],
            "texts": [dataclasses.asdict(point) for point in lookups],
        }
        outputs.write(json_path, (json.dumps(result, indent=1) + "\n").encode())
        if points:
            draw(points, plot_path, f"Speculation: {model.name}, {machine}, {time.strftime('%Y-%m-%d')}")
    except PymlaError as error:
        raise click.ClickException(str(error)) from None


def measured(model: Path, acceptance, lengths, tokens: int, depth: int, repeat: int, settings: dict) -> list[Point]:
    """The points of a model."""
    with pymla.load(model, ctx=depth + tokens + max(lengths) + 1, **settings) as language_model:
        ids = np.random.default_rng(1).integers(language_model.config.vocab_size, size=depth)
        bench = Bench(language_model, ids.tolist())
        print("| acceptance |  length |  gain | costs.py | accepted | tokens/step |")
        return by_acceptance(bench, acceptance, lengths, tokens, repeat)


if __name__ == "__main__":
    main()
