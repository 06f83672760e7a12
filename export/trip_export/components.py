"""The five components of a TRIP model as modules with the names, dtypes and static shapes of their graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trip_reference.model import TripModel
from trip_rt.config import TripConfig
from trip_rt.manifest import TensorSpec, tensors

# The checkpoint folders that a component's weights come from.
PARTS = {"text_encoder": "text_encoder", "vae_encoder": "vae", "unet": "unet", "tnf": "fusion", "vae_decoder": "vae"}


@dataclass(frozen=True)
class Component:
    """One graph to be: `module(*inputs)` takes the named tensors in order and gives the tensor called `output`."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    output: str


class Call(nn.Module):
    """A function of a module's tensors as a module of its own, owning only the submodules it uses."""

    def __init__(self, function: Callable[..., Tensor], *owned: nn.Module):
        super().__init__()
        self.owned = nn.ModuleList(owned)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def component(model: TripModel, name: str, batch: int, decode_frames: int) -> Component:
    """The component called `name` with example inputs of its static shapes; of `model` only its own part need hold weights."""
    modules = {
        "text_encoder": lambda: Call(model.encode_text, model.text_encoder),
        "vae_encoder": lambda: Call(model.encode_image, model.vae),
        "unet": lambda: Call(model.residual_unet),
        "tnf": lambda: Call(model.fusion),
        "vae_decoder": lambda: Call(model.decode, model.vae),
    }
    inputs, (output,) = tensors(model.config, batch, decode_frames)[name]
    return Component(name, modules[name]().eval(), {spec.name: _example(spec) for spec in inputs}, output.name)


def default_decode_frames(config: TripConfig) -> int:
    """Frames the VAE decodes at a time: all sixteen of a small picture, fewer of a large one, about a million pixels."""
    return max(1, min(config.num_frames, 2**20 // (config.height * config.width)))


def _example(spec: TensorSpec) -> Tensor:
    """Every example is a tensor of its own: the exporter merges inputs that are one object."""
    return torch.ones(spec.shape, dtype=torch.int64) if spec.dtype == "int64" else torch.randn(spec.shape)
