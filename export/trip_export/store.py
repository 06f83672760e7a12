"""The bundle's folder while an export writes it: held alone, every file moved in whole, and what is finished
remembered."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trip_rt.bundle import file_spec, read_manifest
from trip_rt.config import from_json, to_json
from trip_rt.errors import InputError
from trip_rt.files import disk_full
from trip_rt.manifest import EngineSpec, FileName, FileSpec, KernelSpec, Manifest
from trip_rt.plain_files import read_json

_DRAFT = ".exporting-"
_FINISHED = ".finished-"


@dataclass(frozen=True)
class _Finished:
    """A note of an engine or a kernel that is finished while the manifest is not."""

    engine: EngineSpec | None
    kernel: KernelSpec | None
    files: dict[FileName, FileSpec]


class Store:
    """The folder `bundle` and the drafts in it; `files` is the manifest's table to be, `previous` the manifest that is
    there now, if any."""

    def __init__(self, bundle: Path, draft: Path):
        self.bundle, self.draft = bundle, draft
        self.files: dict[str, FileSpec] = {}
        self.previous: Manifest | None = None
        with contextlib.suppress(InputError):  # none yet, or one that is replaced now
            self.previous = read_manifest(bundle)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file of the bundle."""
        (self.draft / name).write_bytes(data)
        self.adopt(name)

    def adopt(self, name: str) -> None:
        """Move a draft into the bundle."""
        (self.draft / name).chmod(0o644)  # some libraries write for their owner alone
        os.replace(self.draft / name, self.bundle / name)
        self.files[name] = file_spec(self.bundle / name)

    def finish(self, spec: EngineSpec | KernelSpec) -> None:
        """Add a finished engine's or kernel's files to `files`, and leave a note of them, by which a rerun finds them
        should this export be interrupted."""
        self.files |= {name: file_spec(self.bundle / name) for name in spec.files}
        engine, kernel = (spec, None) if isinstance(spec, EngineSpec) else (None, spec)
        finished = _Finished(engine, kernel, {name: self.files[name] for name in spec.files})
        self.write(f"{_FINISHED}{spec.key[:16]}.json", json.dumps(to_json(finished)).encode())

    def finished(self, key: str) -> Any:
        """The EngineSpec or KernelSpec of that key, if all its files are whole: one of the manifest's, or one that a
        cut-short export left."""
        for spec, files in self._known():
            if spec.key == key and all(
                (self.bundle / name).is_file() and file_spec(self.bundle / name) == files[name] for name in spec.files
            ):
                self.files |= files
                return spec
        return None

    def unchanged(self, name: str) -> bool:
        """Whether a file is as the manifest says, or not in the manifest; adds it to `files`."""
        self.files[name] = file_spec(self.bundle / name)
        return self.previous is None or self.previous.files.get(name, self.files[name]) == self.files[name]

    def remove_others(self, files: set[str]) -> None:
        """Remove the engines of earlier exports and the notes of finished ones. Anything else in the folder stays: it
        is not ours."""
        for pattern in (
            "*.onnx",
            "*.weights",
            "*.plan",
            "*.pt2",
            "*.cubin",
            "reference-*.safetensors",
            f"{_FINISHED}*",
        ):
            for path in self.bundle.glob(pattern):
                if path.name not in files:
                    path.unlink()

    def _known(self) -> Iterator[tuple[EngineSpec | KernelSpec, dict[str, FileSpec]]]:
        if self.previous:
            for spec in (*self.previous.engine_specs(), *self.previous.kernel_specs()):
                yield spec, {name: self.previous.files[name] for name in spec.files}
        for path in self.bundle.glob(f"{_FINISHED}*"):
            with contextlib.suppress(ValueError):  # what is no note of ours is passed over; InputError is one, too
                finished = from_json(_Finished, read_json(path, "a note of an export"), str(path))
                spec = finished.engine or finished.kernel
                if spec and finished.files.keys() == set(spec.files):
                    yield spec, finished.files


@contextlib.contextmanager
def store(bundle: Path) -> Iterator[Store]:
    """Hold the bundle folder alone; what a killed export left in it is removed. InputError where it is held already or
    cannot be a folder."""
    try:
        bundle.mkdir(parents=True, exist_ok=True)
        handle = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"{bundle}: cannot be a bundle's folder ({error.strerror}); choose another place") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{bundle}: another export is writing here; wait for it or choose another folder"
            ) from error
        for leftover in bundle.glob(f"{_DRAFT}*"):
            shutil.rmtree(leftover)
        with (
            disk_full(bundle, "make room and run the export again, which goes on"),
            tempfile.TemporaryDirectory(dir=bundle, prefix=_DRAFT) as draft,
        ):
            yield Store(bundle, Path(draft))
    finally:
        os.close(handle)
