"""``pymla split``: a GGUF file in several parts."""

from pathlib import Path

import click

from pymla.cli import interrupt
from pymla.cli.sizes import SIZE

EXAMPLES = """\b
Examples:
  pymla split v3.gguf v3 --max-size 40G
  pymla split v3.gguf parts/v3 --max-tensors 128
"""


@click.command(epilog=EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("prefix", type=click.Path(path_type=Path))
@click.option("--max-size", type=SIZE, help="Tensors of a part, at most: 40G is 40·10⁹ bytes, 40GiB 40·2³⁰.")
@click.option("--max-tensors", type=int, help="Tensors of a part, at most. One of the two limits is needed.")
def split(file: Path, prefix: Path, max_size: int | None, max_tensors: int | None) -> None:
    """Write FILE as parts PREFIX-00001-of-0000N.gguf, as llama-gguf-split does.

    The parts appear when all are complete. An interrupted run goes on where it stopped.
    """
    from pymla.cli.progress import WriteProgress
    from pymla.make import split as made

    with interrupt.graceful(), WriteProgress() as shown:
        paths = made.split(file, prefix, max_size=max_size, max_tensors=max_tensors, note=shown.note, progress=shown)
    for path in paths:
        click.echo(f"{path}: {path.stat().st_size / 2**20:.1f} MiB", err=True)
