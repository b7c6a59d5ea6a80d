"""The command line. A module for each command, imported when it is called."""

import importlib
import os
import sys

import click

from pymla import __version__
from pymla.errors import PymlaError

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

    def format_commands(self, ctx, formatter):
        # From the table, so that no command is imported for it.
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pymla")
def group():
    """Run DeepSeek-family models from GGUF files.

    \b
    Examples:
      pymla generate "def "
      pymla generate -m DeepSeek-V2-Lite-Chat.Q4_0.gguf --chat "Why is the sky blue?"
      pymla inspect DeepSeek-V2-Lite-Chat.Q4_0.gguf
    """


def main():
    """The console script: errors that the user can mend are one line and exit code 2."""
    try:
        code = group(standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except PymlaError as error:
        code = _fail(error)
    except MemoryError:
        code = _fail("not enough memory; lower --ctx or choose a smaller --cache-type")
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # Whoever read the output has gone. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message):
    click.echo(f"pymla: error: {' '.join(str(message).split())}", err=True)
    return 2
