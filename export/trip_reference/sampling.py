"""The oracle: TRIP's sampling loop in plain PyTorch, which every engine is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trip_reference.model import TripModel
from trip_rt.schedule import DDIMStep


@torch.no_grad()
def sample(
    model: TripModel,
    first_frame: Tensor,
    noise: Tensor,
    text: Tensor,
    steps: Sequence[DDIMStep],
    guidance_scale: float,
    on_step: Callable[[DDIMStep, Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Clean latents [B, C, F, h, w] by DDIM with classifier-free guidance on the fused noise, frame 1 held at the given latent.

    first_frame: [B, C, h, w], clean; noise: [B, C, F, h, w]; text: [2B, L, D], the unconditional half first.
    `on_step(step, latents, residual_noise, noise)` sees each step's network inputs and outputs, 2B each.
    """
    latents, clean = noise.clone(), torch.cat([first_frame, first_frame])
    for step in steps:
        latents[:, :, 0] = step.sqrt_alpha_bar * first_frame + step.sqrt_one_minus_alpha_bar * noise[:, :, 0]
        signal, sigma, timestep = torch.tensor([step.sqrt_alpha_bar]), torch.tensor([step.sqrt_one_minus_alpha_bar]), torch.tensor([step.timestep])
        doubled = torch.cat([latents, latents])
        residual = model.residual_unet(doubled, clean, timestep, text)
        predicted = model.fusion(doubled, clean, residual, signal, sigma, timestep)
        if on_step:
            on_step(step, doubled, residual, predicted)
        unconditional, conditional = predicted.chunk(2)
        latents = step.a * latents + step.b * (unconditional + guidance_scale * (conditional - unconditional))
    latents[:, :, 0] = first_frame
    return latents
