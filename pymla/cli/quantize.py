"""``pymla quantize``: a GGUF file in other types."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pymla.cli import interrupt
from pymla.cli.options import as_options
from pymla.cli.output import write_json
from pymla.cli.sizes import SIZE
from pymla.cli.terminal import Terminal
from pymla.cli.type_options import imatrix_option, recipe_option, tensor_type_option
from pymla.errors import PymlaError
from pymla.files import outputs
from pymla.files.gguf_reader import ModelFile
from pymla.host.memory import size_text
from pymla.printable import one_line

if TYPE_CHECKING:
    from pymla.make.importance import Importance
    from pymla.make.quantize_plan import Plan

EXAMPLES = """\b
Examples:
  pymla quantize v2-lite-bf16.gguf v2-lite-q4_k_m.gguf Q4_K_M
  pymla quantize v3-bf16.gguf v3-iq2_xxs.gguf IQ2_XXS --imatrix v3.imatrix.gguf
  pymla quantize v3-bf16.gguf v3.gguf Q4_K_M --tensor-type 'ffn_(gate|up)_exps=Q3_K' --dry-run
  pymla quantize v3-bf16.gguf v3-240.gguf --target-size 240GiB --imatrix v3.imatrix.gguf --recipe-out v3.txt

TYPE is Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_K_S, IQ4_XS, Q4_0, Q3_K_M, IQ3_XXS, Q2_K, IQ2_XXS, IQ1_S, F16, COPY or another
one of docs/making-files.md, in any case.
"""


@click.command(epilog=EXAMPLES)
@click.argument("model", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("qtype", metavar="[TYPE]", required=False)
@imatrix_option
@tensor_type_option
@recipe_option
@click.option("--output-type", "--output-tensor-type", "output_type", metavar="TYPE", help="Type of the output matrix.")
@click.option("--token-embedding-type", metavar="TYPE", help="Type of the embeddings.")
@click.option("--pure", is_flag=True, help="One type for all matrices, without the choices of a mix.")
@click.option("--exact-mix", is_flag=True, help="llama.cpp's choices only, also in mixes of fewer than four bits.")
@click.option("--leave-output-tensor", "leave_output", is_flag=True, help="Leave the output matrix as it is.")
@click.option("--keep-split", is_flag=True, help="Write as many files as IN has, with the same tensors in each.")
@click.option("--allow-requantize", is_flag=True, help="Quantise quantised tensors again, which loses more.")
@click.option("--include-weights", metavar="NAME", multiple=True, help="Use --imatrix for tensors of such names only.")
@click.option(
    "--exclude-weights", metavar="NAME", multiple=True, help="Do not use --imatrix for tensors of such names."
)
@click.option("--target-size", type=SIZE, help="Find the best types for a file of this size, such as 120GiB.")
@click.option("--recipe-out", type=click.Path(path_type=Path), help="Write the types that --target-size found.")
@click.option("--threads", type=click.IntRange(min=1), help="[default: all usable cores]")
@click.option("--dry-run", is_flag=True, help="Print what each tensor becomes and why, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print that as JSON.")
def quantize(
    model: Path,
    out: Path,
    qtype: str | None,
    imatrix: Path | None,
    include_weights: tuple[str, ...],
    exclude_weights: tuple[str, ...],
    keep_split: bool,
    allow_requantize: bool,
    target_size: int | None,
    recipe_out: Path | None,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    **recipe_options: Any,
) -> None:
    """Write IN, a GGUF file in F32, F16 or BF16, as OUT with the types of TYPE.

    Any part of a split file stands for all of them. OUT appears when it is complete; an interrupted run goes on where
    it stopped.
    """
    _check(qtype, target_size, recipe_out, dry_run, as_json)
    if threads is not None:
        from pymla.cpu.runtime.threads import set_threads

        set_threads(threads)
    from pymla.cli import quantize_page
    from pymla.make.quantize import compile_kernels
    from pymla.make.quantize_plan import make_plan
    from pymla.make.recipe import recipe_for

    file = ModelFile.open(model)
    _check_places(file, {"OUT": None if dry_run or keep_split else out, "--recipe-out": recipe_out})
    importance = _importance(imatrix, include_weights, exclude_weights)
    # A target size needs no mix: all types that the user does not give are found.
    recipe = recipe_for(qtype or "Q8_0", importance=importance is not None, **recipe_options)
    with interrupt.graceful(), Terminal() as terminal:
        plan = make_plan(
            file,
            recipe,
            importance,
            size=target_size,
            allow_requantize=allow_requantize,
            prepare=lambda types: compile_kernels(types, terminal.compiling, terminal.warn),
            progress=lambda done, total: terminal.show("measuring the errors of types, tensors", done, total),
        )
    plan = plan._replace(refusals=tuple(as_options(each, quantize) for each in plan.refusals))
    if recipe_out is not None:
        _write_recipe(plan, recipe_out)
    if as_json:
        write_json(quantize_page.report(plan), indent=2)
    elif dry_run:
        quantize_page.show(plan)
    for note in plan.notes:
        click.echo(f"note: {one_line(as_options(note, quantize))}", err=True)
    if not dry_run:
        with interrupt.graceful(), Terminal() as terminal:
            changed = {row.qtype for row in plan.rows if row.qtype != row.source}
            compile_kernels([] if plan.refusals else changed, terminal.compiling, terminal.warn)
        _write(plan, out, keep_split, [] if imatrix is None else [imatrix])


def _check(qtype: str | None, target_size: int | None, recipe_out: Path | None, dry_run: bool, as_json: bool) -> None:
    """Raise PymlaError for options that do not go together."""
    if (qtype is None) is (target_size is None):
        raise PymlaError("give TYPE or --target-size, one of the two")
    if recipe_out is not None and target_size is None:
        raise PymlaError("--recipe-out writes what --target-size finds; give both")
    if as_json and not dry_run:
        raise PymlaError("--json prints a plan; give --dry-run, too")


def _check_places(file: ModelFile, paths: dict[str, Path | None]) -> None:
    """Raise PymlaError, before any work, for a file that could not be written."""
    outputs.check({name: path for name, path in paths.items() if path is not None}, file.parts)


def _importance(path: Path | None, include: tuple[str, ...], exclude: tuple[str, ...]) -> "Importance | None":
    if include and exclude:
        raise PymlaError("give --include-weights or --exclude-weights, not both")
    if path is None:
        if include or exclude:
            raise PymlaError("--include-weights and --exclude-weights choose from an importance matrix; give --imatrix")
        return None
    from pymla.make.importance import Importance
    from pymla.make.quantize import selected

    return selected(Importance.read(path), include, exclude)


def _write_recipe(plan: "Plan", path: Path) -> None:
    from pymla.cli.quantize_page import summary
    from pymla.make.target_size import recipe_text

    assert plan.found is not None  # a size was given
    outputs.write(path, recipe_text(plan.found.choices, one_line(f"{plan.file.path.name}: {summary(plan)}")).encode())


def _write(plan: "Plan", out: Path, keep_split: bool, inputs: list[Path]) -> None:
    from pymla.cli.progress import WriteProgress
    from pymla.cli.quantize_page import summary
    from pymla.make.quantize import write

    with interrupt.graceful(), WriteProgress() as shown:
        paths = write(plan, out, keep_split=keep_split, inputs=inputs, note=shown.note, progress=shown)
    for path in paths:
        click.echo(f"{path}: {size_text(path.stat().st_size)}", err=True)
    click.echo(summary(plan), err=True)
