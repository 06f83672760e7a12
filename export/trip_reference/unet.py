"""The 3D-UNet that predicts the residual noise: diffusers' network, given the first frame in one of three ways."""

from __future__ import annotations

import torch
from diffusers import UNet3DConditionModel
from torch import Tensor, nn

from trip_reference.control import added_features
from trip_reference.temporal_conv import TemporalConv
from trip_rt.config import FirstFrame


def temporal_convs_as_2d(unet: UNet3DConditionModel) -> UNet3DConditionModel:
    """Turn the network's (3, 1, 1) Conv3d layers into `TemporalConv`, in place."""
    for module in unet.modules():
        if (
            type(module) is nn.Conv3d
            and module.kernel_size == (3, 1, 1)
            and module.padding == (1, 0, 0)
            and module.stride == (1, 1, 1)
        ):
            module.__class__ = TemporalConv
    return unet


class ResidualUNet(nn.Module):
    """Δε̃ of every frame from the noised latents and the clean first one."""

    def __init__(self, unet: UNet3DConditionModel, first_frame: FirstFrame):
        super().__init__()
        self.unet = temporal_convs_as_2d(unet)
        self.first_frame = first_frame

    def forward(
        self,
        latents: Tensor,
        first_frame: Tensor,
        timestep: Tensor,
        text: Tensor,
        control_features: Tensor | None = None,
    ) -> Tensor:
        """latents: [B, C, F, H, W]; first_frame: [B, C, H, W]; timestep: [B] or [1]; text: [B, L, D]; control_features:
        [B, F', C', H, W], as a ControlEncoder makes them. Returns [B, C, F, H, W].

        `start` (TRIP) and `end` (TRIP^TE) add the clean frame along time and drop its output; `channel` (TRIP^C) stacks
        it on every frame's channels.
        """
        sample = with_first_frame(latents, first_frame, self.first_frame)
        with added_features(self.unet, control_features):
            noise = self.unet(sample, timestep.expand(len(sample)), encoder_hidden_states=text).sample
        return without_first_frame(noise, self.first_frame)


def with_first_frame(latents: Tensor, first_frame: Tensor, how: FirstFrame) -> Tensor:
    """The network's input [B, C, F + 1, H, W], or [B, 2·C, F, H, W] for `channel`, of the tensors that ResidualUNet
    takes."""
    clean = first_frame[:, :, None]
    match how:
        case "start":
            return torch.cat([clean, latents], dim=2)
        case "end":
            return torch.cat([latents, clean], dim=2)
        case "channel":
            return torch.cat([latents, clean.expand_as(latents)], dim=1)


def without_first_frame(noise: Tensor, how: FirstFrame) -> Tensor:
    """The network's output [B, C, F + 1 or F, H, W] without that of the clean frame."""
    match how:
        case "start":
            return noise[:, :, 1:]
        case "end":
            return noise[:, :, :-1]
        case "channel":
            return noise
