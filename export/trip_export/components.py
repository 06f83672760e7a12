"""The five components of a TRIP model as modules with the names, dtypes and static shapes of their graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trip_reference.model import TripModel
from trip_rt.config import TripConfig


@dataclass(frozen=True)
class Component:
    """One graph to be: `module(*inputs)` takes the named tensors in order and gives the tensor called `output`.

    `parts` names the checkpoint folders that its weights come from.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    output: str
    parts: tuple[str, ...]


class Call(nn.Module):
    """A function of a module's tensors as a module of its own, owning only the submodules it uses."""

    def __init__(self, function: Callable[..., Tensor], *owned: nn.Module):
        super().__init__()
        self.owned = nn.ModuleList(owned)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def components(model: TripModel, batch: int, decode_frames: int) -> list[Component]:
    """The components of `model` with example inputs of their static shapes: `batch` clips, guided, so 2·batch in the loop."""
    config = model.config
    clips = 2 * batch
    latents = torch.randn(clips, config.latent_channels, config.num_frames, config.latent_height, config.latent_width)
    first_frame = latents[:, :, 0].clone()
    timestep = torch.tensor([500])
    text = torch.randn(clips, config.text_length, config.text_width)
    image = torch.randn(batch, 3, config.height, config.width)
    return [
        Component(
            "text_encoder",
            Call(model.encode_text, model.text_encoder),
            {"input_ids": torch.ones(batch, config.text_length, dtype=torch.int64)},
            "text",
            ("text_encoder",),
        ),
        Component("vae_encoder", Call(model.encode_image, model.vae), {"image": image}, "latent", ("vae",)),
        Component(
            "unet",
            Call(model.residual_unet, model.residual_unet),
            {"latents": latents, "first_frame": first_frame, "timestep": timestep, "text": text},
            "residual_noise",
            ("unet",),
        ),
        Component(
            "tnf",
            Call(model.fusion, model.fusion),
            {
                "latents": latents,
                "first_frame": first_frame,
                "residual_noise": torch.randn_like(latents),
                "sqrt_alpha_bar": torch.tensor([0.6]),
                "sqrt_one_minus_alpha_bar": torch.tensor([0.8]),  # a tensor of its own: the exporter merges inputs that are one object
                "timestep": timestep,
            },
            "noise",
            ("fusion",),
        ),
        Component("vae_decoder", Call(model.decode, model.vae), {"latents": latents[0].transpose(0, 1)[:decode_frames]}, "image", ("vae",)),
    ]


def default_decode_frames(config: TripConfig) -> int:
    """Frames the VAE decodes at a time: all sixteen of a small picture, fewer of a large one, about a million pixels."""
    return max(1, min(config.num_frames, 2**20 // (config.height * config.width)))
