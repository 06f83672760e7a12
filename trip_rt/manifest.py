"""The manifest: what a bundle says of itself. `manifest.schema.json` is its contract; what is not written there is
refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from trip_rt.config import TripConfig, from_json, to_json
from trip_rt.errors import InputError

FORMAT_VERSION = 4
COMPONENTS = ("text_encoder", "text_projection", "vae_encoder", "unet", "tnf", "vae_decoder")
# Parts of those that a bundle may hold besides, for steps without guidance and steps that reuse deep features
# (speed.py).
SPEEDUPS = ("unet_shallow", "unet_unguided", "unet_unguided_shallow", "tnf_unguided")


@dataclass(frozen=True)
class FileSpec:
    """A file of the bundle, by which any change of it shows."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype and static shape of an engine's input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EngineSpec:
    """One component's engine for one backend.

    `files` are in the manifest's table: the first is what the backend opens, the others are what that one refers to
    (weights), and may be shared with other engines. `key` hashes all it was built from. `precision` is fp32, fp16 or
    bf16 and `policy` says for people which parts were kept in fp32 and why. `target` holds what the machine must match
    before the engine is opened, in the backend's own words (versions, compute capability).
    """

    files: tuple[str, ...]
    key: str
    precision: str
    policy: Mapping[str, Any]
    gflop: float
    target: Mapping[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def file(self) -> str:
        return self.files[0]


@dataclass(frozen=True)
class Cubin:
    """A kernel's machine code for one compute capability and how it is launched: a program of `warps` warps with
    `shared_bytes` of shared memory serves `pixels` pixels of a clip. `registers` a thread are for people."""

    file: str
    pixels: int
    warps: int
    shared_bytes: int
    registers: int


@dataclass(frozen=True)
class KernelSpec:
    """The fused step after the UNet, compiled for several GPUs.

    `entry` is the function's name in every cubin. `parameters` are its own in order: names of the loop's buffers, of
    integers that the loop knows, or of `tensors`, which says at what byte of the file `weights` each begins; "scratch"
    stands for a null pointer, which the compiler asks for.
    """

    key: str
    entry: str
    parameters: tuple[str, ...]
    cubins: Mapping[str, Cubin]
    weights: str
    tensors: Mapping[str, int]

    @property
    def files(self) -> tuple[str, ...]:
        return self.weights, *(cubin.file for cubin in self.cubins.values())


@dataclass(frozen=True)
class Profile:
    """Engines of one set of static shapes: `engines[component][backend]`, run on `batch` clips and decoding
    `decode_frames` frames at a time.

    `context_width`: numbers that all cross-attentions' keys and values of a token take. `features_shape`: of one clip's
    deep features in the UNet. `kernels[precision]` is the fused step for GPUs beside UNets of that precision; there may
    be none. `reference` is a file of the PyTorch model's own inputs and outputs, or "" where none were recorded;
    `parity[backend]` are the figures measured against it at export.
    """

    num_frames: int
    height: int
    width: int
    batch: int
    decode_frames: int
    context_width: int
    features_shape: tuple[int, ...]
    engines: Mapping[str, Mapping[str, EngineSpec]]
    kernels: Mapping[str, KernelSpec]
    reference: str
    parity: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Such as 256x256-16f-b1: width, height, frames, batch."""
        return f"{self.width}x{self.height}-{self.num_frames}f-b{self.batch}"

    @property
    def backends(self) -> list[str]:
        """Those that have an engine for every component."""
        names = dict.fromkeys(name for engines in self.engines.values() for name in engines)
        return [name for name in names if all(name in self.engines.get(component, {}) for component in COMPONENTS)]


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds: the model's config, a profile for each set of shapes (the first is the default), and a table
    of all its files.

    `built_with` (package versions) and `source` (hashes of the checkpoint's files) are for people and for the next
    export.
    """

    config: TripConfig
    profiles: tuple[Profile, ...]
    files: Mapping[str, FileSpec]
    built_with: Mapping[str, str]
    source: Mapping[str, str]

    def profile(self, name: str | None = None) -> Profile:
        """The profile of that name, or the default; InputError where there is none such."""
        for profile in self.profiles:
            if name in (None, profile.name):
                return profile
        raise InputError(
            f"profile: found {name!r}, the bundle has {', '.join(p.name for p in self.profiles)}; export that one with"
            " --add"
        )

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


Signature = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]


