"""``pymla convert``: a Hugging Face checkpoint to a GGUF file."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pymla.cli import interrupt
from pymla.cli.options import as_options
from pymla.cli.sizes import SIZE
from pymla.cli.type_options import imatrix_option, recipe_option, tensor_type_option
from pymla.printable import one_line

if TYPE_CHECKING:
    from pymla.make.convert import Prepared

EXAMPLES = """\b
Examples:
  pymla convert DeepSeek-V2-Lite v2-lite-bf16.gguf
  pymla convert DeepSeek-V3 v3.gguf --type Q8_0 --split-max-size 40G
  pymla convert DeepSeek-V3 v3.gguf --type Q4_K_M --imatrix v3.imatrix.gguf --tensor-type 'ffn_down_exps=Q5_K' --dry-run
"""


@click.command(epilog=EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--type",
    "--outtype",
    "qtype",
    metavar="TYPE",
    default="auto",
    show_default=True,
    help="Type of the matrices, or mix of types, such as BF16, Q8_0 or Q4_K_M, as for pymla quantize. auto: BF16 or "
    "F16, as the checkpoint has it; BF16 for float8. Vectors and routers are F32.",
)
@tensor_type_option
@recipe_option
@imatrix_option
@click.option(
    "--layout",
    type=click.Choice(("split", "kv_b", "all")),
    default="split",
    show_default=True,
    help="split: k_b and v_b, as llama.cpp writes now; kv_b; all: the three, as ik_llama.cpp writes.",
)
@click.option(
    "--mtp/--no-mtp",
    default=None,
    help="Keep layers that predict further tokens, or leave them out. [default: those of V3.2 and GLM are kept]",
)
@click.option("--split-max-size", "split", type=SIZE, help="Write parts of at most this size: 40G is 40·10⁹ bytes.")
@click.option("--pre", help="Name of the pre-tokenizer. [default: found out from tokenizer.json]")
@click.option("--name", help="The model's name in the file. [default: the folder's]")
@click.option("--dry-run", is_flag=True, help="Print what each tensor becomes and why, and write nothing.")
def convert(folder: Path, out: Path, split: int | None, dry_run: bool, **options: Any) -> None:
    """Convert FOLDER, a model as Hugging Face has it, to the GGUF file OUT.

    FOLDER holds config.json, a tokenizer, and safetensors in BF16, F16, F32, float8 or a type of 4 bits. OUT appears
    when it is complete. A run that was interrupted goes on where it stopped if it is called again.
    """
    from pymla.cli.progress import WriteProgress
    from pymla.cli.terminal import Terminal
    from pymla.make.convert import prepare
    from pymla.make.quantize import compile_kernels

    # The gguf package warns of things that do not matter here, such as how a pair of texts is joined.
    logging.getLogger("gguf").setLevel(logging.ERROR)
    prepared = prepare(folder, **options)
    if dry_run:
        _show(prepared)
    for note in prepared.notes:
        click.echo(f"note: {one_line(as_options(note, convert))}", err=True)
    if dry_run:
        return
    with interrupt.graceful(), Terminal() as terminal:
        made = {choice.qtype for name, choice in prepared.choices.items() if name not in prepared.copies}
        compile_kernels(made, terminal.compiling, terminal.warn)
    with interrupt.graceful(), WriteProgress() as shown:
        done = prepared.write(out, split=split, note=shown.note, progress=shown)
    parts = f" and {len(done.parts) - 1} more" if len(done.parts) > 1 else ""
    click.echo(f"{done.path}{parts}: {done.nbytes / 2**20:.1f} MiB", err=True)


def _show(prepared: "Prepared") -> None:
    """Print what each tensor becomes."""
    import math

    from pymla import ggml
    from pymla.cli.page import Page
    from pymla.host.memory import size_text

    rows, nbytes, weights = [], 0, 0
    for source in prepared.sources:
        choice = prepared.choices[source.name]
        size = ggml.tensor_bytes(choice.qtype, source.shape)
        nbytes, weights = nbytes + size, weights + math.prod(source.shape)
        shape, qtype = " × ".join(map(str, source.shape)), ggml.NAME[choice.qtype]
        copied = "; copied" if source.name in prepared.copies else ""
        rows.append((one_line(source.name, 60), shape, qtype, size_text(size), choice.reason + copied))
    page = Page()
    page.table("Tensors", "name", "shape", "type", "size", "reason", rows=rows, numbers=(3,))
    totals = [("weights", f"{weights:,}"), ("tensors", size_text(nbytes))]
    page.table("File", rows=[*totals, ("bits per weight", f"{8 * nbytes / weights:.3f}")], numbers=(1,))
