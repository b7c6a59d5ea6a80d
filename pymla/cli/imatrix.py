"""``pymla imatrix``: importance matrices, collected, merged, converted and described."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

from pymla.cli import interrupt
from pymla.cli.device import device_options
from pymla.cli.inputs import read
from pymla.cli.terminal import Terminal
from pymla.engine.language_model import LanguageModel
from pymla.engine.loading import demo_path, load
from pymla.errors import PymlaError
from pymla.files import outputs
from pymla.files.gguf_reader import ModelFile
from pymla.files.imatrix_entries import LONGEST_CHUNK
from pymla.make.imatrix import CTX, Collector, Perplexity, chunks_of, collect
from pymla.make.imatrix_statistics import layer_statistics, tensor_statistics
from pymla.make.importance import FORMATS, Importance
from pymla.make.perplexity import bos_of, compile_kernels
from pymla.printable import printable

#: Experts that a note names.
_NAMED = 20

EXAMPLES = """\b
Examples:
  pymla imatrix -m model-f16.gguf -f calibration.txt -o imatrix.gguf
  pymla imatrix -m model-f16.gguf -f calibration.txt --from-chunk 40 --in-file imatrix.gguf -o imatrix.gguf
  pymla imatrix --in-file one.gguf --in-file two.dat -o both.gguf
  pymla imatrix --in-file imatrix.gguf --show-statistics

