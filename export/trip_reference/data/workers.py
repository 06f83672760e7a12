"""Processes that read data for another."""

from __future__ import annotations

import signal


def leave_interrupts_to_the_parent(*_: object) -> None:
    """Set up such a process: on Ctrl-C the parent decides, and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
