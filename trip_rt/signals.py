"""Ctrl-C and SIGTERM: exceptions while a command works, answered after a library is loaded."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_AGAIN_AFTER = 0.05  # seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM came. What cleans up after Ctrl-C cleans up after this."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM as exceptions, so that nothing partial is left behind. Raised in a finaliser they would be
    dropped, as all that is raised there is: then the signal is sent once more."""
    try:
        before = handle(signal.default_int_handler, _terminate)
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
        handle(*before)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block ends. For imports of large libraries: some drop an exception that comes
    meanwhile, or turn it into an ImportError."""
    came: list[int] = []

    def wait(number: int, frame: object) -> None:
        came.append(number)

    try:
        before = handle(wait, wait)
    except ValueError:  # not the main thread, which no signal stops
        yield
        return
    try:
        yield
    finally:
        handle(*before)
        for number in came[:1]:
            signal.raise_signal(number)


def import_library(name: str) -> Any:
    """The module, loaded before a signal is answered."""
    with held():
        return importlib.import_module(name)


def handle(*handlers: Any) -> tuple[Any, Any]:
    """Have Ctrl-C and SIGTERM handled by these two. Returns the two before, which may be given back.

    Ctrl-C stays ignored where it is, as in a background job, and a handler that Python did not set, here None, stays.
    ValueError but in the main thread.
    """
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number, old, new in zip((signal.SIGINT, signal.SIGTERM), before, handlers, strict=True):
        if old is not None and (number, old) != (signal.SIGINT, signal.SIG_IGN):
            signal.signal(number, new)
    return before


def _terminate(number: int, frame: object) -> None:
    raise Terminated
