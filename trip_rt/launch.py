"""Where the commands begin: little is imported here, so that Ctrl-C and SIGTERM are answered from the first moment on,
while libraries are still being loaded."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable

from trip_rt.signals import Terminated, handle, stoppable


def until_stopped(program: str, body: Callable[[], int]) -> int:
    """What `body()` returns, the exit code; 130 if Ctrl-C stopped it, 143 if SIGTERM did, each with one line."""
    try:
        with stoppable():
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
        handle(leave, leave)
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
trip_imagine = _command("trip-imagine", "trip_pictures.command")
