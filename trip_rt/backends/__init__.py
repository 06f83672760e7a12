"""The engine libraries, behind one interface; none is imported before one of its engines is opened."""

from __future__ import annotations

import importlib

from trip_rt.backends.base import Engine, EngineOptions
from trip_rt.components import REQUIRED
from trip_rt.devices import Kind
from trip_rt.errors import InputError
from trip_rt.manifest import Profile

# name: (module, class), in `auto`'s order of preference on the same kind of device.
_BACKENDS = {
    "tensorrt-rtx": ("trip_rt.backends.tensorrt_rtx", "TensorRTRTXEngine"),
    "tensorrt": ("trip_rt.backends.tensorrt", "TensorRTEngine"),
    "openvino": ("trip_rt.backends.openvino", "OpenVINOEngine"),
    "onnxruntime": ("trip_rt.backends.onnxruntime", "OnnxRuntimeEngine"),
    "inductor": ("trip_rt.backends.inductor", "InductorEngine"),
}
NAMES = tuple(_BACKENDS)
# Their engines are native code that runs with the process's own rights: a hash says that a file is the one meant, not
# that it means well.
ONLY_BY_NAME = ("inductor",)
__all__ = ["NAMES", "Engine", "EngineOptions", "choose", "engine_class"]


def choose(profile: Profile, backend: str = "auto", options: EngineOptions | None = None) -> tuple[str, str]:
    """The backend to use and why; InputError where the bundle or the machine lacks it.

    `auto` takes one that runs on a GPU here before one that runs on the CPU, and passes over those whose engines are
    native code.
    """
    options = options or EngineOptions()
    in_bundle = [name for name in _BACKENDS if name in profile.backends]
    if backend != "auto":
        if backend not in _BACKENDS:
            raise InputError(f"backend: found {backend!r}, expected auto, {', '.join(_BACKENDS)}")
        if backend not in in_bundle:
            raise InputError(
                f"backend: the bundle has engines for {', '.join(in_bundle) or 'none'}, not for {backend}; export it"
                f" with --backend {backend} --add"
            )
        return backend, f"asked for, on {_probe(profile, backend, options)}"
    devices: dict[str, Kind] = {}
    refused: dict[str, str] = {}
    for name in in_bundle:
        if name in ONLY_BY_NAME:
            refused[name] = f"{name}: its engines are native code; trust the bundle and ask for it by name"
            continue
        try:
            devices[name] = _probe(profile, name, options)
        except InputError as error:
            refused[name] = str(error)
    if not devices:
        raise InputError(
            "backend: no engine of the bundle can run here"
            f" ({'; '.join(refused.values()) or 'it has none of a known backend'})"
        )
    best = min(devices, key=lambda name: devices[name] != "cuda")  # the first of the best kind of device
    others = [f"{name} could run too, on {devices[name]}" for name in devices if name != best]
    return best, "; ".join([f"auto, on {devices[best]}", *others, *refused.values()])


def engine_class(backend: str) -> type[Engine]:
    """The Engine class of a backend named by `choose`."""
    module, name = _BACKENDS[backend]
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _probe(profile: Profile, backend: str, options: EngineOptions) -> Kind:
    for component in REQUIRED:
        device = engine_class(backend).probe(profile.engines[component][backend], options)
    return device
