"""TRIP's image noise prior, and the three fusions that turn it and the UNet's residual noise into the final noise
prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trip_reference.tnf import TemporalNoiseFusion
from trip_rt.config import TripConfig


def normalised_noise_prior(latents: Tensor, first_frame: Tensor, sqrt_alpha_bar: Tensor) -> Tensor:
    """σ_t·ε^{i→1} = z_t^i − sqrt(ᾱ_t)·z_0^1: the prior times σ_t = sqrt(1−ᾱ_t), always in fp32.

    This form has unit variance. It avoids the division by σ_t, which amplifies a hundredfold at small t and overflows
    fp16.

    latents: [B, C, F, H, W]; first_frame: [B, C, H, W], clean; sqrt_alpha_bar: [B] or [1]. Returns fp32 [B, C, F, H,
    W].
    """
    clean = sqrt_alpha_bar.float()[:, None, None, None, None] * first_frame.float()[:, :, None]
    return latents.float() - clean


def noise_prior(
    latents: Tensor, first_frame: Tensor, sqrt_alpha_bar: Tensor, sqrt_one_minus_alpha_bar: Tensor
) -> Tensor:
    """The paper's raw prior ε^{i→1} = (z_t^i − sqrt(ᾱ_t)·z_0^1) / sqrt(1−ᾱ_t) (TRIP, eq. 4), always in fp32: the noise
    that frame i would hold if it showed the same picture as frame 1.

    The shapes are those of `normalised_noise_prior`. For frame 1 it is that frame's exact noise.
    """
    prior = normalised_noise_prior(latents, first_frame, sqrt_alpha_bar)
    return prior / sqrt_one_minus_alpha_bar.float()[:, None, None, None, None]


class NoiseFusion(nn.Module):
    """ε̃ from the residual noise Δε̃ and the image noise prior (TRIP, sec. 3.3).

    - `none`: Δε̃.
    - `linear`: λ^i·σ_t·ε^{i→1} + (1 − λ^i·σ_t)·Δε̃^i with a learned λ per frame that starts as the linear decay from 1
      to 0.
    - `tnf`: the linear fusion plus TNF's correction.

    With `normalize_prior` off, λ^i stands in place of λ^i·σ_t and the prior is the paper's raw one.
    """

    def __init__(self, config: TripConfig):
        super().__init__()
        self.normalize_prior = config.normalize_prior
        self.gate = None
        self.tnf = None
        if config.fusion != "none":
            decay = 1 - (torch.arange(config.num_frames) + 0.5) / config.num_frames
            self.gate = nn.Parameter(torch.logit(decay))
        if config.fusion == "tnf":
            self.tnf = TemporalNoiseFusion(config.tnf, config.latent_channels, config.num_frames)

    def forward(
        self,
        latents: Tensor,
        first_frame: Tensor,
        residual_noise: Tensor,
        sqrt_alpha_bar: Tensor,
        sqrt_one_minus_alpha_bar: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        """latents, residual_noise: [B, C, F, H, W]; first_frame: [B, C, H, W]; the rest [B] or [1]. Returns ε̃, [B, C,
        F, H, W]."""
        if self.gate is None:
            return residual_noise
        if self.normalize_prior:
            # σ_t·ε^{i→1}: σ_t is already inside the prior, so it appears only beside Δε̃.
            prior = normalised_noise_prior(latents, first_frame, sqrt_alpha_bar)
            sigma = sqrt_one_minus_alpha_bar.float()[:, None, None, None, None]
        else:
            prior = noise_prior(latents, first_frame, sqrt_alpha_bar, sqrt_one_minus_alpha_bar)
            sigma = 1.0
        gate = self.gate.float().sigmoid()[:, None, None]  # [F, 1, 1]
        residual = residual_noise.float()
        noise = gate * prior + (1 - gate * sigma) * residual
        if self.tnf is not None:
            dtype = self.tnf.in_proj.weight.dtype
            noise = noise + self.tnf(prior.to(dtype), residual.to(dtype), timestep).float()
        return noise.to(residual_noise.dtype)


def fusion_for(config: TripConfig, fusion: NoiseFusion) -> NoiseFusion:
    """`fusion` for clips of `config`'s length: what it has for each frame is interpolated between its first and last
    frame, which keep theirs; the rest is shared by all frames and copied."""
    other = NoiseFusion(config)
    state = fusion.state_dict()
    for name in {"gate", "tnf.frame_embedding"} & state.keys():
        by_frame = state[name].reshape(1, len(state[name]), -1).transpose(1, 2)  # [1, width or 1, F]
        resampled = nn.functional.interpolate(by_frame, config.num_frames, mode="linear", align_corners=True)
        state[name] = resampled.transpose(1, 2).reshape(config.num_frames, *state[name].shape[1:])
    other.load_state_dict(state)
    return other
