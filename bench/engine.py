"""The engine against bare steps: parallel generations, prompts that come in beside them, and prefixes that are kept.

Parallel generations run on one event loop, as in a server; a bare step is `Model.step` of as many sequences, without
sampling and without text. Token ids of prompts are random. Before anything is measured, texts that are generated
together are compared with those of bare steps.
"""

import asyncio
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import click
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import pymla  # noqa: E402
from pymla.engine.devices import find_device  # noqa: E402
from pymla.engine.loading import demo_path  # noqa: E402
from pymla.engine.requests import Request  # noqa: E402
from pymla.errors import PymlaError  # noqa: E402
from pymla.files import outputs  # noqa: E402
from pymla.files.gguf_reader import ModelFile  # noqa: E402
from pymla.measure import facts  # noqa: E402
from pymla.models.config import ModelConfig  # noqa: E402
from pymla.pages import CACHE_TYPES  # noqa: E402
from pymla.text.sampling import SamplingParams  # noqa: E402

#: Where the two best logits are closer than this, different steps may choose different tokens: rows of a cache in
#: 8 bits, and activations in 8 bits, round differently from batch to batch.
TIE = 0.05

EXAMPLES = """\b
Examples:
  python bench/engine.py
  python bench/engine.py -m DeepSeek-V2-Lite.Q4_0.gguf --json build/engine.json
  python bench/engine.py -m model.gguf --parallel 1,8 --tg 32 --long 2000
"""


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Generations at the same time."""

    texts: int
    bare_rate: float  # tokens per second of bare steps, all texts together
    engine_rate: float
    first_seconds: float  # until the last of the texts had its first token

    @property
    def share(self) -> float:
        """The engine's rate as a share of that of bare steps."""
        return self.engine_rate / self.bare_rate


