"""The bundle: a folder of engines and the manifest that says what they are. Nothing in it is trusted before it is
verified."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trip_rt.errors import InputError
from trip_rt.manifest import EngineSpec, FileSpec, Manifest, parse
from trip_rt.plain_files import check_plain, read_plain, read_text
from trip_rt.tokenizer_file import MAX_MEGABYTES

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
MAX_MANIFEST_BYTES = 4 << 20
_AGAIN = "export the bundle again"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    folder: Path
    manifest: Manifest
    tokenizer_json: str

    def engine_path(self, spec: EngineSpec) -> Path:
        return self.folder / spec.file


def open_bundle(folder: Path | str) -> Bundle:
    """Read and verify a bundle; InputError names the first file that is missing, changed or of another version."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, spec in manifest.files.items():
        verify_file(folder / name, spec)
    return Bundle(folder, manifest, read_text(folder / TOKENIZER, f"a tokenizer; {_AGAIN}", MAX_MEGABYTES << 20))


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, checked against itself but not against the bundle's other files."""
    path = folder / MANIFEST
    with _readable(folder):
        if not folder.is_dir():
            raise InputError(f"{folder}: found no such folder, expected a bundle; make one with trip-export")
        if not path.exists():
            raise InputError(
                f"{folder}: found no {MANIFEST}, so this is no (finished) bundle; make one with trip-export"
            )
    return parse(read_plain(path, f"a bundle's manifest; {_AGAIN}", MAX_MANIFEST_BYTES), str(path))


def verify_file(path: Path, spec: FileSpec) -> None:
    """InputError unless the file has this size and hash."""
    size = check_plain(path, f"one of the bundle's; {_AGAIN}")
    if size != spec.bytes:  # cheaper to refuse by
        raise InputError(f"{path}: found {size} bytes, expected {spec.bytes}; {_AGAIN}")
    with _readable(path):
        found = file_sha256(path)
    if found != spec.sha256:
        raise InputError(f"{path}: damaged, found SHA-256 {found[:12]}…, expected {spec.sha256[:12]}…; {_AGAIN}")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_spec(path: Path) -> FileSpec:
    """What the manifest's table says of this file."""
    return FileSpec(file_sha256(path), path.stat().st_size)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error
