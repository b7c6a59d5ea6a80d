"""Options that commands have which choose the types of a file's tensors."""

from pathlib import Path

import click

tensor_type_option = click.option(
    "--tensor-type",
    "tensor_types",
    metavar="REGEX=TYPE",
    multiple=True,
    help="Type of tensors in whose name the expression is found. The first that is found counts.",
)

recipe_option = click.option("--recipe", type=click.Path(path_type=Path), help="File of such rules, one on a line.")

imatrix_option = click.option(
    "--imatrix", type=click.Path(path_type=Path), help="Importance matrix, of pymla imatrix or llama-imatrix."
)
