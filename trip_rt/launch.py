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

_AGAIN_AFTER = 0.05  # seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM came. What cleans up after Ctrl-C cleans up after this."""


def until_stopped(program: str, body: Callable[[], int]) -> int:
    """What `body()` returns, the exit code; 130 if Ctrl-C stopped it, 143 if SIGTERM did, each with one line."""
    try:
        with _terminable():
            return body()
    except Terminated:
        print(f"{program}: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM as an exception, so that nothing partial is left behind. Raised in a finaliser, it and Ctrl-C would be
    dropped, as all that is raised there is: then the signal is sent once more."""
    try:
        before = signal.signal(signal.SIGTERM, _terminate)
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
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _command(program: str, module: str, function: str = "main") -> Callable[[], int]:
    """A console script's function, which runs the module's."""

    def body() -> int:
        main: Callable[[], int] = getattr(importlib.import_module(module), function)
        return main()

    def leave(number: int, frame: object) -> None:
        word = "interrupted" if number == signal.SIGINT else "terminated"
        os.write(2, f"{program}: {word}\n".encode())
        os._exit(128 + number)

    def command() -> int:
        _open_standard_files()
        code = until_stopped(program, body)
        # All is written and cleaned up. While libraries shut down, an exception would only be printed.
        signal.signal(signal.SIGINT, leave)
        signal.signal(signal.SIGTERM, leave)
        return code

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