def tensors(
    config: TripConfig, batch: int, decode_frames: int, context_width: int, features_shape: tuple[int, ...]
) -> dict[str, Signature]:
    """Inputs and outputs of every component's graph, for a config of the profile's shapes: the loop's tensors hold
    2·batch clips, the unconditional half first, those of `_unguided` graphs the conditional half alone."""
    channels, height, width = config.latent_channels, config.latent_height, config.latent_width

    def f32(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, "float32", shape)

    def denoising(clips: int) -> tuple[Signature, Signature, Signature]:
        latents = f32("latents", clips, channels, config.num_frames, height, width)
        first_frame = f32("first_frame", clips, channels, height, width)
        residual, noise = (dataclasses.replace(latents, name=name) for name in ("residual_noise", "noise"))
        timestep = TensorSpec("timestep", "int64", (1,))
        context, features = (
            f32("context", clips, config.text_length, context_width),
            f32("features", clips, *features_shape),
        )
        unet, coefficients = (
            (latents, first_frame, timestep, context),
            (f32("sqrt_alpha_bar", 1), f32("sqrt_one_minus_alpha_bar", 1)),
        )
        tnf = (latents, first_frame, residual, *coefficients, timestep)
        return (unet, (residual, features)), ((*unet, features), (residual,)), (tnf, (noise,))

    input_ids = TensorSpec("input_ids", "int64", (batch, config.text_length))
    text = f32("text", 2 * batch, config.text_length, config.text_width)
    of_both, of_conditional = (
        ("unet", "unet_shallow", "tnf"),
        ("unet_unguided", "unet_unguided_shallow", "tnf_unguided"),
    )
    return {
        "text_encoder": ((input_ids,), (f32("text", batch, config.text_length, config.text_width),)),
        "text_projection": ((text,), (f32("context", 2 * batch, config.text_length, context_width),)),
        "vae_encoder": (
            (f32("image", batch, 3, config.height, config.width),),
            (f32("latent", batch, channels, height, width),),
        ),
        "vae_decoder": (
            (f32("latents", decode_frames, channels, height, width),),
            (f32("image", decode_frames, 3, config.height, config.width),),
        ),
        **dict(zip(of_both, denoising(2 * batch), strict=True)),
        **dict(zip(of_conditional, denoising(batch), strict=True)),
    }


def serialise(manifest: Manifest) -> bytes:
    """The manifest's file: one canonical form, closed by the SHA-256 of the rest, so that any changed byte shows."""
    body = {"format_version": FORMAT_VERSION} | to_json(manifest)
    return _canonical(body | {"manifest_sha256": _sha256(_canonical(body))})


