"""The command line. A module for each command, imported when it is called."""

import importlib
import os
import sys

import click

from pymla import __version__
from pymla.cli.options import as_options
from pymla.errors import PymlaError
from pymla.printable import one_line

COMMANDS = {
    "bench": "Measure prompt and generation speed as the context grows.",
    "convert": "Convert a Hugging Face checkpoint to GGUF.",
    "generate": "Generate text from a prompt.",
    "inspect": "Show what is in a GGUF file, and what it costs to run.",
}


class _Commands(click.Group):
    def list_commands(self, ctx):
        return sorted(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"pymla.cli.{name}"), name)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except PymlaError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand) or self
            raise type(error)(as_options(error, command)) from error

    def format_commands(self, ctx, formatter):
        # From the table, so that no command is imported for it.
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="pymla")
@click.pass_context
def group(ctx):
    """Run DeepSeek-family models from GGUF files.

    \b
    Examples:
      pymla generate "def "
      pymla generate -m DeepSeek-V2-Lite-Chat.Q4_0.gguf --chat "Why is the sky blue?"
      pymla inspect DeepSeek-V2-Lite-Chat.Q4_0.gguf
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main():
    """The console script: errors that the user can mend are one line and exit code 2."""
    _prepare_streams()
    try:
        code = group(standalone_mode=False) or 0
    except click.exceptions.Abort:
        code = 130
    except click.UsageError as error:
        help_ = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        code = _fail(error.format_message().rstrip(".") + help_)
    except click.ClickException as error:
        code = _fail(error.format_message())
    except PymlaError as error:
        code = _fail(error)
    except MemoryError:
        code = _fail("not enough memory; lower --ctx or choose a smaller --cache-type")
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        code = _fail_to_write(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _fail_to_write(error)
        # Python would try once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _prepare_streams():
    """Characters that the terminal's encoding lacks are escaped; a stream that the caller closed takes anything."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it stays open until the process ends
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail_to_write(error):
    """What the system refused. Whoever closes the output knows it, so that goes without a word."""
    if isinstance(error, BrokenPipeError):
        return 1
    return _fail(f"{error.filename or 'standard output'}: {error.strerror or error}")


def _fail(message):
    click.echo(f"pymla: error: {one_line(str(message))}", err=True)
    return 2
