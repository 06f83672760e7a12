"""New folders, which must not be there yet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trip_rt.errors import InputError, printable
from trip_rt.files import whole_folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A draft beside `folder` to write into, moved there at the end; an error or interrupt leaves nothing.

    Raises InputError where `folder` is a file or holds anything.
    """
    target = Path(os.path.abspath(folder))
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise InputError(
            f"{printable(str(folder))}: found something there, expected a new or an empty folder; choose another name"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target) as draft:
        yield draft
