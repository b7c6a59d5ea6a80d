"""The command line. This module imports little, so that it answers an interrupt before it imports the rest."""

import os
import sys

from pymla.cli import interrupt
from pymla.errors import PymlaError
from pymla.printable import one_line

#: Bytes of addresses that the imported libraries need: with less, some of them end the process instead of raising.
ADDRESSES = 512 << 20


def main() -> None:
    """The console script: errors that the user can mend are one line and exit code 2; an interrupt is 130."""
    interrupt.take_over()
    _prepare_streams()
    # Of NumPy's BLAS only the reference has a use. It would take 40 MiB of addresses for every core, and where it
    # cannot start a thread it sends this process a SIGINT.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    code = _run()
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _fail_to_write(error)
        # Python would try once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code == interrupt.CODE and interrupt.is_ours():
        interrupt.exit_now()
    sys.exit(code)


def _run() -> int:
    """Run the command that was given. Returns the exit code."""
    # Imported here, so that an interrupt finds its handler while they are imported.
    from pymla.host.memory import address_space, size_text

    if address_space() < ADDRESSES:
        limit = size_text(address_space())
        return _fail(f"the address space is limited to {limit}, and {size_text(ADDRESSES)} are needed; raise ulimit -v")
    import click

    from pymla.cli.app import group

    try:
        return group(standalone_mode=False) or 0
    except click.exceptions.Abort:
        return interrupt.CODE
    except click.UsageError as error:
        help_ = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        return _fail(error.format_message().rstrip(".") + help_)
    except click.ClickException as error:
        return _fail(error.format_message())
    except PymlaError as error:
        return _fail(error)
    except MemoryError:
        return _fail("not enough memory; lower --ctx or choose a smaller --cache-type")
    except KeyboardInterrupt:
        return interrupt.CODE
    except OSError as error:
        return _fail_to_write(error)


def _prepare_streams() -> None:
    """Characters that the terminal's encoding lacks are escaped; a stream that the caller closed takes anything."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it stays open until the process ends
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail_to_write(error: OSError) -> int:
    """Print an error of the system, and return the exit code. A closed pipe is no error worth a message."""
    if isinstance(error, BrokenPipeError):
        return 1
    return _fail(f"{error.filename or 'standard output'}: {error.strerror or error}")


def _fail(message: object) -> int:
    """Print an error, and return the exit code."""
    import contextlib

    with contextlib.suppress(OSError):  # standard error may be full, too
        print(f"pymla: error: {one_line(str(message))}", file=sys.stderr, flush=True)
    return 2
