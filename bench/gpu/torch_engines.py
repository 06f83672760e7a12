"""The PyTorch model's own modules as engines: where no engine library is at hand, the loop around them runs and is
timed all the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trip_reference.fusion import NoiseFusion
from trip_rt.backends import EngineOptions
from trip_rt.backends.inductor import InductorEngine
from trip_rt.components import REQUIRED, signatures
from trip_rt.config import TripConfig
from trip_rt.devices import Device
from trip_rt.manifest import EngineSpec, KernelSpec, Profile
from trip_rt.networks import OpenEngine
from trip_rt.sampling.step import Arithmetic

# The model's method that each component is.
METHODS = {
    "text_encoder": "encode_text",
    "vae_encoder": "encode_image",
    "unet": "residual_unet",
    "tnf": "fusion",
    "vae_decoder": "decode",
}
# The model projects the text itself, each time, and lets nobody see its features.
_FEATURES_SHAPE = (1, 1, 1, 1)


class _Method:
    """A method of a model in place of a loaded package: fp32 tensors in, whatever `dtype` it computes in."""

    def __init__(self, model: nn.Module, name: str, dtype: torch.dtype):
        self.model, self.name, self.dtype = model, name, dtype

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        given = [tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in inputs]
        if self.name == "text_projection":
            return given
        outputs = [getattr(self.model, METHODS[self.name])(*given)]
        return (
            [*outputs, torch.zeros(len(given[0]), *_FEATURES_SHAPE, device=given[0].device)]
            if self.name == "unet"
            else outputs
        )


def torch_engines(
    model: Any, device: Device, decode_frames: int, precision: str, batch: int = 1
) -> dict[str, InductorEngine]:
    """Engines of all components that run `model`, which lies on `device` already, in its own dtype."""
    dtype = next(model.residual_unet.parameters()).dtype
    engines = {}
    graphs = signatures(model.config, batch, decode_frames, model.config.text_width, _FEATURES_SHAPE)
    for name in REQUIRED:
        inputs, outputs = graphs[name]
        spec = EngineSpec((f"{name} in PyTorch",), "", precision, {}, 0.0, {}, inputs, outputs)
        engines[name] = InductorEngine(
            spec, torch, _Method(model, name, dtype), device, EngineOptions(), owns_device=False
        )
    return engines


def opener(engines: dict[str, InductorEngine]) -> OpenEngine:
    """What opens them for a pipeline; they compute in their own precision alone."""

    def open_engine(name: str, arithmetic: Arithmetic = "own") -> InductorEngine | None:
        assert arithmetic == "own", arithmetic
        return engines.get(name)

    return open_engine


def profile_of(
    config: TripConfig,
    engines: dict[str, InductorEngine],
    decode_frames: int,
    kernels: dict[str, KernelSpec],
    batch: int = 1,
) -> Profile:
    """The profile that a bundle of these engines would have."""
    specs = {name: {"pytorch": engine.spec} for name, engine in engines.items()}
    unet = engines["unet"].spec
    shapes = {tensor.name: tensor.shape for tensor in (*unet.inputs, *unet.outputs)}
    sizes = config.num_frames, config.height, config.width, batch, decode_frames
    return Profile(*sizes, shapes["context"][-1], shapes["features"][1:], specs, kernels, "", {})


class StandIn(nn.Module):
    """TRIP's own fusion among parts far simpler than the model's, of the same shapes: for the loop where diffusers is
    not installed."""

    def __init__(self, config: TripConfig):
        super().__init__()
        self.config = config
        channels, patch = config.latent_channels, config.vae_scale_factor
        self.fusion = NoiseFusion(config)
        self.words = nn.Embedding(64, config.text_width)
        self.encode_image = nn.Conv2d(3, channels, patch, patch)
        self.decode = nn.ConvTranspose2d(channels, 3, patch, patch)
        self.residual_unet = _StandInUNet(channels, config.text_width)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        return self.words(input_ids)


class _StandInUNet(nn.Module):
    def __init__(self, channels: int, text_width: int):
        super().__init__()
        self.mix = nn.Conv3d(2 * channels, channels, 3, padding=1)
        self.say = nn.Linear(text_width, channels)

    def forward(self, latents: Tensor, first_frame: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        said = self.say(text.mean(1)) * torch.cos(timestep.to(text.dtype) / 300)
        return (
            self.mix(torch.cat([latents, first_frame[:, :, None].expand_as(latents)], 1)) + said[:, :, None, None, None]
        )
