"""``pymla inspect``: what a model file holds, and what it takes to run it."""

from pathlib import Path

import click

from pymla.cli.device import check_tensors_option, override_option
from pymla.cli.inspect_page import show
from pymla.cli.inspect_report import report
from pymla.cli.output import write_json
from pymla.cli.terminal import Terminal
from pymla.files.gguf_reader import ModelFile
from pymla.files.overrides import Value

EXAMPLES = """\b
Examples:
  pymla inspect model.gguf
  pymla inspect model-00001-of-00004.gguf --tensors
  pymla inspect model.gguf --json | jq .memory
  pymla inspect model.gguf --check-tensors
  pymla inspect model.gguf --override-kv general.name=str:mine
"""


@click.command(epilog=EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@check_tensors_option
@override_option
@click.option("--json", "as_json", is_flag=True, help="Print everything, tensors and metadata included, as JSON.")
def inspect(file: Path, tensors: bool, check_tensors: bool, overrides: dict[str, Value], as_json: bool) -> None:
    """Show what the GGUF file FILE holds, and what it takes to run it.

    Any part of a split file stands for all of them. Works for files that pymla cannot run, too, and says why.
    """
    with Terminal() as terminal:
        found = report(ModelFile.open(file, overrides), check_tensors, terminal.checking)
    if as_json:
        write_json(found, indent=2)
    else:
        show(found, tensors)
