"""Size against quality of quantised files: a table and a picture of their divergence from the model before it was
quantised.

Two series of files are told apart: those made here, and those of another program. The base's log-probabilities go to a
file (``pymla perplexity --kl-base``), which may be kept for further files.
"""

import contextlib
import json
import math
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click

import pymla
from pymla.cli.inputs import read
from pymla.cli.perplexity_report import plain
from pymla.errors import PymlaError
from pymla.files import kl_base, outputs
from pymla.files.gguf_reader import ModelFile
from pymla.make import kl_divergence, perplexity
from pymla.measure import plot
from pymla.pages import CACHE_TYPES

EXAMPLES = """\b
Example:
  python tools/pareto.py bf16.gguf wiki.txt --here mine-q4.gguf --here mine-q3.gguf \\
      --other llama-q4.gguf --other-name llama-quantize --plot pareto.png
"""


class Point(NamedTuple):
    """A file, and how far it is from the base."""

    name: str
    series: str
    nbytes: int
    bits: float  # of a weight
    divergence: perplexity.Mean  # nats
    log_ratio: perplexity.Mean  # ln(PPL(Q) / PPL(base))
    same_top: perplexity.Mean


@contextlib.contextmanager
def base_of(model: Path, text: Path, kept: Path | None, ctx: int, chunks: int | None, options: dict) -> Iterator[Path]:
    """The file of a base's log-probabilities: the one that is kept, if it is there already, or a new one."""
    if kept is not None and kept.exists():
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder, pymla.load(model, **loading(ctx, options)) as loaded:
        path = kept or Path(folder, "base.kld")
        windows = perplexity.cut(tokens_of(loaded, text), ctx, loaded.tokenizer, chunks)
        with kl_base.writing(path, windows.tokens, loaded.config.vocab_size) as writer:
            for _ in perplexity.window_losses(loaded.model, windows, writer):
                pass
        yield path


def tokens_of(loaded, text: Path) -> list[int]:
    """The tokens of a text file, as ``pymla perplexity`` reads it."""
    return loaded.tokenize(read(text).removesuffix("\n"))


def loading(ctx: int, options: dict) -> dict:
    """Arguments of `pymla.load`."""
    return {"ctx": ctx, "cache_tokens": perplexity.cache_tokens(ctx), **options}


def measure(path: Path, series: str, base: kl_base.BaseFile, text: Path, options: dict) -> Point:
    """Compare a file with a base."""
    file = ModelFile.open(path)
    weights = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    with pymla.load(path, **loading(base.ctx, options)) as loaded:
        kl_divergence.check_same(base, loaded.config.vocab_size, None, tokens_of(loaded, text))
        windows = kl_divergence.windows_of(base, perplexity.bos_of(loaded.tokenizer))
        found = kl_divergence.statistics(list(kl_divergence.compare_windows(loaded.model, windows, base)))
    bits = 8 * file.nbytes / weights
    return Point(path.stem, series, file.nbytes, bits, found.divergence.mean, found.log_ratio, found.same_top)


def table(points: Sequence[Point]) -> str:
    """The points as a table in Markdown, the smallest file first."""
    lines = [
        "| file | by | MiB | bits a weight | mean KLD, nats | ln(PPL(Q)/PPL(base)) | same likeliest token |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in sorted(points, key=lambda point: point.nbytes):
        lines.append(
            f"| {each.name} | {each.series} | {each.nbytes / 2**20:,.1f} | {each.bits:.2f} | "
            f"{each.divergence.value:.5f} ± {each.divergence.error:.5f} | "
            f"{each.log_ratio.value:+.5f} ± {each.log_ratio.error:.5f} | "
            f"{each.same_top.value:.2%} ± {each.same_top.error:.2%} |"
        )
    return "\n".join(lines)


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """Divergence against size, a line for each series, with bars of two standard errors.

    Raises
    ------
    PymlaError
        matplotlib is missing, or the file cannot be written.
    """
    with plot.picture(path, title, (8, 5.5)) as figure:
        axes = figure.subplots()
        for i, series in enumerate(dict.fromkeys(point.series for point in points)):
            own = sorted((point for point in points if point.series == series), key=lambda point: point.nbytes)
            sizes, values = [each.nbytes / 2**20 for each in own], [each.divergence.value for each in own]
            bars = [2 * each.divergence.error for each in own]
            axes.errorbar(sizes, values, bars, color=f"C{i}", marker="os"[i % 2], markersize=5, capsize=3, label=series)
            for each, size, value in zip(own, sizes, values, strict=True):
                offset = (5, 5) if i == 0 else (5, -11)
                axes.annotate(
                    each.name, (size, value), xytext=offset, textcoords="offset points", fontsize=7, color=f"C{i}"
                )
        axes.set_yscale("log")
        axes.set_xlabel("size, MiB")
        axes.set_ylabel("mean divergence from the base, nats")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()


def files_option(*names: str, help_: str):
    kind = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.option(*names, multiple=True, type=kind, help=f"{help_}; repeatable.")


@click.command(epilog=EXAMPLES)
@click.argument("base", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@files_option("--here", help_="A file that was made here")
@files_option("--other", help_="A file that another program made")
@click.option("--other-name", default="llama-quantize", show_default=True, help="That program.")
@click.option(
    "--kl-base", "kept", type=click.Path(path_type=Path), help="Keep the base's log-probabilities, or take them."
)
@click.option("--ctx", type=click.IntRange(min=3), default=512, show_default=True, help="Tokens of a window.")
@click.option("--chunks", type=click.IntRange(min=1), help="The first so many windows. [default: all]")
@click.option("--cache-type", type=click.Choice(list(CACHE_TYPES)), default="f16", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draw it: .png or .svg.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the points as JSON.")
def main(base, text, here, other, other_name, kept, ctx, chunks, plot_path, json_path, **options):
    """Compare files with BASE, the GGUF file that they were made from, on the file TEXT."""
    points = []
    try:
        if plot_path:
            plot.check(plot_path)
        outs = {"--plot": plot_path, "--json": json_path}
        outputs.check({name: path for name, path in outs.items() if path}, [base, text, *here, *other])
        with base_of(base, text, kept, ctx, chunks, options) as path, kl_base.BaseFile(path) as found:
            for series, files in (("pymla", here), (other_name, other)):
                for file in files:
                    points.append(measure(file, series, found, text, options))
                    click.echo(f"{file.name}: {points[-1].divergence.value:.5f}", err=True)
            windows = f"{len(found.tokens)} windows of {found.ctx} tokens"
        about = (
            f"{base.name}, {windows} of {text.name}, {options['cache_type']} cache, Python {platform.python_version()}"
        )
        if plot_path:
            draw(points, plot_path, about)
        if json_path:
            report = {"about": about, "points": [plain(point) for point in points]}
            outputs.write(json_path, (json.dumps(report, indent=1) + "\n").encode())
    except PymlaError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    click.echo(f"{table(points)}\n\n{about}")


if __name__ == "__main__":
    main()
