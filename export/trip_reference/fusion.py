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

    With the `matched` gate both are λ_t^i·ε^{i→1} + sqrt(1 − λ_t^i)·(Δε̃^i + TNF's correction), where

        λ_t^i = λ^i·σ_t² / (λ^i·σ_t² + (1 − λ^i)·ᾱ_t).

    Let the difference of frame i from frame 1 have the variance s². By its definition the prior then is ε^i plus that
    difference times sqrt(ᾱ_t)/σ_t, λ_t^i = σ_t²/(σ_t² + ᾱ_t·s²) is its best linear weight as an estimate of ε^i, and
    sqrt(1 − λ_t^i) is the error that is left: Δε̃ has unit variance at every timestep, and copies no noise. This is the
    preconditioning of Karras et al. 2022 (arXiv 2206.00364, sec. 5) for TRIP's prior. λ^i = 1/(1 + s²) is learned and
    starts at ½, as latents have about unit variance.
    """

    def __init__(self, config: TripConfig):
        super().__init__()
        self.normalize_prior, self.matched = config.normalize_prior, config.gate == "matched"
        self.gate = None
        self.tnf = None
        if config.fusion != "none":
            decay = 1 - (torch.arange(config.num_frames) + 0.5) / config.num_frames
            self.gate = nn.Parameter(torch.zeros(config.num_frames) if self.matched else torch.logit(decay))
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
        signal = sqrt_alpha_bar.float()[:, None, None, None, None]
        sigma = sqrt_one_minus_alpha_bar.float()[:, None, None, None, None]
        if self.normalize_prior:
            prior = normalised_noise_prior(latents, first_frame, sqrt_alpha_bar)
        else:
            prior = noise_prior(latents, first_frame, sqrt_alpha_bar, sqrt_one_minus_alpha_bar)
        residual = residual_noise.float()
        of_prior, of_residual, of_correction = self._weights(self.gate.float().sigmoid()[:, None, None], signal, sigma)
        noise = of_prior * prior + of_residual * residual
        if self.tnf is not None:
            dtype = self.tnf.in_proj.weight.dtype
            noise = noise + of_correction * self.tnf(prior.to(dtype), residual.to(dtype), timestep).float()
        return noise.to(residual_noise.dtype)

    def _weights(self, gate: Tensor, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """What the prior, Δε̃ and TNF's correction are multiplied by. σ_t is inside the normalised prior, so it appears
        beside Δε̃ alone."""
        if self.matched:
            variance = gate * sigma**2 + (1 - gate) * signal**2
            of_residual = signal * ((1 - gate) / variance).sqrt()
            return gate * sigma / variance, of_residual, of_residual
        return gate, 1 - gate * (sigma if self.normalize_prior else 1.0), 1.0


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
