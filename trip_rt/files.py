"""Files and folders that appear whole or not at all: written beside their place and moved into it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from trip_rt.errors import InputError, printable

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than files may be here",
}


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, moved there at the end.

    An error or interrupt leaves `path` as it was and nothing beside it; a power cut leaves the old file or the new one.
    """
    part = _beside(path)
    try:
        with disk_full(path):
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
        with disk_full(path):
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


@contextlib.contextmanager
def disk_full(path: Path, remedy: str = "make room and try again") -> Iterator[None]:
    """InputError where there is no room for what is written to `path`, whichever library finds out: those in Rust
    (safetensors) raise errors of their own, which end in the system's number."""
    try:
        yield
    except Exception as error:
        written = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(written[1]) if written else None
        if number not in _FULL:
            raise
        raise InputError(f"{printable(str(path))}: {_FULL[number]}; {remedy}") from error


def _beside(path: Path) -> Path:
    return path.with_name(f".trip-{secrets.token_hex(8)}.part")
