"""`trip-export --check`: what of a bundle can run on this machine, and does it still agree with the PyTorch model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trip_engines.emulation import EmulatedEngine
from trip_engines.lowered import EmulatedBf16Engine
from trip_engines.parity import Parity, measure
from trip_engines.recording import Reference
from trip_rt.animator import Animator
from trip_rt.arithmetic import LESS, parity_name
from trip_rt.backends import EngineOptions, engine_class
from trip_rt.bundle import Bundle, open_bundle
from trip_rt.components import REQUIRED
from trip_rt.errors import InputError
from trip_rt.manifest import Profile
from trip_rt.sampling.step import Arithmetic

_EMULATION = "an emulation of {0} on a CPU (fp32 sums, every {0} value rounded)"


def check_bundle(
    folder: Path, note: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, Parity], dict[str, str]]:
    """Verify every file of the bundle, open every engine that this machine can run, and compare each backend with the
    recorded reference.

    Returns parity by `profile backend`, and the reasons for what could not be compared. InputError for a bundle that is
    not whole.
    """
    bundle = open_bundle(folder)
    note(f"{folder}: {len(bundle.manifest.files)} files are as the manifest says")
    parity: dict[str, Parity] = {}
    refused: dict[str, str] = {}
    for profile in bundle.manifest.profiles:
        reference = Reference.load(folder / profile.reference) if profile.reference else None
        for backend in profile.backends:
            for arithmetic in _offered(profile, backend):
                name = f"{profile.name} {backend if arithmetic == 'own' else parity_name(backend, arithmetic)}"
                try:
                    animator, measured_on = animator_for(bundle, profile, backend, arithmetic)
                except InputError as error:
                    refused[name] = str(error)
                    continue
                with animator:
                    if reference is None:
                        refused[name] = (
                            "opened, but the bundle has no recorded reference; export it without --parity-steps 0"
                        )
                        continue
                    note(f"{name}: measuring {reference.num_inference_steps} steps on {measured_on}")
                    precision = precision_of(profile, backend) if arithmetic == "own" else arithmetic
                    parity[name] = measure(animator, reference, precision, measured_on, arithmetic)
    return parity, refused


def _offered(profile: Profile, backend: str) -> list[Arithmetic]:
    """What a runtime may compute in on these engines: what was not close enough at export it does not take."""
    less = [one for one in LESS if profile.parity.get(parity_name(backend, one), {}).get("passed")]
    return ["own", *less]


def animator_for(
    bundle: Bundle, profile: Profile, backend: str, arithmetic: Arithmetic = "own"
) -> tuple[Animator, str]:
    """An Animator to measure parity on, and what it runs on: the backend itself or, for half precision that ONNX
    Runtime has no arithmetic for on a CPU, an emulation of it, which is stricter than the casts to fp32 by which ONNX
    Runtime would run it. InputError where they cannot compute so."""
    precision = precision_of(profile, backend)
    if arithmetic == "bf16" and backend == EmulatedBf16Engine.backend and not engine_class(backend).lowers():
        return Animator(bundle, EmulatedBf16Engine, profile.name), _EMULATION.format("bf16")
    # ONNX Runtime rewrites what surrounds fp8, and the result is wrong.
    if backend == "onnxruntime" and (arithmetic == "fp8" or (precision != "fp32" and not _on_gpu(profile))):
        emulated = [name for name in (precision, arithmetic) if name not in ("fp32", "own")]
        return Animator(bundle, EmulatedEngine, profile.name), _EMULATION.format(" and ".join(emulated))
    animator = Animator(bundle, backend, profile.name)
    about = animator.describe()
    if arithmetic != "own":
        try:
            animator.arithmetic(arithmetic)
        except InputError:
            animator.close()
            raise
    computes_in = about.get("arithmetic") if arithmetic == "own" else arithmetic
    said = f" in {computes_in} arithmetic" if computes_in else ""
    return animator, f"{about['backend']} {about['version']} on {about['device']}{said}"


def precision_of(profile: Profile, backend: str) -> str:
    """The precision of a backend's engines, which one export made together."""
    return next(profile.engines[component][backend].precision for component in REQUIRED)


def _on_gpu(profile: Profile) -> bool:
    try:
        return engine_class("onnxruntime").probe(profile.engines["unet"]["onnxruntime"], EngineOptions()) == "cuda"
    except InputError:
        return False
