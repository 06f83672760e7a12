"""The components of a TRIP model as modules with the names, dtypes and static shapes of their graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trip_export.denoising_unet import DenoisingUNet, TextProjection, cross_attentions
from trip_reference.model import TripModel
from trip_rt.components import ALL, Signature, TensorSpec
from trip_rt.components import signatures as graph_signatures
from trip_rt.config import TripConfig


@dataclass(frozen=True)
class Component:
    """What becomes one graph: `module(*inputs)` takes the named tensors in order and returns those named in `outputs`,
    a single one or a tuple."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


class Call(nn.Module):
    """A function of a module's tensors as a module of its own, owning only the submodules it uses."""

    def __init__(self, function: Callable[..., Tensor], *owned: nn.Module):
        super().__init__()
        self.owned = nn.ModuleList(owned)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def component(model: TripModel, name: str, batch: int, decode_frames: int) -> Component:
    """The component called `name` with example inputs of its static shapes; of `model` only its own part need hold
    weights, and may be changed."""
    match name:
        case "text_encoder":
            module: nn.Module = Call(model.encode_text, model.text_encoder)
        case "text_projection":
            module = TextProjection(model.residual_unet.unet)
        case "vae_encoder":
            module = Call(model.encode_image, model.vae)
        case "tnf" | "tnf_unguided":
            module = Call(model.fusion)
        case "vae_decoder":
            module = Call(model.decode, model.vae)
        case "control_encoder":
            module = Call(model.encode_control, model.control)
        case _:
            module = DenoisingUNet(
                model.residual_unet, ALL[name].guided, ALL[name].shallow, controlled=model.control is not None
            )
    inputs, outputs = signatures(model, batch, decode_frames)[name]
    return Component(
        name, module.eval(), {spec.name: _example(spec) for spec in inputs}, tuple(spec.name for spec in outputs)
    )


def signatures(model: TripModel, batch: int, decode_frames: int) -> dict[str, Signature]:
    """`trip_rt.components.signatures` of all the model's components; no part of it need hold weights."""
    control = model.control.config if model.control else None
    return graph_signatures(model.config, batch, decode_frames, context_width(model), features_shape(model), control)


def context_width(model: TripModel) -> int:
    """How many numbers the keys and values of one token have in all cross-attentions together."""
    return sum(
        projection.out_features
        for attention in cross_attentions(model.residual_unet.unet)
        for projection in (attention.to_k, attention.to_v)
    )


def features_shape(model: TripModel) -> tuple[int, int, int, int]:
    """[F', C', h, w]: one clip's input to the UNet's last layer, besides its skip."""
    config, unet = model.config, model.residual_unet.unet
    frames = config.num_frames + (config.first_frame != "channel")
    return frames, unet.config.block_out_channels[0], *config.frame_shape[1:]


def default_decode_frames(config: TripConfig) -> int:
    """Frames the VAE decodes at a time: four, so that the first are soon there and memory does not grow with the clip,
    and of large pictures about a million pixels."""
    return max(1, min(config.num_frames, 4, 2**20 // (config.height * config.width)))


def _example(spec: TensorSpec) -> Tensor:
    """Every example is a tensor of its own: the exporter merges inputs that are one object."""
    return torch.ones(spec.shape, dtype=torch.int64) if spec.dtype == "int64" else torch.randn(spec.shape)
