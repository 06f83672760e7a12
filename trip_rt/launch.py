"""Where the commands begin: little is imported here, so that Ctrl-C and SIGTERM are answered from the first moment on,
while libraries are still being loaded."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_AGAIN_AFTER = 0.05  # seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM came. What cleans up after Ctrl-C cleans up after this."""


def until_stopped(program: str, body: Callable[[], int]) -> int:
    """What `body()` returns, the exit code; 130 if Ctrl-C stopped it, 143 if SIGTERM did, each with one line."""
    try:
        with _stoppable():
            return body()
    except Terminated:
        note(f"{program}: terminated")
        return 143
    except KeyboardInterrupt:
        note(f"{program}: interrupted")
        return 130


def note(text: str) -> None:
    """A line on stderr, something worth knowing. It is written with its end at once, as print() does not: a signal may
    come between the two."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM as exceptions, so that nothing partial is left behind. Raised in a finaliser they would be
    dropped, as all that is raised there is: then the signal is sent once more."""
    try:
        before = _handle(signal.default_int_handler, _terminate)
    except ValueError:  # not the main thread: there the caller handles signals
        yield
        return
    hook = sys.unraisablehook

    def unraisable(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            number = signal.SIGTERM if isinstance(dropped.exc_value, Terminated) else signal.SIGINT
            threading.Timer(_AGAIN_AFTER, os.kill, (os.getpid(), number)).start()  # and not within the finaliser
        else:
            hook(dropped)

    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        _handle(*before)


def import_library(name: str) -> Any:
    """The module. Ctrl-C and SIGTERM wait until it is loaded: some libraries drop an exception that comes meanwhile, or
    turn it into an ImportError."""
    came: list[int] = []

    def wait(number: int, frame: object) -> None:
        came.append(number)

    try:
        before = _handle(wait, wait)
    except ValueError:  # not the main thread, which no signal stops
        return importlib.import_module(name)
    try:
        return importlib.import_module(name)
    finally:
        _handle(*before)
        for number in came[:1]:
            signal.raise_signal(number)


def _handle(*handlers: Any) -> tuple[Any, Any]:
    """Have Ctrl-C and SIGTERM handled by these two, Ctrl-C only where it is not ignored, as in a background job.
    Returns the two before."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    if before[0] != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handlers[0])
    signal.signal(signal.SIGTERM, handlers[1])
    return before


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _command(program: str, module: str, function: str = "main") -> Callable[[], int]:
    """A console script's function, which runs the module's."""

    def leave(number: int, frame: object) -> None:
        word = "interrupted" if number == signal.SIGINT else "terminated"
        os.write(2, f"{program}: {word}\n".encode())
        os._exit(128 + number)

    def command() -> int:
        _open_standard_files()
        # While libraries are loaded nothing has begun, and some would turn an exception out of a signal into an
        # ImportError. After the last line all is cleaned up, and an exception would only be printed.
        _handle(leave, leave)
        main: Callable[[], int] = getattr(importlib.import_module(module), function)
        return until_stopped(program, main)

    return command


def _open_standard_files() -> None:
    """Where a standard stream is closed (`>&-`), have it go nowhere: the next file that is opened would otherwise get
    its number, and what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


trip_animate = _command("trip-animate", "trip_rt.animate")
trip_export = _command("trip-export", "trip_export.command", "export_main")
trip_parity = _command("trip-parity", "trip_export.command", "parity_main")
trip_evaluate = _command("trip-evaluate", "trip_reference.evaluation.command")
trip_data = _command("trip-data", "trip_reference.data.command")
trip_train = _command("trip-train", "trip_reference.training.command")
trip_serve = _command("trip-serve", "trip_rt.serving.command")
