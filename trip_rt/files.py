"""Files and folders that appear whole or not at all: written beside their place and moved into it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, moved there at the end.

    An error or interrupt leaves `path` as it was and nothing beside it; a power cut leaves the old file or the new one.
    """
    part = _beside(path)
    try:
        yield part
        with open(part, "r+b") as file:
            os.fsync(file.fileno())  # or the new name could outlive a power cut, and its contents not
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `path` to write into, moved there at the end; an error or interrupt leaves nothing of it.

    With `replace` it takes the place of a folder that is there, whatever that holds; without, such a folder must be
    empty.
    """
    part, old = _beside(path), _beside(path)
    try:
        part.mkdir()
        yield part
        if replace and path.is_dir():
            os.rename(path, old)
        os.rename(part, path)
    finally:
        if old.is_dir() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".trip-{secrets.token_hex(8)}.part")
