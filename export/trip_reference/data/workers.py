"""What worker processes that read data have in common."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def follow_the_parent(*_: object) -> None:
    """Ignore Ctrl-C in a worker, as the parent process gets it too and ends its workers; end with a parent that was
    killed and could not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    # torch's own workers watch the process that forked them, which may be a fork server that lives on.
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
