"""``pymla perplexity``: how well a model predicts a text, how far it is from another one, what it answers."""

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from pymla.cli import interrupt, perplexity_report
from pymla.cli.device import check_tensors_option, device_options, dsa_option, override_option
from pymla.cli.inputs import read, read_bytes
from pymla.cli.output import write_json
from pymla.cli.terminal import Terminal
from pymla.engine.filecheck import examine
from pymla.engine.forms import MLA_MODES
from pymla.engine.language_model import LanguageModel
from pymla.engine.loading import demo_path, load
from pymla.engine.model import Model
from pymla.errors import PymlaError
from pymla.files import kl_base, outputs
from pymla.files.gguf_reader import ModelFile
from pymla.make import choices, kl_divergence
from pymla.make import perplexity as measuring
from pymla.make.choices import Question
from pymla.models.config import ModelConfig
from pymla.pages import CACHE_TYPES
from pymla.text.tokenizer import Tokenizer

#: Tokens of a window without --ctx, as in llama-perplexity.
CTX = 512

EXAMPLES = """\b
Examples:
  pymla perplexity -m model-q4_k_m.gguf -f wiki.test.raw
  pymla perplexity -m model-bf16.gguf -f wiki.test.raw --chunks 100 --kl-base base.kld
  pymla perplexity -m model-q4_k_m.gguf --kl base.kld
  pymla perplexity -m model.gguf --hellaswag hellaswag_val_full.txt --tasks 400
  pymla perplexity -m model.gguf --multiple-choice mmlu-validation.bin

\b
Definitions and files are those of llama-perplexity: windows of --ctx tokens, of which the
second half counts; PPL(Q) is the model's, PPL(base) that of the file given with --kl;
KLD is the Kullback-Leibler divergence from the base in nats, Δp the change of the
probability of the token that follows. llama-perplexity takes 400 tasks of HellaSwag if
--hellaswag-tasks is not given."""


class _Kind(NamedTuple):
    """A kind of files of questions: its option, its name, how it is read, and how tasks are taken."""

    option: str
    name: str
    read: Callable[[bytes, Path], list[Question]]
    take: Callable[[Sequence[Question], int | None], list[Question]]


_KINDS = {
    "hellaswag": _Kind("--hellaswag", "HellaSwag", choices.read_hellaswag, choices.shuffled),
    "winogrande": _Kind("--winogrande", "Winogrande", choices.read_winogrande, choices.sampled),
    "multiple_choice": _Kind("--multiple-choice", "Multiple choice", choices.read_multiple_choice, choices.sampled),
}


@click.command(epilog=EXAMPLES)
@click.option("-m", "--model", "path", type=click.Path(path_type=Path), help="GGUF file. [default: the demo model]")
@click.option("-f", "--file", "text_file", type=click.Path(path_type=Path), help="The text to predict.")
@click.option("--ctx", type=int, help=f"Tokens of a window. [default: {CTX}, or as --kl has it]")
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", help="The first N windows. [default: all]")
@click.option(
    "--stride", type=int, help="Tokens from window to window; as many at the end of each count. [default: no overlap]"
)
@click.option(
    "--kl-base", "base_out", type=click.Path(path_type=Path), help="Write all log-probabilities to a file, for --kl."
)
@click.option(
    "--kl", "base_in", type=click.Path(path_type=Path), help="Compare with a file of --kl-base; -f is optional."
)
@click.option("--hellaswag", type=click.Path(path_type=Path), help="Score on HellaSwag: six lines a task.")
@click.option("--winogrande", type=click.Path(path_type=Path), help="Score on Winogrande: a line of CSV a task.")
@click.option(
    "--multiple-choice", type=click.Path(path_type=Path), help="Score on ARC, MMLU …, in llama.cpp's binary form."
)
@click.option("--tasks", type=click.IntRange(min=1), metavar="N", help="So many of the file's tasks. [default: all]")
@click.option("--cache-type", type=click.Choice(list(CACHE_TYPES)), default="f16", show_default=True)
@click.option(
    "--mla", type=click.Choice(MLA_MODES), default="auto", show_default=True, help="Attention, as in pymla generate."
)
@dsa_option
@click.option("--threads", type=int, help="[default: all usable cores]")
@device_options
@check_tensors_option
@override_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def perplexity(
    path: Path | None,
    text_file: Path | None,
    ctx: int | None,
    chunks: int | None,
    stride: int | None,
    base_out: Path | None,
    base_in: Path | None,
    tasks: int | None,
    as_json: bool,
    hellaswag: Path | None,
    winogrande: Path | None,
    multiple_choice: Path | None,
    **loading: Any,
) -> int:
    """Measure how well a model predicts a text (-f), how far its predictions are from those of a base (--kl), or how
    many questions it answers.

    Results go to standard output, progress with a running estimate to standard error. An interrupt prints the result of
    what has been read.
    """
    files = {"hellaswag": hellaswag, "winogrande": winogrande, "multiple_choice": multiple_choice}
    given = {name: file for name, file in files.items() if file is not None}
    window = {"--ctx": ctx, "--chunks": chunks, "--stride": stride, "-f": text_file}
    _check_options(given, window, base_in, base_out, tasks)
    job = _Job.open(path, loading, as_json)
    if given:
        ((name, file),) = given.items()
        return _score(job, _KINDS[name], file, tasks)
    # llama.cpp's programs leave out the line end at the end of a file.
    ids = None if text_file is None else job.tokenizer.encode(read(text_file).removesuffix("\n"))
    if base_in is not None:
        return _compare(job, base_in, ctx, ids, chunks)
    if ids is None:
        raise PymlaError("give a text with -f, or a file of --kl or of questions")
    windows = measuring.cut(ids, CTX if ctx is None else ctx, job.tokenizer, chunks, stride)
    if base_out is not None:
        inputs = [*job.file.parts, *([] if text_file is None else [text_file])]
        outputs.check({"--kl-base": base_out}, inputs)
        outputs.check_space(base_out, kl_base.file_bytes(len(windows.tokens), windows.ctx, job.config.vocab_size))
    return _measure(job, windows, base_out)


