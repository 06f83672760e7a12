"""A checkpoint to a bundle: build the engines that are new, reuse those that are not, measure parity, and write the manifest last."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import no_grad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from trip_engines.check import animator_for
from trip_engines.onnx_engine import finish_onnx_engine, to_precision
from trip_engines.parity import Parity, measure
from trip_engines.reference import Reference, Sample
from trip_engines.tensorrt_build import BuildOptions, build_engine, cache_key
from trip_engines.tensorrt_operators import unsupported
from trip_export.components import PARTS, Component, component, default_decode_frames
from trip_export.onnx_export import OPSET, export_onnx
from trip_export.recording import record
from trip_reference import checkpoint
from trip_rt.bundle import MANIFEST, TOKENIZER, Bundle, file_sha256, file_spec, read_manifest
from trip_rt.config import TripConfig, to_json
from trip_rt.errors import InputError
from trip_rt.manifest import COMPONENTS, EngineSpec, FileSpec, Manifest, Profile, engine_spec, serialise, tensors

BACKENDS = ("onnxruntime", "openvino", "tensorrt", "inductor")
PRECISIONS = ("fp32", "fp16", "bf16")
_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime")
_DRAFT = ".exporting-"
_FINISHED = ".finished-"


@dataclass(frozen=True)
class ExportOptions:
    """What to export: engines for `backends` in `precision`, run on `batch` clips of `frames` frames of `size` (height, width), by default the
    checkpoint's.

    `add` keeps what the bundle already holds of the same checkpoint. `parity_steps` is how many denoising steps parity compares (the model's own
    number by default; 0: none). `device` is what inductor compiles for.
    """

    backends: tuple[str, ...] = ("onnxruntime",)
    precision: str = "fp32"
    batch: int = 1
    frames: int | None = None
    size: tuple[int, int] | None = None
    add: bool = False
    parity_steps: int | None = None
    device: str = "cpu"
    tensorrt: BuildOptions = field(default_factory=BuildOptions)


@dataclass(frozen=True)
class ExportResult:
    """What an export did: seconds spent on each engine built, the ones reused, each traced graph's operators before and after simplification and what
    of them TensorRT lacks, and the parity of each backend."""

    bundle: Path
    profile: str
    seconds: dict[str, float]
    reused: list[str]
    operators: dict[str, tuple[Counter[str], Counter[str]]]
    unsupported: dict[str, list[str]]
    parity: dict[str, Parity]


def export_bundle(source: Path, bundle: Path, options: ExportOptions | None = None, note: Callable[[str], None] = lambda text: None) -> ExportResult:
    """Export checkpoint `source` to the folder `bundle`.

    Files are named after the hash of all they are built from, so a new one never overwrites one that the present manifest speaks of: the folder is a
    whole bundle, the old or the new, at every moment, and a rerun takes up what a cut-short one finished. Components are loaded one at a time.
    InputError for an unusable checkpoint, shape or folder, or a backend that cannot be built for here.
    """
    options = options or ExportOptions()
    plan = _Plan(source, options)
    with _locked(bundle), tempfile.TemporaryDirectory(dir=bundle, prefix=_DRAFT) as draft:
        return _Export(plan, bundle, Path(draft), note).run()


class _Plan:
    """The checkpoint and what is asked of it, checked before any slow work."""

    def __init__(self, source: Path, options: ExportOptions):
        self.source, self.options = source, options
        self.checkpoint_config = checkpoint.load_config(source)
        self.config = _with_shapes(source, self.checkpoint_config, options)
        for name, found, expected in (("precision", options.precision, PRECISIONS), *(("backend", name, BACKENDS) for name in options.backends)):
            if found not in expected:
                raise InputError(f"{name}: found {found!r}, expected one of {', '.join(expected)}")
        if options.batch < 1:
            raise InputError(f"batch: found {options.batch}, expected at least 1")
        self.decode_frames = default_decode_frames(self.config)
        self.steps = self.config.num_inference_steps if options.parity_steps is None else options.parity_steps
        if not 0 <= self.steps <= self.config.schedule.num_train_timesteps:
            raise InputError(f"parity steps: found {self.steps}, expected 0 to {self.config.schedule.num_train_timesteps}")
        if self.steps == 0 and options.precision != "fp32":
            raise InputError(f"parity steps: found 0, expected at least 1, since {options.precision} is chosen by measured error")
        if "tensorrt" in options.backends:
            self.tensorrt = cache_key(options.tensorrt)
        if "inductor" in options.backends:
            from trip_export.inductor_export import target_for

            self.inductor = target_for(options.device)
        self.tokenizer_json = checkpoint.load_tokenizer_json(source)
        self.versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        self.hashes = {path.relative_to(source).as_posix(): file_sha256(path) for path in _checkpoint_files(source)}

    def key(self, **ingredients: Any) -> str:
        """The hash of everything a file is built from."""
        return hashlib.sha256(json.dumps(ingredients | {"versions": self.versions}, sort_keys=True).encode()).hexdigest()

    @cached_property
    def reference_key(self) -> str:
        shapes = [self.options.batch, self.decode_frames, self.steps]
        return self.key(weights=self.hashes, config=to_json(self.config), shapes=shapes) if self.steps else ""

    def ingredients(self, name: str) -> dict[str, Any]:
        """What every engine of a component depends on; not on shapes that it does not have, so that profiles share what they can."""
        shapeless = dataclasses.replace(self.config, num_frames=0, height=0, width=0)
        inputs, outputs = tensors(self.config, self.options.batch, self.decode_frames)[name]
        return {
            "name": name,
            "weights": {path: digest for path, digest in self.hashes.items() if path.startswith(f"{PARTS[name]}/")},
            "config": to_json(shapeless),
            "tensors": [to_json(tensor) for tensor in (*inputs, *outputs)],
            "precision": self.options.precision,
            "chosen_on": self.reference_key if self.options.precision != "fp32" else "",
        }


class _Export:
    """One run of an export, holding its bundle's lock."""

    def __init__(self, plan: _Plan, bundle: Path, draft: Path, note: Callable[[str], None]):
        self.plan, self.options, self.bundle, self.draft, self.note = plan, plan.options, bundle, draft, note
        self.previous = _previous(bundle)
        self.files: dict[str, FileSpec] = {}
        self.engines: dict[str, EngineSpec] = {}  # by key
        self.result = ExportResult(bundle, "", {}, [], {}, {}, {})

    def run(self) -> ExportResult:
        kept = self._kept()
        reference = f"reference-{self.plan.reference_key[:16]}.safetensors" if self.plan.steps else ""
        profile = Profile(
            num_frames=self.plan.config.num_frames,
            height=self.plan.config.height,
            width=self.plan.config.width,
            batch=self.options.batch,
            decode_frames=self.plan.decode_frames,
            engines={name: {backend: self._engine(name, backend) for backend in self.options.backends} for name in COMPONENTS},
            reference=reference,
            parity={},
        )
        before = next((other for other in kept if other.name == profile.name), None)
        if reference:
            _ = self.reference  # recorded, if nothing needed it yet
        self._write(TOKENIZER, self.plan.tokenizer_json.encode())
        if before:
            profile = dataclasses.replace(
                profile,
                engines={name: {**before.engines[name], **profile.engines[name]} for name in COMPONENTS},
                parity={backend: figures for backend, figures in before.parity.items() if before.reference == reference},
            )
        profiles = [profile if other.name == profile.name else other for other in kept]
        manifest = self._manifest(tuple(profiles if before else [*profiles, profile]))
        if reference:
            parity = {backend: self._parity(manifest, profile, backend) for backend in self.options.backends}
            self.result.parity.update(parity)
            figures = {**profile.parity, **{backend: measured.to_json() for backend, measured in parity.items()}}
            measured = dataclasses.replace(profile, parity=figures)
            manifest = dataclasses.replace(manifest, profiles=tuple(measured if p.name == profile.name else p for p in manifest.profiles))
        self._write(MANIFEST, serialise(manifest))
        _remove_unreferenced(self.bundle, {*manifest.files, MANIFEST})
        return dataclasses.replace(self.result, profile=profile.name)

    def _kept(self) -> list[Profile]:
        """The profiles that `add` keeps."""
        if not (self.options.add and self.previous):
            return []
        if (self.previous.config, self.previous.source) != (self.plan.checkpoint_config, self.plan.hashes):
            raise InputError(f"{self.bundle}: was made from another checkpoint than {self.plan.source}; export it without --add, or elsewhere")
        for profile in self.previous.profiles:
            names = {profile.reference, *(name for engines in profile.engines.values() for spec in engines.values() for name in spec.files)} - {""}
            self.files |= {name: self.previous.files[name] for name in names}
        return list(self.previous.profiles)

    def _manifest(self, profiles: tuple[Profile, ...]) -> Manifest:
        spoken_of = {TOKENIZER, *(profile.reference for profile in profiles)} - {""}
        for profile in profiles:
            spoken_of.update(name for engines in profile.engines.values() for spec in engines.values() for name in spec.files)
        return Manifest(
            config=self.plan.checkpoint_config,
            profiles=profiles,
            files={name: self.files[name] for name in spoken_of},
            built_with=self.plan.versions | {"python": platform.python_version()},
            source=self.plan.hashes,
        )

    def _engine(self, name: str, backend: str) -> EngineSpec:
        """The engine of a component for a backend, built if it has to be."""
        ingredients = self.plan.ingredients(name)
        if backend == "inductor":
            return self._reused_or_built(name, backend, self.plan.key(**ingredients, inductor=self.plan.inductor), self._build_inductor)
        key = self.plan.key(**ingredients, opset=OPSET)
        if backend == "tensorrt":
            return self._reused_or_built(name, backend, self.plan.key(onnx=key, tensorrt=self.plan.tensorrt), self._build_tensorrt)
        return self._reused_or_built(name, "onnx", key, self._build_onnx)  # ONNX Runtime and OpenVINO run the same file

    def _reused_or_built(self, name: str, kind: str, key: str, build: Callable[[str, str], EngineSpec]) -> EngineSpec:
        if key in self.engines:
            return self.engines[key]
        if spec := self._finished(key):
            self.engines[key] = spec
            self.result.reused.append(f"{name} ({kind})")
            self.note(f"{name} ({kind}): unchanged, reused")
            return spec
        began = time.monotonic()
        spec = self.engines[key] = build(name, key)
        self.files |= {file: file_spec(self.bundle / file) for file in spec.files}
        self._remember(spec)
        seconds = self.result.seconds[f"{name} ({kind})"] = round(time.monotonic() - began, 1)
        size = sum(self.files[file].bytes for file in spec.files) / 1e6
        self.note(f"{name} ({kind}): built in {seconds:.1f} s, {size:.1f} MB, {spec.gflop:.4g} GFLOP a call")
        return spec

    def _build_onnx(self, name: str, key: str) -> EngineSpec:
        graph, gflop = self._graph(name)
        graph, policy = to_precision(graph, self.options.precision, self._samples(name), lambda text: self.note(f"{name}: {text}"))
        files = finish_onnx_engine(graph, self.bundle / f"{name}-{key[:16]}.onnx")
        return self._spec(name, files, key, policy, gflop, {})

    def _build_tensorrt(self, name: str, key: str) -> EngineSpec:
        onnx = self._engine(name, "onnxruntime")
        if lacking := unsupported(self.bundle / onnx.file):
            raise InputError(f"{name}: TensorRT has no {'; '.join(lacking)[:200]}; export it for another backend")
        plan = self.bundle / f"{name}-{key[:16]}.plan"
        target = build_engine(self.bundle / onnx.file, plan, self.options.tensorrt, lambda text: self.note(f"{name}: {text}"))
        return self._spec(name, (plan.name,), key, dict(onnx.policy), onnx.gflop, target)

    def _build_inductor(self, name: str, key: str) -> EngineSpec:
        from trip_export.inductor_export import export_inductor

        part, gflop = self._component(name)
        package = self.bundle / f"{name}-{key[:16]}.pt2"
        target = export_inductor(part, package, self.options.precision, self.options.device)
        return self._spec(name, (package.name,), key, {}, gflop, target)

    def _spec(self, name: str, files: tuple[str, ...], key: str, policy: dict[str, Any], gflop: float, target: dict[str, str]) -> EngineSpec:
        inputs, outputs = tensors(self.plan.config, self.options.batch, self.plan.decode_frames)[name]
        return EngineSpec(files, key, self.options.precision, policy, gflop, target, inputs, outputs)

    def _graph(self, name: str) -> tuple[Path, float]:
        """The component's fp32 graph in the draft folder, its weights beside it, and its GFLOP a call."""
        part, gflop = self._component(name)
        graph = self.draft / f"{name}.onnx"
        before, after = export_onnx(part, graph)
        lacking = unsupported(graph)
        self.result.operators[name], self.result.unsupported[name] = (before, after), lacking
        self.note(
            f"{name}: {before.total()} operators traced, {after.total()} after simplification; {len(lacking) or 'none'} not in TensorRT's table"
        )
        return graph, gflop

    def _component(self, name: str) -> tuple[Component, float]:
        model = checkpoint.from_pretrained(self.plan.source, only=PARTS[name])
        model.config = self.plan.config
        part = component(model, name, self.options.batch, self.plan.decode_frames)
        with FakeTensorMode(allow_non_fake_inputs=True), no_grad(), FlopCounterMode(display=False) as counter:
            part.module(*part.inputs.values())
        return part, counter.get_total_flops() / 1e9

    def _samples(self, name: str) -> list[Sample]:
        return self.reference.samples[name] if self.options.precision != "fp32" else []

    @cached_property
    def reference(self) -> Reference:
        """The PyTorch model's own run, recorded once for a checkpoint and a set of shapes."""
        name = f"reference-{self.plan.reference_key[:16]}.safetensors"
        path = self.bundle / name
        with contextlib.suppress(InputError):
            reference = Reference.load(path, self.plan.reference_key)
            self.files[name] = file_spec(path)
            if not self.previous or self.previous.files.get(name, self.files[name]) == self.files[name]:
                self.note("reference run: unchanged, reused")
                return reference
        began = time.monotonic()
        self.note(f"reference run: {self.plan.steps} steps in PyTorch")
        model = checkpoint.from_pretrained(self.plan.source)
        model.config = self.plan.config
        reference = record(model, self.plan.tokenizer_json, self.options.batch, self.plan.decode_frames, self.plan.steps)
        del model
        gc.collect()
        reference.save(self.draft / name, self.plan.reference_key)
        (self.draft / name).chmod(0o644)  # safetensors writes for its owner alone
        os.replace(self.draft / name, path)
        self.files[name] = file_spec(path)
        self.note(f"reference run: recorded in {time.monotonic() - began:.1f} s")
        return reference

    def _parity(self, manifest: Manifest, profile: Profile, backend: str) -> Parity:
        """The parity of one backend: as measured before, where nothing it depends on has changed."""
        if self.previous:
            for before in self.previous.profiles:
                same = [before.engines[name].get(backend) == profile.engines[name][backend] for name in COMPONENTS]
                if before.name == profile.name and before.reference == profile.reference and all(same) and backend in before.parity:
                    self.note(f"parity of {backend}: unchanged, reused")
                    return Parity.from_json(dict(before.parity[backend]))
        self.note(f"parity of {backend}: measuring {self.plan.steps} steps")
        animator, measured_on = animator_for(Bundle(self.bundle, manifest, self.plan.tokenizer_json), profile, backend)
        with animator:
            return measure(animator, self.reference, self.options.precision, measured_on)

    def _finished(self, key: str) -> EngineSpec | None:
        """The engine of that key, if all its files are whole: one that the manifest speaks of, or one that a cut-short export left."""
        for spec, files in self._known():
            if spec.key == key and all((self.bundle / name).is_file() and file_spec(self.bundle / name) == files[name] for name in spec.files):
                self.files |= files
                return spec
        return None

    def _known(self) -> Iterator[tuple[EngineSpec, dict[str, FileSpec]]]:
        for profile in self.previous.profiles if self.previous else ():
            for engines in profile.engines.values():
                for spec in engines.values():
                    yield spec, {name: self.previous.files[name] for name in spec.files}  # type: ignore[union-attr]
        for path in self.bundle.glob(f"{_FINISHED}*"):
            left = json.loads(path.read_bytes())
            yield engine_spec(left["engine"]), {name: FileSpec(**spec) for name, spec in left["files"].items()}

    def _remember(self, spec: EngineSpec) -> None:
        """Leave word of a finished engine for the rerun, should this export be cut short before its manifest."""
        note = {"engine": to_json(spec), "files": {name: to_json(self.files[name]) for name in spec.files}}
        self._write(f"{_FINISHED}{spec.key[:16]}.json", json.dumps(note).encode())

    def _write(self, name: str, data: bytes) -> None:
        (self.draft / name).write_bytes(data)
        os.replace(self.draft / name, self.bundle / name)
        if name != MANIFEST:
            self.files[name] = FileSpec(hashlib.sha256(data).hexdigest(), len(data))


