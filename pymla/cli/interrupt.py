"""Ctrl-C ends the command line at once, with exit code 130 and without a traceback, even during a long call.

Python's own answer, a `KeyboardInterrupt` in the main thread, waits until a library's call returns, as that of LLVM's
compiler, and is lost where it comes up in a callback or a finaliser. Here the signal's handler ends the process. While
the main thread is in a long call, and cannot run the handler, a thread does that, which the signal wakes.

Work that must not be cut off runs in `graceful`: there an interrupt is a `KeyboardInterrupt`, and a second one ends the
process.
"""

# Python answers until the handler is installed, so this module imports only what Python has loaded already: `signal`
# would first make enumerations of the constants of `_signal`, which takes milliseconds.
from __future__ import annotations

import _signal as signal
import atexit
import os
import sys

TYPE_CHECKING = False  # as in `typing`, whose import takes milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable
    from sys import UnraisableHookArgs
    from typing import NoReturn

#: The exit code.
CODE = 130
#: Clears the line of a progress bar of rich, and shows the cursor, which rich hides.
WITHOUT_BAR = b"\r\x1b[2K\x1b[?25h"
#: Written to a terminal before the process ends: `WITHOUT_BAR` while there is a bar.
terminal_reset = b""

# Pieces of work that are in `graceful`.
_graceful = 0
# Signals that became a KeyboardInterrupt.
_raised = 0
# A KeyboardInterrupt was raised where Python had nobody to give it to.
_lost = False
_wakeup = -1


def take_over() -> None:
    """Answer SIGINT for the rest of the process; not where it is ignored (``nohup``) or somebody else answers it."""
    global _wakeup
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    try:
        signal.signal(signal.SIGINT, _handle)
    except ValueError:  # this is not the main thread, which is somebody else's then
        return
    # While the interpreter is taken down, no handler can run any more.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.unraisablehook = _Unraisable(sys.unraisablehook)
    if os.name == "posix":  # elsewhere signals wake sockets only
        _wakeup = _watch()


def is_ours() -> bool:
    """Whether this module answers SIGINT."""
    return signal.getsignal(signal.SIGINT) is _handle


class graceful:
    """Context of work that keeps its results when it is interrupted: an interrupt is a `KeyboardInterrupt` there."""

    def __enter__(self) -> None:
        global _graceful
        _graceful += 1

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        global _graceful, _lost
        _graceful -= 1
        if _lost and error is None:
            _lost = False
            raise KeyboardInterrupt


def exit_now() -> NoReturn:
    """End the process, without waiting for threads or finalisers."""
    try:
        if terminal_reset and os.isatty(2):
            os.write(2, terminal_reset)
    finally:
        os._exit(CODE)


def _handle(number: int, frame: object) -> NoReturn:
    """The handler, which Python runs in the main thread."""
    global _raised, _lost
    if not _graceful or (_raised and not _lost):
        exit_now()
    _raised, _lost = _raised + 1, False
    raise KeyboardInterrupt


class _Unraisable:
    """Takes the place of `sys.unraisablehook`: a lost `KeyboardInterrupt` is raised again instead of printed."""

    def __init__(self, hook: Callable[[UnraisableHookArgs], object]):
        self._hook = hook

    def __call__(self, unraisable: UnraisableHookArgs) -> None:
        global _lost
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._hook(unraisable)
            return
        _lost = True
        if _wakeup != -1:
            os.write(_wakeup, b"\0")


def _watch() -> int:
    """Start the thread that waits. Returns the end of a pipe to which Python writes the number of each signal; -1: the
    system gives this process no thread, and only the handler answers."""
    import threading

    reading, writing = os.pipe()
    thread = threading.Thread(target=_watching, args=(reading,), daemon=True, name="pymla-interrupt")
    try:
        thread.start()
    except RuntimeError:
        return -1
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    return writing


def _watching(reading: int) -> None:
    import threading
    import time

    main, seen, sent = threading.main_thread().ident, 0, 0
    while True:
        received = os.read(reading, 1)
        if received == b"\0":
            # The main thread leaves the callback or finaliser meanwhile.
            time.sleep(0.01)
            if _lost:
                sent += 1
                signal.pthread_kill(main, signal.SIGINT)
        elif received[0] == signal.SIGINT:
            seen += 1
            # The handler may have been faster, and the work may have ended since.
            if seen > _raised and (not _graceful or seen > 1 + sent):
                exit_now()