def _check_options(
    questions: dict[str, Path], window: dict[str, Any], base_in: Path | None, base_out: Path | None, tasks: int | None
) -> None:
    """Refuse options that do not go together."""
    works = [_KINDS[name].option for name in questions]
    works += ["--kl"] if base_in is not None else []
    works += ["--kl-base"] if base_out is not None else []
    if len(works) > 1:
        raise PymlaError(f"{works[0]} and {works[1]} are two measurements: give one of them")
    given = [name for name, value in window.items() if value is not None]
    if questions and given:
        raise PymlaError(f"{given[0]} is for windows of a text, and {works[0]} has tasks: leave it out")
    if tasks is not None and not questions:
        raise PymlaError(f"--tasks is for {', '.join(kind.option for kind in _KINDS.values())}: leave it out")
    if works and "--stride" in given:
        raise PymlaError(f"--stride is for the perplexity alone, and {works[0]} has windows that do not overlap")


class _Job(NamedTuple):
    """What all measurements need."""

    file: ModelFile
    config: ModelConfig
    tokenizer: Tokenizer
    loading: dict[str, Any]
    terminal: Terminal
    as_json: bool

    @classmethod
    def open(cls, path: Path | None, loading: dict[str, Any], as_json: bool) -> "_Job":
        """Look at the model's file; its weights are not loaded yet."""
        path = demo_path() if path is None else path
        file = ModelFile.open(path, loading["overrides"])
        config, tokenizer = examine(file, loading["cache_type"], loading["mla"], dsa=loading["dsa"]).check()
        return cls(file, config, tokenizer, {"path": path} | loading, Terminal(), as_json)

    def load(self, ctx: int, cache_tokens: int) -> LanguageModel:
        """Load the weights."""
        with self.terminal as terminal:
            measuring.compile_kernels(terminal.compiling, terminal.warn)
            return load(ctx=ctx, cache_tokens=cache_tokens, report=self.terminal, **self.loading)

    def report(self, device: str, result: dict[str, Any], text: str, rate: str) -> None:
        """Print a result, as text or as JSON, and what it took to standard error."""
        if self.as_json:
            write_json({"model": str(self.file.path), "device": device} | perplexity_report.plain(result))
        else:
            click.echo(text)
        click.echo(rate, err=True)


class _Collected(NamedTuple):
    """Results of windows or tasks, one after the other."""

    items: list[Any]
    code: int  # the exit code: that of an interrupt where some are missing
    seconds: float


def _collect(
    terminal: Terminal,
    title: str,
    results: Callable[[measuring.Progress], Generator[Any, None, None]],
    note: Callable[[list[Any]], str],
) -> _Collected:
    """Collect results as they come, until they end or the user interrupts them.

    Parameters
    ----------
    title : what is counted as done, in words
    results : makes the results, and tells of what is done
    note : what the results so far say
    """
    items: list[Any] = []
    code, shown, began = 0, "", time.monotonic()
    try:
        with (
            interrupt.graceful(),
            contextlib.closing(results(lambda done, total: terminal.show(title, done, total, figure=shown))) as found,
        ):
            for each in found:
                items.append(each)
                shown = f", {note(items)}"
    except KeyboardInterrupt:
        code = interrupt.CODE
    finally:
        terminal.close()
    if not items:
        click.echo("interrupted before there was a result", err=True)
    return _Collected(items, code, time.monotonic() - began)


