"""What is made once a test run, however many workers share it."""

from __future__ import annotations

import fcntl
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """What `make` gives of the folder `name` to be. The first worker that asks makes it, the others wait and are given
    a copy of the answer; the folder belongs to all of them and must not be changed."""
    temporary = factory.getbasetemp()
    if temporary.name.startswith("popen-"):  # a worker's own, in the run's
        temporary = temporary.parent
    folder = temporary / "once" / name
    folder.parent.mkdir(exist_ok=True)
    answer = folder.with_name(f"{name}.pickle")
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not answer.exists():
            answer.write_bytes(pickle.dumps(make(folder)))
    return pickle.loads(answer.read_bytes())