The text is read in chunks of --ctx tokens, as llama-imatrix reads it, and the file has its
format: llama-quantize takes it, too. Ctrl-C writes what was collected; the second of the
examples goes on from there."""


@click.command(epilog=EXAMPLES)
@click.option("-m", "--model", "path", type=click.Path(path_type=Path), help="GGUF file. [default: the demo model]")
@click.option("-f", "--file", "text_path", type=click.Path(path_type=Path), help="Text that the model reads.")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="File to write.")
@click.option("--chunks", type=click.IntRange(min=1), help="Chunks to read at most. [default: all]")
@click.option("--ctx", type=click.IntRange(2, LONGEST_CHUNK), help=f"Tokens of a chunk. [default: {CTX}]")
@click.option("--from-chunk", type=click.IntRange(min=0), default=0, help="Chunks to leave out at the beginning.")
@click.option(
    "--in-file",
    "in_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Importance matrix to add, GGUF or .dat; repeatable. Without -f nothing is read, and these are merged.",
)
@click.option(
    "--save-every",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Write the file after so many chunks; 0: only at the end.",
)
@click.option(
    "--output-format", type=click.Choice(FORMATS), help="[default: dat for a name that ends in .dat, or else gguf]"
)
@click.option(
    "--merge-heads",
    is_flag=True,
    help="One entry for all heads of attn_k_b and attn_v_b, for ik_llama.cpp and files where they have two dimensions.",
)
@click.option("--process-output", is_flag=True, help="Collect for the output matrix, too.")
@click.option("--parse-special", is_flag=True, help="Read names of control tokens in the text as these tokens.")
@click.option("--no-ppl", is_flag=True, help="Do not estimate the perplexity meanwhile.")
@click.option("--show-statistics", is_flag=True, help="Instead: describe the importance matrix of --in-file.")
@click.option("--threads", type=int, help="[default: all usable cores]")
@device_options
def imatrix(
    path: Path | None,
    text_path: Path | None,
    out: Path | None,
    ctx: int | None,
    in_files: tuple[Path, ...],
    output_format: Literal["gguf", "dat"] | None,
    merge_heads: bool,
    show_statistics: bool,
    **rest: Any,
) -> int:
    """Collect an importance matrix: how large what each column of a model's matrices multiplies is on a text.

    A quantiser weighs errors with it. The perplexity on the text goes to standard output, everything else to standard
    error.
    """
    if show_statistics:
        _show_statistics(in_files, others=bool(path or text_path or out))
        return 0
    if out is None:
        raise PymlaError("give the file to write with -o")
    form: Literal["gguf", "dat"] = output_format or ("dat" if out.suffix == ".dat" else "gguf")
    before = [Importance.read(each) for each in in_files]
    if text_path is not None:
        return _collect(path or demo_path(), text_path, _Output(out, form, before, ctx or CTX, merge_heads), **rest)
    if path is not None:
        raise PymlaError(f"give the text that {path} shall read with -f")
    if not before:
        raise PymlaError("give a text to read with -f, or files to merge with --in-file")
    outputs.check({"-o": out})
    output = _Output(out, form, before, ctx or 0, merge_heads)
    output.describe(output.write())
    return 0


class _Output(NamedTuple):
    """The file to write."""

    path: Path
    form: Literal["gguf", "dat"]
    before: Sequence[Importance]  # of the files that are added
    ctx: int  # tokens of a chunk; 0: as the files say
    merge_heads: bool

    def write(self, collected: Importance | None = None) -> Importance:
        """Write the sum of the files and of what was collected."""
        total = Importance.merged([*self.before, *([] if collected is None else [collected])], self.ctx)
        if self.merge_heads:
            total = total.with_merged_heads()
        total.write(self.path, self.form)
        return total

    def describe(self, total: Importance) -> None:
        """Say what was written, and name the experts that no token went to."""
        chunks = f"{total.chunks} chunk{'s' * (total.chunks != 1)} of {total.chunk_size} tokens"
        click.echo(f"{self.path}: {len(total.entries)} tensors, {chunks}", err=True)
        for layer, experts in total.never_chosen().items():
            named = ", ".join(map(str, experts[:_NAMED]))
            more = f" and {len(experts) - _NAMED} more" if len(experts) > _NAMED else ""
            were = "experts {} were" if len(experts) > 1 else "expert {} was"
            note = f"{were.format(named + more)} never chosen; inputs of the others stand for theirs"
            click.echo(f"note: {printable(layer)}: {note}", err=True)


def _collect(
    path: Path,
    text_path: Path,
    output: _Output,
    *,
    chunks: int | None,
    from_chunk: int,
    save_every: int,
    process_output: bool,
    parse_special: bool,
    no_ppl: bool,
    **options: Any,
) -> int:
    """Read the text, and write the file meanwhile and at the end. Returns the exit code."""
    text = read(text_path)
    outputs.check({"-o": output.path}, [text_path, *ModelFile.open(path).parts])
    terminal = _Terminal()
    with terminal, load(path, ctx=output.ctx, cache_type="f32", mla="1", report=terminal, **options) as language_model:
        cut = chunks_of(*_tokens(language_model, text, parse_special), output.ctx, from_chunk, chunks)
        collector = Collector(language_model.model, language_model.file, output.ctx, process_output=process_output)
        Importance.merged([*output.before, collector.importance()], output.ctx)  # refuses files of another model
        perplexity = None if no_ppl else Perplexity()
        if perplexity is not None:
            compile_kernels(terminal.compiling, terminal.warn)

        def save() -> Importance:
            return output.write(collector.importance([_name(text_path)], output.ctx))

        def progress(done: int, total: int) -> None:
            terminal.collecting(done, total, perplexity)
            if save_every and done % save_every == 0 and done < total:
                save()

        code, total = _run(lambda: collect(collector, cut, perplexity, progress), save, collector)
        terminal.close()
        if total is not None:
            output.describe(total)
        if perplexity is not None and collector.chunks:
            estimate = perplexity.estimate
            click.echo(f"perplexity {estimate.value:.4f} ± {estimate.error:.4f}")
        if code:
            after = from_chunk + collector.chunks
            click.echo(
                f"note: {collector.chunks} of {len(cut)} chunks were read; --from-chunk {after} goes on", err=True
            )
    return code


def _run(
    work: Callable[[], None], save: Callable[[], Importance], collector: Collector
) -> tuple[int, Importance | None]:
    """Collect and save; an interrupt or an error saves the chunks so far. Returns the exit code and what was saved."""
    with interrupt.graceful():
        try:
            work()
            return 0, save()
        except KeyboardInterrupt:
            return interrupt.CODE, save() if collector.chunks else None
        except PymlaError:
            # The chunks before this one may have taken hours.
            if collector.chunks:
                save()
            raise


def _tokens(language_model: LanguageModel, text: str, parse_special: bool) -> tuple[list[int], int | None]:
    """Token ids of a text, and BOS where the model expects it."""
    return language_model.tokenize(text, parse_special=parse_special), bos_of(language_model.tokenizer)


def _name(path: Path) -> str:
    """The name of a file, which may hold bytes that are not Unicode."""
    return str(path).encode(errors="replace").decode()


class _Terminal(Terminal):
    """Progress on standard error, with a running estimate of the perplexity."""

    def collecting(self, done: int, total: int, perplexity: Perplexity | None) -> None:
        """Chunks that were read."""
        figure = "" if perplexity is None else f", perplexity {perplexity.estimate.value:.4f}"
        self.show("reading the text, chunks", done, total, figure=figure)


def _show_statistics(in_files: Sequence[Path], others: bool) -> None:
    if len(in_files) != 1 or others:
        raise PymlaError("--show-statistics describes one file: give it with --in-file, and no model, text or output")
    tensors = tensor_statistics(Importance.read(in_files[0]))
    columns = "Σ(Act²)", "Min", "Max", "μ", "σ", "% Active", "N", "Entropy", "E (norm)", "ZD", "CosSim"
    click.echo(f"{'Layer':>5} {'Tensor':<20}" + "".join(f"{column:>12}" for column in columns))
    for each in tensors:
        layer = "-" if each.layer is None else str(each.layer)
        click.echo(
            f"{layer:>5} {printable(each.tensor):<20}{each.total:12.2f}{each.minimum:12.4f}{each.maximum:12.4f}"
            f"{each.mean:12.2f}{each.deviation:12.2f}{each.active:12.2%}{each.columns:12}{each.entropy:12.4f}"
            f"{each.relative_entropy:12.2%}{each.outliers:12.2%}{each.cosine:12.4f}"
        )
    click.echo("\nMeans of each layer, weighted with the columns of its tensors\n")
    click.echo(f"{'Layer':>5}" + "".join(f"{column:>15}" for column in ("μΣ(Act²)", "μZD", "μCosSim")))
    for layer_mean in layer_statistics(tensors):
        click.echo(f"{layer_mean.layer:>5}{layer_mean.total:15.2f}{layer_mean.outliers:15.4%}{layer_mean.cosine:15.4f}")
