"""The oracle: TRIP's sampling loop in plain PyTorch, which every engine is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trip_reference.feature_reuse import FeatureReuse
from trip_rt.speed import LoopStep

if TYPE_CHECKING:
    from trip_reference.model import TripModel


@torch.no_grad()
def sample(
    model: TripModel,
    first_frame: Tensor,
    noise: Tensor,
    text: Tensor,
    steps: Sequence[LoopStep],
    on_step: Callable[[LoopStep, Tensor, Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Clean latents [B, C, F, h, w] by a solver's steps with classifier-free guidance on the fused noise, frame 1 held
    at the given latent.

    first_frame: [B, C, h, w], clean; noise: [B, C, F, h, w]; text: [2B, L, D], the unconditional half first.
    `on_step(step, latents, residual_noise, noise, features)` sees the networks' inputs and outputs, 2B each or B where
    the step is unguided.
    """
    latents, batch = noise.clone(), len(noise)
    corrected = clean_1 = clean_2 = torch.zeros_like(noise)
    with FeatureReuse(model.residual_unet) as residual_unet:
        for one in steps:
            step, halves = one.step, 2 if one.guided else 1
            latents[:, :, 0] = step.sqrt_alpha_bar * first_frame + step.sqrt_one_minus_alpha_bar * noise[:, :, 0]
            values = step.sqrt_alpha_bar, step.sqrt_one_minus_alpha_bar, step.timestep
            signal, sigma, timestep = (torch.tensor([value], device=noise.device) for value in values)
            given, clean = torch.cat([latents] * halves), torch.cat([first_frame] * halves)
            residual = residual_unet(given, clean, timestep, text[-halves * batch :], one.shallow)
            predicted = model.fusion(given, clean, residual, signal, sigma, timestep)
            if on_step:
                on_step(one, given, residual, predicted, residual_unet.features)
            unconditional, conditional = predicted[:batch], predicted[-batch:]
            guided = unconditional + one.guidance_scale * (conditional - unconditional)
            terms = torch.stack([latents, guided, corrected, clean_1, clean_2])
            clean_1, clean_2 = (latents - step.sqrt_one_minus_alpha_bar * guided) / step.sqrt_alpha_bar, clean_1
            latents, corrected = (
                torch.tensordot(noise.new_tensor(row), terms, 1) for row in (step.latents, step.corrected)
            )
    latents[:, :, 0] = first_frame
    return latents
