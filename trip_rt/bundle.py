"""The bundle: a folder of engines and the manifest that says what they are. Nothing in it is trusted before it is verified."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trip_rt.config import TripConfig, from_json, to_json
from trip_rt.errors import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COMPONENTS = ("text_encoder", "vae_encoder", "unet", "tnf", "vae_decoder")
MAX_MANIFEST_BYTES = 1 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype and static shape of an engine's input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EngineSpec:
    """One component's engine for one backend: its file, what is in it, and the key of the inputs that it was built from."""

    file: str
    sha256: str
    bytes: int
    key: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds. `engines[component][backend]`; `batch` clips and `decode_frames` frames run at a time.

    `built_with` (package versions), `source` (hashes of the checkpoint) and `parity` (figures measured at export) are for people.
    """

    config: TripConfig
    batch: int
    decode_frames: int
    tokenizer_sha256: str
    engines: Mapping[str, Mapping[str, EngineSpec]]
    built_with: Mapping[str, str]
    source: Mapping[str, str]
    parity: Mapping[str, Any]


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    folder: Path
    manifest: Manifest
    tokenizer_json: str

    def engine_path(self, spec: EngineSpec) -> Path:
        return self.folder / spec.file


def serialise(manifest: Manifest) -> bytes:
    """The manifest's file: one canonical form, closed by the SHA-256 of the rest, so that any changed byte shows."""
    body = {"format_version": FORMAT_VERSION} | to_json(manifest)
    return _canonical(body | {"manifest_sha256": _sha256(_canonical(body))})


def open_bundle(folder: Path | str) -> Bundle:
    """Read and verify a bundle; InputError names the first file that is missing, changed or of another version."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for component, engines in manifest.engines.items():
        for spec in engines.values():
            verify_file(folder / spec.file, spec.sha256, spec.bytes, component)
    tokenizer = folder / "tokenizer.json"
    verify_file(tokenizer, manifest.tokenizer_sha256, None, "tokenizer")
    return Bundle(folder, manifest, tokenizer.read_text(encoding="utf-8"))


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, checked against itself but not against the bundle's other files."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: found no such folder, expected a bundle; make one with trip-export")
    if not path.is_file():
        raise InputError(f"{folder}: found no {MANIFEST}, so this is no (finished) bundle; make one with trip-export")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise InputError(f"{path}: found {path.stat().st_size} bytes, expected at most {MAX_MANIFEST_BYTES}; export the bundle again")
    raw = path.read_bytes()
    try:
        body = json.loads(raw)
        version = body["format_version"]
        digest = body.pop("manifest_sha256")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: damaged, it is not a manifest; export the bundle again") from error
    if type(version) is int and version > FORMAT_VERSION:
        raise InputError(f"{path}: found format version {version}, this trip-rt reads up to {FORMAT_VERSION}; upgrade trip-rt or export again")
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: found format version {version!r}, expected {FORMAT_VERSION}; export the bundle again")
    if digest != _sha256(_canonical(body)) or raw != _canonical(body | {"manifest_sha256": digest}):
        raise InputError(f"{path}: damaged, its contents and its own hash differ; export the bundle again")
    del body["format_version"]
    return _parse(body, str(path))


def verify_file(path: Path, sha256: str, size: int | None, what: str) -> None:
    """InputError unless the file has this hash (and size, which is cheaper to refuse by)."""
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected the {what}'s; export the bundle again")
    if size is not None and path.stat().st_size != size:
        raise InputError(f"{path}: found {path.stat().st_size} bytes, expected {size}; export the bundle again")
    if (found := file_sha256(path)) != sha256:
        raise InputError(f"{path}: damaged, found SHA-256 {found[:12]}…, expected {sha256[:12]}…; export the bundle again")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(body: dict[str, Any], where: str) -> Manifest:
    try:
        engines = {
            component: {backend: _engine_spec(spec, where) for backend, spec in specs.items()} for component, specs in body.pop("engines").items()
        }
        manifest = Manifest(config=from_json(TripConfig, body.pop("config"), where), engines=engines, **body)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{where}: not a manifest of format {FORMAT_VERSION} ({error}); export the bundle again") from error
    if missing := [name for name in COMPONENTS if not engines.get(name)]:
        raise InputError(f"{where}: lacks an engine for {', '.join(missing)}; export the bundle again")
    return manifest


def _engine_spec(spec: dict[str, Any], where: str) -> EngineSpec:
    tensors = {
        side: tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in spec[side]) for side in ("inputs", "outputs")
    }
    parsed = EngineSpec(**(spec | tensors))
    if not _PLAIN_NAME.fullmatch(parsed.file):
        raise InputError(f"{where}: found engine file {parsed.file!r}, expected a plain file name; do not use this bundle")
    return parsed


def _canonical(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
