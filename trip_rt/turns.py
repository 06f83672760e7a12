"""Taking turns: what has one set of buffers serves one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Turn:
    """A lock whose holder is told so when it asks again, where it would wait for itself without end. `enter` is called
    as each turn begins."""

    def __init__(self, enter: Callable[[], None] = lambda: None):
        self._lock, self._enter = threading.Lock(), enter
        self._holder: int | None = None

    def __enter__(self) -> None:
        if self._holder == threading.get_ident():
            raise RuntimeError(
                "found a call from within another one's on_step, expected one at a time; open a second Animator for it"
            )
        self._lock.acquire()
        self._holder = threading.get_ident()
        try:
            self._enter()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._holder = None
        self._lock.release()
