"""``pymla bench``: prompt and generation speed as the context grows."""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from pymla.backend import Rates
from pymla.cli import interrupt
from pymla.cli.device import check_tensors_option, device_options, dsa_option, override_option
from pymla.cli.terminal import Terminal
from pymla.engine.cache_layout import row_layout
from pymla.engine.devices import find_device
from pymla.engine.filecheck import examine
from pymla.engine.forms import MLA_MODES, check_mode
from pymla.engine.loading import demo_path, load
from pymla.errors import PymlaError
from pymla.files import outputs
from pymla.files.gguf_reader import ModelFile
from pymla.files.overrides import Value
from pymla.measure import facts, sweep, table
from pymla.measure import plot as plotting
from pymla.measure.sweep import Row
from pymla.pages import CACHE_TYPES

#: Context of a sweep without --ctx, where the model has as much.
CTX = 4096

EXAMPLES = """\b
Examples:
  pymla bench
  pymla bench -m model.gguf --ctx 16384 --csv sweep.csv --plot sweep.png
  pymla bench -m model.gguf --depths 0,4096,15872 --mla 1,3,auto
  pymla bench -m model.gguf --prompt 16384
  pymla bench -m model.gguf --device cuda --ctx 32768

\b
Columns are those of llama-sweep-bench: with N_KV tokens in the cache, TG tokens are
generated and forgotten, then a prompt of PP tokens is appended. PP share: multiply-adds
as a share of the device's int8 rate; TG share: bytes read as a share of what it
streams from memory. Both limits are measured first; with layers on both CPU and GPU
there are no shares."""


@click.command(epilog=EXAMPLES)
@click.option(
    "-m",
    "--model",
    "paths",
    multiple=True,
    type=click.Path(path_type=Path),
    help="GGUF file; repeatable. [default: the demo model]",
)
@click.option(
    "--ctx",
    type=click.IntRange(min=1),
    help=f"Tokens of context, to which the sweep goes. [default: {CTX}, or the model's, or as --depths need]",
)
@click.option("--pp", type=click.IntRange(min=0), help="Tokens of a prompt. [default: 512]")
@click.option("--tg", type=click.IntRange(min=0), help="Tokens to generate. [default: 128]")
@click.option("--depths", metavar="N,N,…", help="N_KV of the points. [default: every --pp tokens, up to --ctx]")
@click.option(
    "--prompt", type=click.IntRange(min=1), help="Instead: one prompt of so many tokens, from an empty cache."
)
@click.option("--cache-type", type=click.Choice(list(CACHE_TYPES)), default="q8_0", show_default=True)
@click.option(
    "--mla", default="auto", show_default=True, metavar="MODE,…", help=f"Variants to measure: {', '.join(MLA_MODES)}."
)
@dsa_option
@click.option("--threads", type=int, help="[default: all usable cores]")
@device_options
@check_tensors_option
@override_option
@click.option(
    "--repeat", type=int, default=1, show_default=True, help="Measurements of each point; the median is shown."
)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of the random tokens.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write the table to a file as CSV.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write everything measured as JSON.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draw PP and TG against N_KV: .png or .svg.")
def bench(
    paths: tuple[Path, ...],
    mla: str,
    dsa: bool,
    cache_type: str,
    threads: int | None,
    device: str,
    gpu_layers: int | str | None,
    cpu_moe: bool,
    check_tensors: bool,
    overrides: dict[str, Value],
    csv_path: Path | None,
    json_path: Path | None,
    plot_path: Path | None,
    **options: Any,
) -> int:
    """Measure prompt and generation speed as the context grows.

    The table goes to standard output, row by row; progress goes to standard error. An interrupt or an error ends the
    measurement and writes the files with the rows so far.
    """
    modes = _modes(mla)
    checked = cache_type, check_tensors, overrides
    runs = [_Run(path, modes, dsa, *checked, options) for path in paths or (demo_path(),)]
    outs = {"--csv": csv_path, "--json": json_path, "--plot": plot_path}
    files = {option: path for option, path in outs.items() if path}
    outputs.check(files, [part for run in runs for part in run.parts], devices=True)
    if plot_path:
        plotting.check(plot_path)
    device, why_cpu = find_device(device)
    limits = facts.measure_limits(device, threads)
    if why_cpu:
        Terminal().running(f"the CPU: {why_cpu}")
    about = facts.gather(limits, device)
    click.echo(facts.describe(about))
    loading: dict[str, Any] = {"dsa": dsa, "cache_type": cache_type, "threads": threads, "device": device}
    loading |= {"gpu_layers": gpu_layers, "cpu_moe": cpu_moe, "overrides": overrides}
    rows: list[Row] = []
    code, failure = 0, None
    try:
        with contextlib.ExitStack() as rest:
            for run in runs:
                for mode in modes:
                    for row in run.rows(limits, mla=mode, **loading):
                        if not rows:
                            # There is something to write from now on, also while the next model is loaded.
                            rest.enter_context(interrupt.graceful())
                        rows.append(row)
    except KeyboardInterrupt:
        code = interrupt.CODE
    except PymlaError as error:
        # Rows before this one may have taken hours.
        failure = error
    if rows:
        _write(files, rows, limits, about)
    if failure:
        raise failure
    return code


