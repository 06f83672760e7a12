"""From the UNet's residual noise to the final noise prediction: TRIP's three fusions, the prior inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trip_kernels.noise_prior import noise_prior_ref, normalised_noise_prior_ref
from trip_reference.tnf import TemporalNoiseFusion
from trip_rt.config import TripConfig


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
            prior = normalised_noise_prior_ref(latents, first_frame, sqrt_alpha_bar)
            sigma = sqrt_one_minus_alpha_bar.float()[:, None, None, None, None]
        else:
            prior = noise_prior_ref(latents, first_frame, sqrt_alpha_bar, sqrt_one_minus_alpha_bar)
            sigma = 1.0
        gate = self.gate.float().sigmoid()[:, None, None]  # [F, 1, 1]
        residual = residual_noise.float()
        noise = gate * prior + (1 - gate * sigma) * residual
        if self.tnf is not None:
            dtype = self.tnf.in_proj.weight.dtype
            noise = noise + self.tnf(prior.to(dtype), residual.to(dtype), timestep).float()
        return noise.to(residual_noise.dtype)
