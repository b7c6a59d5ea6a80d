"""The group of commands: a module for each, imported when it is called."""

import importlib
from typing import Any

import click

from pymla import __version__
from pymla.cli.options import as_options
from pymla.errors import PymlaError

COMMANDS = {
    "bench": "Measure prompt and generation speed as the context grows.",
    "convert": "Convert a Hugging Face checkpoint to GGUF.",
    "generate": "Generate text from a prompt.",
    "imatrix": "Collect or merge importance matrices, for quantising.",
    "inspect": "Show what is in a GGUF file, and what it costs to run.",
    "merge": "Make one GGUF file of the parts of a model.",
    "perplexity": "Measure how well a model predicts a text, or answers questions.",
    "quantize": "Write a GGUF file in other types.",
    "split": "Write a GGUF file as several parts.",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"pymla.cli.{name}"), name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PymlaError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "") or self
            raise type(error)(as_options(error, command)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # From the table, so that no command is imported for it.
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="pymla")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Run DeepSeek-family models from GGUF files.

    \b
    Examples:
      pymla generate "def "
      pymla generate -m DeepSeek-V2-Lite-Chat.Q4_0.gguf --chat "Why is the sky blue?"
      pymla inspect DeepSeek-V2-Lite-Chat.Q4_0.gguf
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
