"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trip_rt.errors import InputError, printable


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
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".trip-data-") as temporary:
        draft = Path(temporary) / "draft"  # with everyone's usual permissions, which `temporary` has not
        draft.mkdir()
        yield draft
        os.replace(draft, target)