def _with_shapes(source: Path, config: TripConfig, options: ExportOptions) -> TripConfig:
    height, width = options.size or (config.height, config.width)
    frames = config.num_frames if options.frames is None else options.frames
    step = config.vae_scale_factor * checkpoint.latent_multiple(source)
    if height % step or width % step or min(height, width) < step:
        raise InputError(f"size: found {width}x{height}, expected multiples of {step}")
    if config.fusion != "none" and frames != config.num_frames:
        raise InputError(f"frames: found {frames}, but this checkpoint's fusion was trained for {config.num_frames}; leave --frames out")
    if frames < 1:
        raise InputError(f"frames: found {frames}, expected at least 1")
    return dataclasses.replace(config, num_frames=frames, height=height, width=width)


def _checkpoint_files(source: Path) -> list[Path]:
    parts = ("text_encoder", "tokenizer", "vae", "unet", "fusion")
    return [source / "trip_config.json", *sorted(path for part in parts for path in (source / part).glob("*") if path.is_file())]


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


def _remove_unreferenced(bundle: Path, files: set[str]) -> None:
    """Remove engines of earlier exports and the word left of finished ones; anything else in the folder is not ours."""
    for pattern in ("*.onnx", "*.weights", "*.plan", "*.pt2", "reference-*.safetensors", f"{_FINISHED}*"):
        for path in bundle.glob(pattern):
            if path.name not in files:
                path.unlink()