def _write(files: dict[str, Path], rows: list[Row], limits: Rates, about: dict[str, Any]) -> None:
    """Write all files that can be written, and then raise PymlaError for the others."""
    failures = []
    for option, path in files.items():
        try:
            if option == "--csv":
                stream = io.StringIO(newline="")
                table.write_csv(stream, rows, limits)
                # A model's file may have a name that is not Unicode.
                outputs.write(path, stream.getvalue().encode(errors="backslashreplace"))
            elif option == "--json":
                report = json.dumps(table.report(rows, limits, about), indent=1) + "\n"
                outputs.write(path, report.encode())
            else:
                plotting.sweep(_series(rows), path, _title(rows, about))
        except PymlaError as error:
            failures.append(str(error))
    if failures:
        raise PymlaError("; ".join(failures))


class _Run:
    """A file, and the points of the sweep that are measured on it."""

    def __init__(
        self,
        path: Path,
        modes: list[str],
        dsa: bool,
        cache_type: str,
        check_tensors: bool,
        overrides: dict[str, Value],
        options: dict[str, Any],
    ):
        self._path = path
        file = ModelFile.open(path, overrides)
        self.parts = file.parts
        with Terminal() as terminal:
            # Before the limits are measured, which compiles kernels and takes seconds.
            found = examine(file, cache_type, dsa=dsa, check_tensors=check_tensors, progress=terminal.checking)
        config, _ = found.check()
        for mode in modes:
            check_mode(config, mode)
            row_layout(config, cache_type, mode)
        self._limit = config.context_length
        self._ctx, self._settings = self._plan(**options)

    def _plan(
        self,
        ctx: int | None,
        pp: int | None,
        tg: int | None,
        depths: str | None,
        prompt: int | None,
        repeat: int,
        seed: int,
    ) -> tuple[int, sweep.Settings]:
        """Tokens of context, and the points."""
        if prompt is not None and (pp, tg, depths) != (None, None, None):
            raise PymlaError("--prompt measures one prompt from an empty cache: leave out --pp, --tg and --depths")
        pp, tg = (512 if pp is None else pp), (128 if tg is None else tg)
        points: tuple[int, ...]
        if prompt is not None:
            pp, tg, points = prompt, 0, (0,)
        elif depths is not None:
            points = _numbers(depths)
        else:
            ctx = ctx or min(CTX, self._limit)
            points = sweep.sweep_depths(ctx, pp, tg)
            if not points:
                raise PymlaError(f"--ctx {ctx} does not hold --pp {pp} or --tg {tg} tokens; raise it or lower those")
        settings = sweep.Settings(pp, tg, points, repeat, seed)
        needed = ctx or settings.tokens
        if settings.tokens > min(needed, self._limit):
            room = f"--ctx {ctx} is less; raise it or" if needed < self._limit else f"the model has {self._limit};"
            raise PymlaError(
                f"{self._path}: the last point needs {settings.tokens} tokens of context, and {room} "
                "lower --depths, --pp or --tg" + ("" if needed < self._limit else ", or --ctx")
            )
        return needed, settings

    def rows(self, limits: Rates, **options: Any) -> Iterator[Row]:
        """Load the model, measure, print."""
        terminal = _Terminal()
        with terminal, load(self._path, ctx=self._ctx, report=terminal, **options) as language_model:
            terminal.close()
            name = f"{self._path.name}, mla {options['mla']}, {options['cache_type']} cache"
            if language_model.config.indexer:
                name += ", sparse attention"
            if language_model.device != "cpu":
                name += f", {language_model.device}"
            click.echo(f"\n{name}\n\n{table.header()}")
            terminal.begin("")
            with interrupt.graceful():
                for row in sweep.sweep(language_model, self._settings, terminal.measuring):
                    # A bar and the table would otherwise write on the same line of the terminal.
                    terminal.close()
                    click.echo(table.line(row, limits))
                    yield row


class _Terminal(Terminal):
    """Progress on standard error, with the tokens of a sweep."""

    def measuring(self, done: int, total: int) -> None:
        """Tokens that have been through the model."""
        self.show("measuring, tokens", done, total)


def _modes(text: str) -> list[str]:
    modes = [part.strip() for part in text.split(",")]
    for mode in modes:
        if mode not in MLA_MODES:
            raise PymlaError(f"--mla {text!r}: {mode!r} is not one of {', '.join(MLA_MODES)}")
    return list(dict.fromkeys(modes))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PymlaError(f"--depths {text!r}: write numbers with commas between, as in 0,4096,15872") from None


def _series(rows: list[Row]) -> list[plotting.Series]:
    """A line for each file and variant."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.mla), []).append(row)
    models = {model for model, _ in groups}
    return [
        plotting.Series(
            f"mla {mla}" if len(models) == 1 else f"{model}, mla {mla}",
            [row.n_kv for row in group],
            [row.s_pp for row in group],
            [row.s_tg for row in group],
            [_range(row.pp, row.pp_seconds) for row in group],
            [_range(row.tg, row.tg_seconds) for row in group],
        )
        for (model, mla), group in groups.items()
    ]


def _range(tokens: int, seconds: Sequence[float]) -> tuple[float, float]:
    return (tokens / max(seconds), tokens / min(seconds)) if tokens else (0, 0)


def _title(rows: list[Row], about: dict[str, Any]) -> str:
    models = ", ".join(dict.fromkeys(row.model for row in rows))
    row = rows[0]
    settings = f"PP {row.pp}, TG {row.tg}, {row.cache_type} cache, {row.device}"
    return f"{models}: {settings}\n{facts.describe_machine(about)}, pymla {about['pymla']}, {about['date'][:10]}"
