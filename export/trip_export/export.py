"""A checkpoint to a bundle: export what is new, reuse what is not, measure parity, and write the manifest last."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trip_engines.onnx_engine import finish_onnx_engine
from trip_export.components import Component, components, default_decode_frames
from trip_export.onnx_export import OPSET, export_onnx
from trip_export.parity import Parity, measure
from trip_reference import checkpoint
from trip_reference.model import TripModel
from trip_rt.animator import Animator
from trip_rt.bundle import MANIFEST, Bundle, EngineSpec, Manifest, file_sha256, read_manifest, serialise
from trip_rt.config import TripConfig, to_json
from trip_rt.errors import InputError

BACKEND, PRECISION = "onnxruntime", "fp32"
_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")
_DRAFT = ".exporting-"


@dataclass(frozen=True)
class ExportResult:
    """What an export did: seconds spent on each component that was built, the ones that were reused, and the parity measured."""

    bundle: Path
    seconds: dict[str, float]
    reused: list[str]
    parity: Parity


def export_bundle(
    source: Path,
    bundle: Path,
    *,
    batch: int = 1,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Export checkpoint `source` to the folder `bundle`; `frames` and `size` (height, width) default to the checkpoint's.

    Engine files are named after the hash of all they are built from, so a new one never overwrites one that the present manifest speaks of:
    the folder is a whole bundle, the old or the new, at every moment, and a rerun takes up what a cut-short one finished.
    InputError for an unusable checkpoint, shape or folder.
    """
    model = checkpoint.from_pretrained(source)
    model.config = _with_shapes(model, frames, size)
    if batch < 1:
        raise InputError(f"batch: found {batch}, expected at least 1")
    tokenizer_json = checkpoint.load_tokenizer_json(source)
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    hashes = {path.relative_to(source).as_posix(): file_sha256(path) for path in _checkpoint_files(source)}
    decode_frames = default_decode_frames(model.config)

    with _locked(bundle), tempfile.TemporaryDirectory(dir=bundle, prefix=_DRAFT) as draft:
        previous = _previous(bundle)
        known = {spec.key: spec for specs in previous.engines.values() for spec in specs.values()} if previous else {}
        engines, seconds, reused = {}, {}, []
        for component in components(model, batch, decode_frames):
            began = time.monotonic()
            key = _key(component, model, hashes, versions)
            path = bundle / f"{component.name}-{key[:16]}.onnx"
            spec = _reusable(path, known.get(key), key)
            if spec:
                reused.append(component.name)
                note(f"{component.name}: unchanged, reused")
            else:
                graph = Path(draft) / path.name
                export_onnx(component, graph)
                spec = finish_onnx_engine(graph, path, key, PRECISION)
                seconds[component.name] = round(time.monotonic() - began, 1)
                note(f"{component.name}: exported in {seconds[component.name]} s, {spec.bytes / 1e6:.1f} MB")
            engines[component.name] = {BACKEND: spec}
        manifest = Manifest(
            config=model.config,
            batch=batch,
            decode_frames=decode_frames,
            tokenizer_sha256=hashlib.sha256(tokenizer_json.encode()).hexdigest(),
            engines=engines,
            built_with=versions,
            source=hashes,
            parity={},
        )
        if previous and previous.parity and dataclasses.replace(previous, parity={}) == manifest:
            parity = Parity.from_json(dict(previous.parity))
            note("parity: unchanged, reused")
        else:
            note("parity: measuring against PyTorch")
            with Animator(Bundle(bundle, manifest, tokenizer_json)) as animator:
                parity = measure(model, animator, PRECISION)
        _write(Path(draft), bundle, "tokenizer.json", tokenizer_json.encode())
        _write(Path(draft), bundle, MANIFEST, serialise(dataclasses.replace(manifest, parity=parity.to_json())))
        _remove_unreferenced(bundle, {spec.file for specs in engines.values() for spec in specs.values()})
    return ExportResult(bundle, seconds, reused, parity)


def _with_shapes(model: TripModel, frames: int | None, size: tuple[int, int] | None) -> TripConfig:
    config = model.config
    height, width = size or (config.height, config.width)
    frames = config.num_frames if frames is None else frames
    # Each of the UNet's levels but the last halves the latents.
    step = config.vae_scale_factor * 2 ** (len(model.residual_unet.unet.config["block_out_channels"]) - 1)
    if height % step or width % step or min(height, width) < step:
        raise InputError(f"size: found {width}x{height}, expected multiples of {step}")
    if config.fusion != "none" and frames != config.num_frames:
        raise InputError(f"frames: found {frames}, but this checkpoint's fusion was trained for {config.num_frames}; leave --frames out")
    if frames < 1:
        raise InputError(f"frames: found {frames}, expected at least 1")
    return dataclasses.replace(config, num_frames=frames, height=height, width=width)


def _checkpoint_files(source: Path) -> list[Path]:
    parts = ("text_encoder", "tokenizer", "vae", "unet", "fusion")
    return [source / "trip_config.json", *sorted(path for part in parts for path in (source / part).iterdir() if path.is_file())]


def _key(component: Component, model: TripModel, hashes: dict[str, str], versions: dict[str, str]) -> str:
    """The hash of everything a component's engine is built from."""
    ingredients = {
        "name": component.name,
        "weights": {name: digest for name, digest in hashes.items() if name.split("/")[0] in component.parts},
        "inputs": {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in component.inputs.items()},
        "config": to_json(model.config),
        "versions": versions,
        "precision": PRECISION,
        "opset": OPSET,
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def _reusable(path: Path, spec: EngineSpec | None, key: str) -> EngineSpec | None:
    """The finished engine at `path`, if it is whole: as its manifest says, or, left by a cut-short export, checked anew."""
    if not path.is_file():
        return None
    if spec is None:
        return finish_onnx_engine(path, path, key, PRECISION)
    return spec if file_sha256(path) == spec.sha256 else None


def _previous(bundle: Path) -> Manifest | None:
    try:
        return read_manifest(bundle)
    except InputError:
        return None  # none yet, or one that is replaced now


@contextlib.contextmanager
def _locked(bundle: Path) -> Iterator[None]:
    """Hold the bundle folder alone; what a killed export left in it is removed."""
    try:
        bundle.mkdir(parents=True, exist_ok=True)
        handle = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"{bundle}: cannot be a bundle's folder ({error.strerror}); choose another place") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{bundle}: another export is writing here; wait for it or choose another folder") from error
        for leftover in bundle.glob(f"{_DRAFT}*"):
            shutil.rmtree(leftover)
        yield
    finally:
        os.close(handle)


def _write(draft: Path, bundle: Path, name: str, data: bytes) -> None:
    (draft / name).write_bytes(data)
    os.replace(draft / name, bundle / name)


def _remove_unreferenced(bundle: Path, files: set[str]) -> None:
    for path in bundle.glob("*.onnx"):
        if path.name not in files:
            path.unlink()
