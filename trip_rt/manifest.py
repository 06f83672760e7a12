"""The manifest: what a bundle says of itself. Its classes are its contract; what they do not allow is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from trip_rt.components import REQUIRED, Quantised, TensorSpec, signatures
from trip_rt.config import ControlConfig, Count, TripConfig, from_json, to_json
from trip_rt.errors import InputError

FORMAT_VERSION = 10

# Of a graph's input or output; several frames of 4K are below it. Nothing larger is set aside on a file's word.
MAX_TENSOR_BYTES = 1 << 30

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
FileName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")]
Name = Annotated[str, Meta(pattern=r"\A[A-Za-z_][A-Za-z0-9_]{0,99}\Z")]
Size = Annotated[int, Meta(ge=0)]
Tensors = Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=64)]


@dataclass(frozen=True)
class FileSpec:
    """A file of the bundle, by which any change of it shows."""

    sha256: Sha256
    bytes: Size


@dataclass(frozen=True)
class EngineSpec:
    """One component's engine for one backend.

    `files` are in the manifest's table: the backend opens the first; the others hold weights that the first refers to,
    and may be shared with other engines. `key` hashes all it was built from. `policy` says for people which parts were
    kept in fp32 and why. `target` holds what the machine must match before the engine is opened, in the backend's own
    words (versions, compute capability).
    """

    files: Annotated[tuple[FileName, ...], Meta(min_length=1, max_length=64)]
    key: Sha256
    precision: Precision
    policy: dict[str, Any]
    gflop: Annotated[float, Meta(ge=0)]
    target: dict[str, str]
    inputs: Tensors
    outputs: Tensors

    @property
    def file(self) -> str:
        return self.files[0]


@dataclass(frozen=True)
class Cubin:
    """A kernel's machine code for one compute capability and how it is launched: a program of `warps` warps with
    `shared_bytes` of shared memory serves `pixels` pixels of a clip. `registers` a thread are for people."""

    file: FileName
    pixels: Annotated[int, Meta(ge=1, le=1024)]
    warps: Annotated[int, Meta(ge=1, le=32)]
    shared_bytes: Annotated[int, Meta(ge=0, le=256 << 10)]
    registers: Annotated[int, Meta(ge=1, le=255)]


@dataclass(frozen=True)
class KernelSpec:
    """The fused step after the UNet, compiled for several GPUs.

    `entry` is the function's name in every cubin. `parameters` are its own in order: names of the loop's buffers, of
    integers that the loop knows, "weights" for the file of that name, or "scratch" for a null pointer, which the
    compiler asks for.
    """

    key: Sha256
    entry: Name
    parameters: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=64)]
    cubins: Annotated[
        dict[Annotated[str, Meta(pattern=r"\A[0-9]{1,2}\.[0-9]\Z")], Cubin], Meta(min_length=1, max_length=64)
    ]
    weights: FileName

    @property
    def files(self) -> tuple[str, ...]:
        return self.weights, *(cubin.file for cubin in self.cubins.values())


@dataclass(frozen=True)
class Profile:
    """Engines of one set of static shapes: `engines[component][backend]`, run on `batch` clips and decoding
    `decode_frames` frames at a time.

    `context_width`: how many numbers the keys and values of all cross-attentions take for a token. `features_shape`: of
    one clip's deep features in the UNet, [F', C', h, w]. `kernels[precision]` is the fused step for GPUs beside UNets
    of that precision; there may be none. `reference` is a file of the PyTorch model's own inputs and outputs, or ""
    where none were recorded; `parity[backend]` are the figures measured against it at export, and `parity[backend in
    bf16]`, `parity[backend in int8]` and `parity[backend in fp8]` those of UNets that compute so. Steps from timestep
    `quantised_from["int8"]` on may be the int8 UNets', where there are some; so for fp8.
    """

    num_frames: Count
    height: Count
    width: Count
    batch: Count
    decode_frames: Count
    context_width: Count
    features_shape: tuple[Count, Count, Count, Count]
    engines: dict[str, Annotated[dict[str, EngineSpec], Meta(min_length=1)]]
    kernels: dict[Precision, KernelSpec]
    reference: Annotated[str, Meta(pattern=r"\A([A-Za-z0-9][A-Za-z0-9._-]{0,199})?\Z")]
    parity: dict[str, dict[str, Any]]
    quantised_from: dict[Quantised, Size] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Such as 256x256-16f-b1: width, height, frames, batch."""
        return f"{self.width}x{self.height}-{self.num_frames}f-b{self.batch}"

    @property
    def backends(self) -> list[str]:
        """Those that have an engine for every required component."""
        names = dict.fromkeys(name for engines in self.engines.values() for name in engines)
        return [name for name in names if all(name in self.engines.get(component, {}) for component in REQUIRED)]


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds: the model's config, how many token ids its text encoder knows (`vocabulary`), a profile for
    each set of shapes (the first is the default), and a table of all its files. `built_with` (package versions) and
    `source` (hashes of the checkpoint's files) are for people and for the next export. `control` is that of a bundle
    whose UNets take one."""

    config: TripConfig
    vocabulary: Count
    profiles: Annotated[tuple[Profile, ...], Meta(min_length=1, max_length=64)]
    files: dict[FileName, FileSpec]
    built_with: dict[str, str]
    source: dict[str, str]
    control: ControlConfig | None = None

    def profile(self, name: str | None = None) -> Profile:
        """The profile of that name, or the default; InputError where there is none such."""
        for profile in self.profiles:
            if name in (None, profile.name):
                return profile
        names = ", ".join(profile.name for profile in self.profiles)
        raise InputError(f"profile: found {name!r}, the bundle has {names}; export that one with --add")

    def engine_specs(self) -> Iterator[EngineSpec]:
        """Every engine of every profile."""
        for profile in self.profiles:
            for engines in profile.engines.values():
                yield from engines.values()

    def kernel_specs(self) -> Iterator[KernelSpec]:
        """Every kernel of every profile."""
        for profile in self.profiles:
            yield from profile.kernels.values()

    def config_of(self, profile: Profile) -> TripConfig:
        """The model's config with the profile's shapes."""
        return dataclasses.replace(
            self.config, num_frames=profile.num_frames, height=profile.height, width=profile.width
        )


def serialise(manifest: Manifest) -> bytes:
    """The manifest's file: one canonical form, closed by the SHA-256 of the rest, so that any changed byte shows."""
    body = {"format_version": FORMAT_VERSION} | to_json(manifest)
    return _canonical(body | {"manifest_sha256": _sha256(_canonical(body))})


def parse(raw: bytes, where: str) -> Manifest:
    """The manifest in `raw`; InputError for anything that `serialise` would not have written, `where` naming the
    file."""
    again = "export the bundle again"
    try:
        body = json.loads(raw)
        version = body.pop("format_version")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: damaged, it is not a manifest; {again}") from error
    if type(version) is int and version > FORMAT_VERSION:
        raise InputError(
            f"{where}: found format version {version}, this trip-rt reads up to {FORMAT_VERSION}; upgrade trip-rt or "
            "export again"
        )
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(f"{where}: found format version {version!r}, expected {FORMAT_VERSION}; {again}")
    digest = body.pop("manifest_sha256", None)
    if not _is_intact(body | {"format_version": version}, digest, raw):
        raise InputError(f"{where}: damaged, its contents and its own hash differ; {again}")
    manifest = from_json(Manifest, body, where, again)
    if serialise(manifest) != raw:  # such as a whole number in place of a float
        raise InputError(f"{where}: found values in another form than trip-rt writes; {again}")
    _check_consistent(manifest, where)
    return manifest


def _check_consistent(manifest: Manifest, where: str) -> None:
    """What types cannot say: files that engines speak of are in the table, and engines have the tensors that the loop
    will hand them."""
    again = "export the bundle again"
    names = [profile.name for profile in manifest.profiles]
    if len(set(names)) < len(names):
        raise InputError(f"{where}: found two profiles of one name among {', '.join(names)}; {again}")
    for profile in manifest.profiles:
        required = (*REQUIRED, *(("control_encoder",) if manifest.control else ()))
        if lacking := [name for name in required if name not in profile.engines]:
            raise InputError(f"{where}: found no engine of {', '.join(lacking)} for {profile.name}; {again}")
        for engines in profile.engines.values():
            for spec in engines.values():
                for tensor in (*spec.inputs, *spec.outputs):
                    if tensor.nbytes > MAX_TENSOR_BYTES:
                        raise InputError(
                            f"{where}: found the tensor {tensor.name[:100]} of {tensor.nbytes >> 20} MB, expected at"
                            f" most {MAX_TENSOR_BYTES >> 20} MB; {again}"
                        )
        try:
            config = manifest.config_of(profile)
        except InputError as error:
            raise InputError(f"{where}: {profile.name}: {error}; {again}") from error
        expected = signatures(
            config,
            profile.batch,
            profile.decode_frames,
            profile.context_width,
            profile.features_shape,
            manifest.control,
        )
        if unknown := [name for name in profile.engines if name not in expected]:
            raise InputError(f"{where}: found the unknown component {unknown[0][:100]!r}; {again}")
        mentioned = {"tokenizer.json", profile.reference} - {""}
        for component, engines in profile.engines.items():
            for backend, spec in engines.items():
                mentioned.update(spec.files)
                for actual, wanted in zip((spec.inputs, spec.outputs), expected[component], strict=True):
                    if sorted(actual, key=_name) != sorted(wanted, key=_name):
                        raise InputError(
                            f"{where}: {component} for {backend} has tensors that are not this model's of "
                            f"{profile.name}; {again}"
                        )
        mentioned.update(name for kernel in profile.kernels.values() for name in kernel.files)
        if missing := sorted(mentioned - set(manifest.files)):
            raise InputError(f"{where}: speaks of {', '.join(missing)[:200]}, which its table of files lacks; {again}")


def _name(tensor: TensorSpec) -> str:
    return tensor.name


def _is_intact(body: dict[str, Any], digest: Any, raw: bytes) -> bool:
    try:
        whole = body if digest is None else body | {"manifest_sha256": digest}
        return raw == _canonical(whole) and digest == _sha256(_canonical(body))
    except (RecursionError, ValueError):  # writing JSON recurses deeper than reading it; NaN and Infinity are no JSON
        return False


def _canonical(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
