"""``pymla convert``: a Hugging Face checkpoint to a GGUF file."""

import logging
from pathlib import Path

import click

from pymla.cli import interrupt
from pymla.make.convert import LAYOUTS, QTYPES
from pymla.make.convert import convert as write_gguf

EXAMPLES = """\b
Examples:
  pymla convert DeepSeek-V2-Lite v2-lite-q8_0.gguf
  pymla convert DeepSeek-V3 v3.gguf --type q4_0 --layout split
"""


@click.command(epilog=EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--type",
    "qtype",
    type=click.Choice(list(QTYPES)),
    default="q8_0",
    show_default=True,
    help="Type of the matrices. Norms and router are F32; with q4_0 the output matrix is Q8_0.",
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="split",
    show_default=True,
    help="split: k_b and v_b, as llama.cpp writes now; kv_b; all: the three, as ik_llama.cpp writes.",
)
@click.option("--pre", help="Name of the pre-tokenizer. [default: found out from tokenizer.json]")
@click.option("--name", help="The model's name in the file. [default: the folder's]")
def convert(folder: Path, out: Path, qtype: str, layout: str, pre: str | None, name: str | None) -> None:
    """Convert FOLDER, a DeepSeek V2 or V3 model as Hugging Face has it, to the GGUF file OUT.

    FOLDER holds config.json, tokenizer.json and safetensors. OUT appears when it is complete.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    # The gguf package warns of things that do not matter here, such as how a pair of texts is joined.
    logging.getLogger("gguf").setLevel(logging.ERROR)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    interrupt.terminal_reset = interrupt.WITHOUT_BAR
    # Without a thread of its own, which a limit on processes may refuse.
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, auto_refresh=False)
    with interrupt.graceful(), shown as bar:
        task = bar.add_task("", visible=False)
        done = write_gguf(
            folder,
            out,
            qtype=qtype,
            layout=layout,
            pre=pre,
            name=name,
            progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True, refresh=True),
        )
    interrupt.terminal_reset = b""
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{done.path}: {done.nbytes / 2**20:.1f} MiB", err=True)
