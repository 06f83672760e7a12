"""bf16 arithmetic on fp32 engines, emulated: its parity where the CPU at hand has no bf16."""

from __future__ import annotations

from pathlib import Path

from trip_engines.emulation import EmulatedEngine
from trip_engines.precision import ALWAYS_FP32, emulated
from trip_rt.backends import EngineOptions
from trip_rt.backends.base import Engine
from trip_rt.backends.openvino import OpenVINOEngine
from trip_rt.devices import Device, open_device
from trip_rt.manifest import EngineSpec


class EmulatedBf16Engine(EmulatedEngine):
    """OpenVINO's fp32 engines; one that is to compute in bf16 is an emulation, which rounds every value and so more
    than OpenVINO does."""

    backend = "openvino"

    @classmethod
    def lowers(cls) -> bool:
        return True

    @classmethod
    def open(cls, path: Path, spec: EngineSpec, options: EngineOptions, device: Device | None = None) -> Engine:
        if spec.precision != "bf16":
            return OpenVINOEngine.open(path, spec, options, device)
        return cls(spec, emulated(path, "bf16", ALWAYS_FP32, options.threads), device or open_device("cpu"))