def _about_windows(windows: measuring.Windows, found: _Collected) -> dict[str, Any]:
    """What was read, for JSON."""
    done = len(found.items)
    tokens = done * windows.counted
    about = {"ctx": windows.ctx, "windows": done, "of_windows": len(windows.tokens), "tokens": tokens}
    return about | {"seconds": found.seconds, "interrupted": bool(found.code)}


def _rate(windows: measuring.Windows, found: _Collected) -> str:
    done, seconds = len(found.items), found.seconds
    rate = done * windows.ctx / seconds
    return f"{done:,} windows of {windows.ctx:,} tokens in {seconds:.1f} s, {rate:,.1f} tokens/s"


def _measure(job: _Job, windows: measuring.Windows, base_out: Path | None) -> int:
    """The perplexity of a text; with a file for all log-probabilities."""

    def note(losses: list[Any]) -> str:
        return perplexity_report.perplexity_line(measuring.perplexity(losses))

    with job.load(windows.ctx, measuring.cache_tokens(windows.ctx)) as language_model:
        model = language_model.model
        found = _collect(job.terminal, "tokens", lambda told: _losses(model, windows, base_out, told), note)
        if found.code and base_out is not None:
            job.terminal.warn(f"{base_out} is not written: it holds all windows or none")
        if found.items:
            value = measuring.perplexity(found.items)
            result = _about_windows(windows, found) | {"perplexity": value}
            result["window_losses"] = [float(each.mean()) for each in found.items]
            job.report(language_model.device, result, perplexity_report.perplexity_line(value), _rate(windows, found))
    return found.code


def _losses(
    model: Model, windows: measuring.Windows, base_out: Path | None, progress: measuring.Progress
) -> Generator[np.ndarray, None, None]:
    """Losses of windows; the file is complete with the last one."""
    if base_out is None:
        yield from measuring.window_losses(model, windows, None, progress)
        return
    with kl_base.writing(base_out, windows.tokens, model.config.vocab_size) as base:
        yield from measuring.window_losses(model, windows, base, progress)


def _compare(job: _Job, path: Path, ctx: int | None, ids: list[int] | None, chunks: int | None) -> int:
    """How far the model is from a base."""

    def note(compared: list[Any]) -> str:
        value = measuring.perplexity(each.losses for each in compared).value
        divergence = measuring.mean(np.concatenate([each.divergences for each in compared])).value
        return f"PPL {value:.4f}, KLD {divergence:.6f}"

    with kl_base.BaseFile(path) as base:
        kl_divergence.check_same(base, job.config.vocab_size, ctx, ids)
        windows = kl_divergence.windows_of(base, measuring.bos_of(job.tokenizer), chunks)
        with job.load(windows.ctx, measuring.cache_tokens(windows.ctx)) as language_model:
            model = language_model.model
            found = _collect(
                job.terminal, "tokens", lambda told: kl_divergence.compare_windows(model, windows, base, told), note
            )
            if found.items:
                statistics = kl_divergence.statistics(found.items)
                result = _about_windows(windows, found) | {"base": str(path)} | statistics._asdict()
                text = perplexity_report.statistics_text(statistics)
                job.report(language_model.device, result, text, _rate(windows, found))
    return found.code


def _score(job: _Job, kind: _Kind, path: Path, count: int | None) -> int:
    """The score on a file of questions."""
    questions = kind.take(kind.read(read_bytes(path), path), count)
    tasks = [choices.tokenised(question, job.tokenizer) for question in questions]
    longest = max(task.longest for task in tasks)

    def note(scores: list[Any]) -> str:
        return f"{choices.score(tasks, scores).share:.2%}"

    with job.load(longest, measuring.cache_tokens(longest)) as language_model:
        model = language_model.model
        found = _collect(job.terminal, "tasks", lambda told: choices.answer_scores(model, tasks, told), note)
        if found.items:
            score, chance = choices.score(tasks, found.items), choices.chance(tasks)
            result = score._asdict() | {"of_tasks": len(tasks), "share": score.share, "error": score.error}
            result |= {"interval": score.interval, "chance": chance, "seconds": found.seconds}
            result |= {"interrupted": bool(found.code), "choices": [int(each.argmax()) for each in found.items]}
            text = perplexity_report.score_line(kind.name, score, chance)
            job.report(language_model.device, result, text, f"{score.tasks:,} tasks in {found.seconds:.1f} s")
    return found.code