@dataclasses.dataclass(frozen=True)
class Beside:
    """A long prompt beside running generations."""

    texts: int
    prompt: int
    alone_rate: float  # of the generations, tokens per second, before the prompt came
    beside_rate: float  # while it was computed
    longest_gap: float  # seconds between two tokens of a text meanwhile
    prompt_seconds: float
    prompt_seconds_alone: float


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Time to first token behind a prefix, in seconds."""

    prefix: int
    new: int
    computed: float
    kept: float


@dataclasses.dataclass(frozen=True)
class Step:
    """A bare step of generations and a slice of a prompt, in seconds."""

    generating: int
    slice: int
    generations: float  # without the slice
    alone: float  # the slice without generations
    mixed: float


class Bench:
    """A model, and what is measured of it.

    Parameters
    ----------
    language_model : LanguageModel
    pp, tg : int
        Tokens of a prompt, and of a text.
    """

    def __init__(self, language_model, pp: int, tg: int):
        self.language_model, self.pp, self.tg = language_model, pp, tg
        self.model, self.engine = language_model.model, language_model.engine
        self.rng = np.random.default_rng(1)
        self.params = SamplingParams(temperature=0)

    def ids(self, count: int) -> list[int]:
        """Random tokens."""
        return self.rng.integers(self.language_model.config.vocab_size, size=count).tolist()

    async def text(self, ids: list[int], count: int, times: list[float]):
        """A text on the event loop, with the time of every token. Returns its tokens."""
        driver, stream = self.engine.driver, self.language_model.tokenizer.stream()
        request = Request(ids, self.params, count)
        driver.submit([request])
        try:
            while True:
                await driver.wait_async(request)
                output = driver.take(request)
                if output is None:
                    return request.tokens[len(ids) :]
                stream.push(output.sampled.token)
                times.append(time.perf_counter())
        finally:
            driver.cancel(request)

    # The gate ---------------------------------------------------------------------------------------------------------

    def check(self, texts: int) -> None:
        """Compare texts that are generated together with those of bare steps."""
        prompts = [self.ids(self.pp // 2 + i) for i in range(texts)]

        async def together():
            return await asyncio.gather(*(self.text(ids, 8, []) for ids in prompts))

        for ids, tokens in zip(prompts, asyncio.run(together()), strict=True):
            sequence, new = self.model.new_sequence(), ids
            for i, token in enumerate(tokens):
                logits = self.model.forward([(sequence, np.array(new, np.int32))])[0]
                missing = float(logits.max() - logits[token])
                if missing > TIE:
                    raise PymlaError(f"token {i} of a text of {texts} is {missing:.3f} less likely than the best one")
                if missing > 0:
                    break
                new = [token]
            self.model.free(sequence)

    # What is measured -------------------------------------------------------------------------------------------------

    def parallel(self, texts: int) -> Parallel:
        """So many generations at a time, by bare steps and by the engine."""
        bare = self._bare(texts)

        async def together():
            times = [[] for _ in range(texts)]
            began = time.perf_counter()
            await asyncio.gather(*(self.text(self.ids(self.pp), self.tg, own) for own in times))
            return began, times

        began, times = asyncio.run(together())
        first, last = max(own[0] for own in times), max(own[-1] for own in times)
        # Tokens from the moment on at which all texts generate.
        tokens = sum(at > first for own in times for at in own)
        return Parallel(texts, texts / bare, tokens / (last - first), first - began)

    def _bare(self, texts: int) -> float:
        """Mean seconds of a bare step of so many sequences, as the engine's rate is a mean, too."""
        sequences = [self.model.new_sequence() for _ in range(texts)]
        for sequence in sequences:
            self._step([(sequence, self.pp)])
        self._step([(sequence, 1) for sequence in sequences])  # recorded
        seconds = [self._step([(sequence, 1) for sequence in sequences]) for _ in range(self.tg)]
        for sequence in sequences:
            self.model.free(sequence)
        return statistics.mean(seconds)

    def _step(self, counts) -> float:
        """Seconds of a bare step."""
        batch = [(sequence, np.array(self.ids(count), np.int32)) for sequence, count in counts]
        began = time.perf_counter()
        with self.model.turn:
            logits = self.model.step(batch)
            self.model.backend.memory.to_host(logits[:, :1])
        return time.perf_counter() - began

    def beside(self, texts: int, prompt: int) -> Beside:
        """A long prompt that comes in while texts are generated."""

        async def run():
            times, first = [[] for _ in range(texts)], []
            tasks = [asyncio.create_task(self.text(self.ids(self.pp), 1 << 20, own)) for own in times]
            while min(map(len, times)) < self.tg:
                await asyncio.sleep(0.001)
            began = time.perf_counter()
            await self.text(self.ids(prompt), 1, first)
            for task in tasks:
                task.cancel()
            return times, began, first[0]

        times, began, ended = asyncio.run(run())
        alone_began = max(own[0] for own in times)
        alone = sum(alone_began < at <= began for own in times for at in own) / (began - alone_began)
        during = [[at for at in own if began < at <= ended] for own in times]
        gap = max(b - a for own in during for a, b in zip([began, *own], [*own, ended], strict=True))
        first = []
        start = time.perf_counter()
        asyncio.run(self.text(self.ids(prompt), 1, first))
        rate = sum(map(len, during)) / (ended - began)
        return Beside(texts, prompt, alone, rate, gap, ended - began, first[0] - start)

    def prefix(self, prefix: int, new: int) -> Prefix:
        """A prompt of which the beginning was computed before."""
        shared, seconds = self.ids(prefix), []
        for _ in range(2):
            first = []
            began = time.perf_counter()
            asyncio.run(self.text(shared + self.ids(new), 1, first))
            seconds.append(first[0] - began)
        return Prefix(prefix, new, *seconds)

    def mixed(self, texts: int, count: int, repeat: int = 3) -> Step:
        """A bare step of generations with a slice of a prompt, beside the two steps that it replaces."""
        sequences = [self.model.new_sequence() for _ in range(texts)]
        for sequence in sequences:
            self._step([(sequence, self.pp)])
        generations = [(sequence, 1) for sequence in sequences]
        times = [], [], []
        for _ in range(repeat + 1):
            prompt = self.model.new_sequence()
            part = [(prompt, count)]
            for own, counts in zip(times, (generations, part, [*generations, *part]), strict=True):
                own.append(self._step(counts))
                self.model.truncate(prompt, 0)
            self.model.free(prompt)
        for sequence in sequences:
            self.model.free(sequence)
        return Step(texts, count, *(statistics.median(own[1:]) for own in times))


