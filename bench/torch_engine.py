"""The PyTorch model's own modules as engines: where no engine library is at hand, the loop around them runs and is timed all the same."""

from __future__ import annotations

import torch

from trip_export.components import component
from trip_reference.model import TripModel
from trip_rt.backends import EngineOptions
from trip_rt.backends.inductor import InductorEngine
from trip_rt.devices import Device
from trip_rt.manifest import COMPONENTS, EngineSpec, Profile, tensors


class Module:
    """A module in place of a loaded package: fp32 tensors in and out, whatever `dtype` it computes in."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype):
        self.module, self.dtype = module, dtype

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.module(*(tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in inputs))]


def torch_engines(model: TripModel, device: Device, batch: int, decode_frames: int, precision: str) -> dict[str, InductorEngine]:
    """Engines of all components that run `model`, which lies on `device` already, in its own dtype."""
    dtype = next(model.parameters()).dtype
    engines = {}
    for name in COMPONENTS:
        inputs, outputs = tensors(model.config, batch, decode_frames)[name]
        spec = EngineSpec((f"{name} in PyTorch",), "", precision, {}, 0.0, {}, inputs, outputs)
        module = component(model, name, batch, decode_frames).module
        engines[name] = InductorEngine(spec, torch, Module(module, dtype), device, EngineOptions(), owns_device=False)
    return engines


def profile_of(model: TripModel, engines: dict[str, InductorEngine], batch: int, decode_frames: int, kernels: dict) -> Profile:
    """The profile that a bundle of these engines would have."""
    config = model.config
    specs = {name: {"pytorch": engine.spec} for name, engine in engines.items()}
    return Profile(config.num_frames, config.height, config.width, batch, decode_frames, specs, kernels, "", {})
