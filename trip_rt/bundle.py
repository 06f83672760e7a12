"""The bundle: a folder of engines and the manifest that says what they are. Nothing in it is trusted before it is verified."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trip_rt.config import TripConfig, from_json, to_json
from trip_rt.errors import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COMPONENTS = ("text_encoder", "vae_encoder", "unet", "tnf", "vae_decoder")
MAX_MANIFEST_BYTES = 1 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_DTYPES = ("float16", "float32", "float64", "int32", "int64", "bool")


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
    try:
        return Bundle(folder, manifest, tokenizer.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{tokenizer}: found bytes that are not UTF-8, expected a tokenizer; export the bundle again") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, checked against itself but not against the bundle's other files."""
    path = folder / MANIFEST
    with _readable(folder):
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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: damaged, it is not a manifest; export the bundle again") from error
    if type(version) is int and version > FORMAT_VERSION:
        raise InputError(f"{path}: found format version {version}, this trip-rt reads up to {FORMAT_VERSION}; upgrade trip-rt or export again")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(f"{path}: found format version {version!r}, expected {FORMAT_VERSION}; export the bundle again")
    if not _is_intact(body, raw):
        raise InputError(f"{path}: damaged, its contents and its own hash differ; export the bundle again")
    return _parse({name: value for name, value in body.items() if name not in ("format_version", "manifest_sha256")}, str(path))


def verify_file(path: Path, sha256: str, size: int | None, what: str) -> None:
    """InputError unless the file has this hash (and size, which is cheaper to refuse by)."""
    with _readable(path):
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


def _is_intact(body: dict[str, Any], raw: bytes) -> bool:
    rest = {name: value for name, value in body.items() if name != "manifest_sha256"}
    try:
        return raw == _canonical(body) and body.get("manifest_sha256") == _sha256(_canonical(rest))
    except RecursionError:  # writing JSON recurses deeper than reading it
        return False


def _parse(body: dict[str, Any], where: str) -> Manifest:
    try:
        config = from_json(TripConfig, body.pop("config"), where)
        engines = {component: {backend: _engine_spec(spec) for backend, spec in specs.items()} for component, specs in body.pop("engines").items()}
        manifest = Manifest(config=config, engines=engines, **body)
        for value in (body["built_with"], body["source"], body["parity"]):
            _expect(type(value) is dict, value, "an object")
        for value in (manifest.batch, manifest.decode_frames):
            _expect(type(value) is int and value > 0, value, "a positive whole number")
        _expect(type(manifest.tokenizer_sha256) is str, manifest.tokenizer_sha256, "a SHA-256")
        _check_numbers(to_json(config))
    except (TypeError, KeyError, AttributeError, _MalformedError) as error:
        raise InputError(f"{where}: not a manifest of format {FORMAT_VERSION} ({str(error)[:200]}); export the bundle again") from error
    if missing := [name for name in COMPONENTS if not engines.get(name)]:
        raise InputError(f"{where}: lacks an engine for {', '.join(missing)}; export the bundle again")
    return manifest


class _MalformedError(Exception):
    pass


def _expect(right: bool, found: object, expected: str) -> None:
    if not right:
        raise _MalformedError(f"found {str(found)[:80]!r}, expected {expected}")


def _check_numbers(config: dict[str, Any]) -> None:
    """Every number of a config finite, every count positive; the largest that any real model needs is far below 2^20."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_numbers(value)
        elif isinstance(value, float):
            _expect(0 <= value < math.inf, value, f"{name} to be finite and not negative")
        elif type(value) is int:
            _expect((name == "steps_offset" or value > 0) and 0 <= value <= 1 << 20, value, f"{name} to be 1 to 2^20")


def _engine_spec(spec: dict[str, Any]) -> EngineSpec:
    parsed = EngineSpec(**{**spec, "inputs": _tensors(spec["inputs"]), "outputs": _tensors(spec["outputs"])})
    for value in (parsed.file, parsed.sha256, parsed.key, parsed.precision):
        _expect(type(value) is str, value, "a string")
    _expect(type(parsed.bytes) is int, parsed.bytes, "a number of bytes")
    _expect(bool(_PLAIN_NAME.fullmatch(parsed.file)), parsed.file, "a plain file name")
    return parsed


def _tensors(data: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    _expect(type(data) is list and all(type(tensor["shape"]) is list for tensor in data), data, "a list of tensors")
    tensors = tuple(TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in data)
    for tensor in tensors:
        _expect(type(tensor.name) is str, tensor.name, "a tensor's name")
        _expect(tensor.dtype in _DTYPES, tensor.dtype, f"one of {', '.join(_DTYPES)}")
        _expect(all(type(side) is int and side > 0 for side in tensor.shape), list(tensor.shape), "a static shape")
    return tensors


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions") from error


def _canonical(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