def numbers(_context, _option, text: str) -> tuple[int, ...]:
    """Numbers with commas between."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise click.BadParameter("write numbers with commas between, as in 1,2,4") from None


def measure(bench: Bench, parallel, long: int, prefix: int, slices):
    """Everything, printed row by row."""
    bench.check(min(4, parallel[-1]))
    found = {}

    def table(name, header, row, values):
        click.echo(f"\n{header}")
        found[name] = []
        for value in values:
            found[name].append(dataclasses.asdict(value))
            click.echo(row(value))

    table(
        "parallel",
        "texts   bare steps     engine   share   first token",
        lambda p: (
            f"{p.texts:5} {p.bare_rate:8.1f} t/s {p.engine_rate:6.1f} t/s {p.share:6.1%} {p.first_seconds:9.2f} s"
        ),
        map(bench.parallel, parallel),
    )
    table(
        "steps",
        "generating   slice   generations   slice alone      mixed   mixed - slice",
        lambda s: (
            f"{s.generating:10} {s.slice:7} {1e3 * s.generations:10.1f} ms {1e3 * s.alone:10.1f} ms "
            f"{1e3 * s.mixed:7.1f} ms {1e3 * (s.mixed - s.alone):12.1f} ms"
        ),
        (bench.mixed(texts, count) for texts in (1, 4) for count in slices),
    )
    table(
        "prefix",
        "prefix     new   first token   with the prefix kept",
        lambda p: f"{p.prefix:6} {p.new:7} {p.computed:11.2f} s {p.kept:20.2f} s",
        [bench.prefix(prefix, 32)],
    )
    table(
        "beside",
        "texts   prompt     alone   beside it   share   longest gap   prompt   prompt alone",
        lambda b: (
            f"{b.texts:5} {b.prompt:8} {b.alone_rate:5.1f} t/s {b.beside_rate:7.1f} t/s "
            f"{b.beside_rate / b.alone_rate:6.1%} {b.longest_gap:11.2f} s {b.prompt_seconds:6.1f} s "
            f"{b.prompt_seconds_alone:12.1f} s"
        ),
        (bench.beside(texts, long) for texts in (1, 4)),
    )
    return found


@click.command(epilog=EXAMPLES)
@click.option("-m", "--model", type=click.Path(path_type=Path), help="GGUF file. [default: the demo model]")
@click.option("--parallel", callback=numbers, default="1,2,4,8,16", show_default=True, metavar="N,N,…", help="Texts.")
@click.option("--pp", type=click.IntRange(min=2), default=64, show_default=True, help="Tokens of a short prompt.")
@click.option("--tg", type=click.IntRange(min=2), default=64, show_default=True, help="Tokens of a text.")
@click.option("--long", type=click.IntRange(min=1), default=4000, show_default=True, help="Tokens of a long prompt.")
@click.option("--prefix", type=click.IntRange(min=64), default=2000, show_default=True, help="Tokens of a prefix.")
@click.option("--slices", callback=numbers, default="32,64,256", show_default=True, help="Slices of mixed steps.")
@click.option("--cache-type", type=click.Choice(list(CACHE_TYPES)), default="q8_0", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="[default: all usable cores]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), default=HERE / "results" / "engine.json")
def main(model, parallel, pp, tg, long, prefix, slices, cache_type, device, threads, json_path):
    """Measure the engine beside bare steps; print tables and write a JSON file."""
    try:
        device, _ = find_device(device)
        about = facts.gather(facts.measure_limits(device, threads), device)
        click.echo(facts.describe(about))
        path = demo_path() if model is None else model
        # The long prompt, and texts that go on while it is computed.
        ctx = min(long + 2048, ModelConfig.from_gguf(ModelFile.open(path)).context_length)
        long, prefix = min(long, ctx // 2), min(prefix, ctx // 2)
        room = max(parallel[-1] * (pp + tg + 64), 5 * ctx)
        settings = {"cache_type": cache_type, "device": device, "threads": threads, "ctx": ctx, "cache_tokens": room}
        with pymla.load(path, **settings) as language_model:
            found = measure(Bench(language_model, pp, tg), parallel, long, prefix, slices)
    except PymlaError as error:
        raise click.ClickException(str(error)) from None
    what = {"model": path.name, "pp": pp, "tg": tg, "cache_type": cache_type}
    outputs.write(json_path, (json.dumps(about | what | found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
