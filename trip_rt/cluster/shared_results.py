"""The files of finished clips where all machines reach them: a folder, or a bucket by its address (fsspec's)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from trip_rt.errors import InputError, one_line
from trip_rt.serving.results import SPRITESHEET, THUMBNAIL, VIDEO

_MOST_CACHED = 64  # results, of a bucket


class SharedResults:
    """As serving.results.Results. `url` is a folder, or an address such as s3://bucket/clips, whose package (s3fs) must
    be installed; `cache` is a folder of this machine for what clients fetch. InputError where there is none such."""

    def __init__(self, url: str, cache: Path):
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        try:
            self._files, self._root = fsspec.url_to_fs(url)
            self._is_local = isinstance(self._files, LocalFileSystem)
            self._files.makedirs(self._root, exist_ok=True)
        except Exception as error:  # each of fsspec's file systems has errors of its own
            raise InputError(
                f"results: cannot use {url[:200]} ({one_line(error, 200)}), expected a folder or an address such as"
                " s3://bucket/clips"
            ) from error
        self._cache = cache
        self.bytes = 0  # of all results; the service's to keep

    def put(self, draft: Path, name: str) -> None:
        """Move a finished draft, a folder, to its place; OSError where that fails. Until a job names it, it is
        nobody's."""
        if self._is_local:
            with contextlib.suppress(OSError):  # on one disk
                os.rename(draft, f"{self._root}/{name}")
                return
        for file in draft.iterdir():
            self._files.put_file(str(file), f"{self._root}/{name}/{file.name}")
        shutil.rmtree(draft, ignore_errors=True)

    def remove(self, name: str, size: int) -> None:
        """Remove a result."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm(f"{self._root}/{name}", recursive=True)
        shutil.rmtree(self._cache / name, ignore_errors=True)

    def names(self) -> list[str]:
        """Of all results that there are."""
        return [entry.rstrip("/").rpartition("/")[2] for entry in self._files.ls(self._root, detail=False)]

    def path(self, name: str, file: str) -> Path:
        """The path of a file on this machine, fetched where it is not there; one that is gone is a path to nothing."""
        if self._is_local:
            return Path(self._root, name, file)
        assert file in (VIDEO, THUMBNAIL, SPRITESHEET)
        here = self._cache / name / file
        if not here.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=here.parent)
            os.close(handle)
            try:
                self._files.get_file(f"{self._root}/{name}/{file}", draft)
                os.replace(draft, here)
            except FileNotFoundError:
                os.unlink(draft)
            self._forget_oldest()
        return here

    def _forget_oldest(self) -> None:
        kept = sorted(self._cache.iterdir(), key=lambda folder: folder.stat().st_mtime)
        for folder in kept[:-_MOST_CACHED]:
            shutil.rmtree(folder, ignore_errors=True)
