"""What worker processes that read data have in common."""

from __future__ import annotations

import signal


def leave_interrupts_to_the_parent(*_: object) -> None:
    """Ignore Ctrl-C in a worker: the parent process gets it too, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
