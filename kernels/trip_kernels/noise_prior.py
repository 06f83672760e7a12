"""The image noise prior: what the still picture says the noise of every frame should be (TRIP, eq. 4)."""

from __future__ import annotations

from torch import Tensor


def normalised_noise_prior_ref(latents: Tensor, first_frame: Tensor, sqrt_alpha_bar: Tensor) -> Tensor:
    """sqrt(1−ᾱ_t)·ε^{i→1} = z_t^i − sqrt(ᾱ_t)·z_0^1, always in fp32.

    This unit-variance form leaves out the division by sqrt(1−ᾱ_t), which reaches 100 at small t and overflows fp16.

    latents: [B, C, F, H, W]; first_frame: [B, C, H, W], clean; sqrt_alpha_bar: [B] or [1]. Returns fp32 [B, C, F, H,
    W].
    """
    clean = sqrt_alpha_bar.float()[:, None, None, None, None] * first_frame.float()[:, :, None]
    return latents.float() - clean


def noise_prior_ref(
    latents: Tensor, first_frame: Tensor, sqrt_alpha_bar: Tensor, sqrt_one_minus_alpha_bar: Tensor
) -> Tensor:
    """The paper's raw prior ε^{i→1} = (z_t^i − sqrt(ᾱ_t)·z_0^1) / sqrt(1−ᾱ_t), always in fp32.

    Shapes as in `normalised_noise_prior_ref`. For frame 1 it is that frame's exact noise.
    """
    prior = normalised_noise_prior_ref(latents, first_frame, sqrt_alpha_bar)
    return prior / sqrt_one_minus_alpha_bar.float()[:, None, None, None, None]
