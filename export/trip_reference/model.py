"""The whole TRIP model in PyTorch: text encoder, VAE, residual UNet and noise fusion under one roof."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from trip_reference.control import ControlEncoder
from trip_reference.fusion import NoiseFusion
from trip_reference.presets import Preset
from trip_reference.unet import ResidualUNet
from trip_rt.config import ControlConfig, TripConfig


class TripModel(nn.Module):
    """TRIP (arXiv 2403.17005). Public tensors are fp32 `[B, C, F, H, W]`; pixels lie in [−1, 1]. `sampling.sample` says
    how its parts make a clip. Most models have no `control`."""

    def __init__(self, config: TripConfig, unet: UNet3DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel):
        super().__init__()
        self.config = config
        self.residual_unet = ResidualUNet(unet, config.first_frame)
        self.fusion = NoiseFusion(config)
        self.vae = vae
        self.text_encoder = text_encoder
        self.control: ControlEncoder | None = None

    @property
    def vocabulary(self) -> int:
        """How many token ids the text encoder knows."""
        return int(self.text_encoder.config.vocab_size)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """int64 [B, text_length] → [B, text_length, text_width]. Padding is attended to, as Stable Diffusion's is."""
        return self.text_encoder(input_ids).last_hidden_state

    def add_control(self, control: ControlConfig) -> None:
        """Give the model a fresh control, which changes nothing yet."""
        width = self.residual_unet.unet.config.block_out_channels[0]
        self.control = ControlEncoder(control, self.config.latent_channels, width, self.config.first_frame)

    def encode_control(self, control: Tensor, first_frame: Tensor) -> Tensor:
        """A map [B, K, F, h, w] and the clean first frame [B, C, h, w] → what the UNet's first convolution is given
        more, [B, F', C', h, w]."""
        assert self.control is not None
        features: Tensor = self.control(control, first_frame)
        return features

    def encode_image(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] → the scaled mean latent [B, C, h, w]; nothing is drawn at random."""
        return self.vae.encode(image).latent_dist.mean * self.config.scaling_factor

    def encode_clip(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] → [C, F, h, w]."""
        return self.encode_image(to_pixels(frames)).transpose(0, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """[n, C, h, w] → [n, 3, H, W]."""
        return self.vae.decode(latents / self.config.scaling_factor).sample


def to_pixels(frames: NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 [..., H, W, 3] → fp32 [..., 3, H, W] in [−1, 1], on the device that a tensor is on."""
    pixels = frames if isinstance(frames, Tensor) else torch.tensor(frames)
    return to_model_range(pixels.movedim(-1, -3))


def to_model_range(levels: Tensor) -> Tensor:
    """Levels 0 to 255 of any dtype and layout → fp32 in [−1, 1], of the same layout."""
    return levels.float() / 127.5 - 1


def build_unet(config: TripConfig, architecture: dict[str, Any]) -> UNet3DConditionModel:
    """A UNet with random weights; its sizes that follow from `config` are filled in."""
    stacked = 2 if config.first_frame == "channel" else 1
    return UNet3DConditionModel(
        sample_size=config.frame_shape[1],
        in_channels=config.latent_channels * stacked,
        out_channels=config.latent_channels,
        cross_attention_dim=config.text_width,
        **architecture,
    )


def build_vae(config: TripConfig, architecture: dict[str, Any]) -> AutoencoderKL:
    """A VAE with random weights."""
    levels = len(architecture["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=config.latent_channels,
        sample_size=config.height,
        scaling_factor=config.scaling_factor,
        **architecture,
    )


def build_text_encoder(config: TripConfig, architecture: dict[str, Any]) -> CLIPTextModel:
    """A CLIP text encoder with random weights."""
    return CLIPTextModel(CLIPTextConfig(max_position_embeddings=config.text_length, **architecture))


def build_model(preset: Preset, text_overrides: dict[str, Any] | None = None) -> TripModel:
    """A whole model with random weights; `text_overrides` holds what only a tokenizer knows (vocabulary size, special
    ids)."""
    return TripModel(
        preset.trip,
        build_unet(preset.trip, preset.unet),
        build_vae(preset.trip, preset.vae),
        build_text_encoder(preset.trip, preset.text_encoder | (text_overrides or {})),
    )
