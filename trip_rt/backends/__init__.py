"""The engine libraries, behind one interface; none is imported before one of its engines is opened."""

from __future__ import annotations

import importlib
import importlib.util

from trip_rt.backends.base import Engine
from trip_rt.bundle import COMPONENTS, Manifest
from trip_rt.errors import InputError

# name: (module, class, library to look for); the order is `auto`'s preference.
_BACKENDS = {"onnxruntime": ("trip_rt.backends.onnxruntime", "OnnxRuntimeEngine", "onnxruntime")}
NAMES = tuple(_BACKENDS)
__all__ = ["NAMES", "Engine", "choose", "engine_class"]


def choose(manifest: Manifest, backend: str = "auto") -> tuple[str, str]:
    """The backend to use and why; InputError where the bundle or the machine lacks it."""
    in_bundle = [name for name in _BACKENDS if all(name in manifest.engines[component] for component in COMPONENTS)]
    if backend != "auto":
        if backend not in _BACKENDS:
            raise InputError(f"backend: found {backend!r}, expected auto, {', '.join(_BACKENDS)}")
        if backend not in in_bundle:
            raise InputError(
                f"backend: the bundle has engines for {', '.join(in_bundle) or 'none'}, not for {backend}; export it with --backend {backend}"
            )
        return backend, "asked for"
    for name in in_bundle:
        if importlib.util.find_spec(_BACKENDS[name][2]):
            return name, f"first of {', '.join(in_bundle)} (in the bundle) whose library is installed"
    wanted = ", ".join(_BACKENDS[name][2] for name in in_bundle)
    raise InputError(
        f"backend: the bundle has engines for {', '.join(in_bundle) or 'no known backend'}; install one of: {wanted or 'a newer trip-rt'}"
    )


def engine_class(backend: str) -> type[Engine]:
    """The Engine class of a backend named by `choose`."""
    module, name, _ = _BACKENDS[backend]
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