def parse(raw: bytes, where: str) -> Manifest:
    """The manifest in `raw`; InputError for anything that `serialise` would not have written, `where` naming
    the file."""
    try:
        body = json.loads(raw)
        version = body["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: damaged, it is not a manifest; export the bundle again") from error
    if type(version) is int and version > FORMAT_VERSION:
        raise InputError(
            f"{where}: found format version {version}, this trip-rt reads up to {FORMAT_VERSION}; upgrade trip-rt or"
            " export again"
        )
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            f"{where}: found format version {version!r}, expected {FORMAT_VERSION}; export the bundle again"
        )
    if not _is_intact(body, raw):
        raise InputError(f"{where}: damaged, its contents and its own hash differ; export the bundle again")
    if wrong := next(_validator().iter_errors(body), None):
        place = "/".join(map(str, wrong.absolute_path)) or "manifest"
        raise InputError(
            f"{where}: not a manifest of format {FORMAT_VERSION} ({place}: {wrong.message[:200]}); export the bundle"
            " again"
        )
    manifest = Manifest(
        config=from_json(TripConfig, body["config"], where),
        profiles=tuple(_profile(profile) for profile in body["profiles"]),
        files={name: FileSpec(**spec) for name, spec in body["files"].items()},
        built_with=body["built_with"],
        source=body["source"],
    )
    _check_consistent(manifest, where)
    return manifest


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of manifest.json."""
    return json.loads(resources.files("trip_rt").joinpath("manifest.schema.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(schema())


def _profile(data: dict[str, Any]) -> Profile:
    engines = {
        component: {backend: engine_spec(spec) for backend, spec in specs.items()}
        for component, specs in data["engines"].items()
    }
    kernels = {precision: kernel_spec(spec) for precision, spec in data["kernels"].items()}
    return Profile(**(data | {"engines": engines, "kernels": kernels, "features_shape": tuple(data["features_shape"])}))


def kernel_spec(data: dict[str, Any]) -> KernelSpec:
    """A KernelSpec out of its JSON, which has passed the schema."""
    cubins = {capability: Cubin(**cubin) for capability, cubin in data["cubins"].items()}
    return KernelSpec(**(data | {"parameters": tuple(data["parameters"]), "cubins": cubins}))


def engine_spec(data: dict[str, Any]) -> EngineSpec:
    """An EngineSpec out of its JSON, which has passed the schema."""
    sides = {
        side: tuple(TensorSpec(**(tensor | {"shape": tuple(tensor["shape"])})) for tensor in data[side])
        for side in ("inputs", "outputs")
    }
    return EngineSpec(**(data | sides | {"files": tuple(data["files"])}))


def _check_consistent(manifest: Manifest, where: str) -> None:
    """What a schema cannot say: files that engines speak of are in the table, and engines have the tensors that the
    loop will hand them."""
    again = "export the bundle again"
    names = [profile.name for profile in manifest.profiles]
    if len(set(names)) < len(names):
        raise InputError(f"{where}: found two profiles of one name among {', '.join(names)}; {again}")
    for profile in manifest.profiles:
        expected = tensors(
            manifest.config_of(profile),
            profile.batch,
            profile.decode_frames,
            profile.context_width,
            profile.features_shape,
        )
        spoken_of = {"tokenizer.json", profile.reference} - {""}
        for component, engines in profile.engines.items():
            for backend, spec in engines.items():
                spoken_of.update(spec.files)
                for found, wanted in zip((spec.inputs, spec.outputs), expected[component], strict=True):
                    if sorted(found, key=_name) != sorted(wanted, key=_name):
                        raise InputError(
                            f"{where}: {component} for {backend} has tensors that are not this model's of"
                            f" {profile.name}; {again}"
                        )
        spoken_of.update(name for kernel in profile.kernels.values() for name in kernel.files)
        if missing := sorted(spoken_of - set(manifest.files)):
            raise InputError(f"{where}: speaks of {', '.join(missing)[:200]}, which its table of files lacks; {again}")
        for kernel in profile.kernels.values():
            if outside := [
                name for name, start in kernel.tensors.items() if start >= manifest.files[kernel.weights].bytes
            ]:
                raise InputError(f"{where}: the kernel's {outside[0]} begins outside of {kernel.weights}; {again}")


def _name(tensor: TensorSpec) -> str:
    return tensor.name


def _is_intact(body: dict[str, Any], raw: bytes) -> bool:
    rest = {name: value for name, value in body.items() if name != "manifest_sha256"}
    try:
        return raw == _canonical(body) and body.get("manifest_sha256") == _sha256(_canonical(rest))
    except (RecursionError, ValueError):  # writing JSON recurses deeper than reading it; NaN and Infinity are no JSON
        return False


def _canonical(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
