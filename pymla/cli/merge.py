"""``pymla merge``: one GGUF file from several parts."""

from pathlib import Path

import click

from pymla.cli import interrupt

EXAMPLES = """\b
Examples:
  pymla merge v3-00001-of-00009.gguf v3.gguf
"""


@click.command(epilog=EXAMPLES)
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def merge(first: Path, out: Path) -> None:
    """Write the model of which FIRST is a part as one file OUT, as llama-gguf-split does.

    OUT appears when it is complete. An interrupted run goes on where it stopped.
    """
    from pymla.cli.progress import WriteProgress
    from pymla.make import split as made

    with interrupt.graceful(), WriteProgress() as shown:
        path = made.merge(first, out, note=shown.note, progress=shown)
    click.echo(f"{path}: {path.stat().st_size / 2**20:.1f} MiB", err=True)
