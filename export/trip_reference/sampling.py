"""The oracle: TRIP's sampling loop in plain PyTorch, which every engine is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trip_reference.feature_reuse import FeatureReuse
from trip_rt.sampling.step import History, Step, advance, guide, hold_first_frame

if TYPE_CHECKING:
    from trip_reference.model import TripModel


@torch.no_grad()
def sample(
    model: TripModel,
    first_frame: Tensor,
    noise: Tensor,
    text: Tensor,
    steps: Sequence[Step],
    on_step: Callable[[Step, Tensor, Tensor, Tensor, Tensor], None] | None = None,
    control_features: Tensor | None = None,
) -> Tensor:
    """Clean latents [B, C, F, h, w] by a solver's steps with classifier-free guidance on the fused noise, frame 1 held
    at the given latent.

    first_frame: [B, C, h, w], clean; noise: [B, C, F, h, w]; text: [2B, L, D], the unconditional half first;
    control_features: [B, F', C', h, w] of a ControlEncoder, for controlled steps.
    `on_step(step, latents, residual_noise, noise, features)` sees the networks' inputs and outputs, 2B each or B where
    the step is unguided.
    """
    latents, batch, history = noise.clone(), len(noise), History()
    with FeatureReuse(model.residual_unet) as residual_unet:
        for step in steps:
            halves = 2 if step.guided else 1
            hold_first_frame(step, latents, first_frame, noise[:, :, 0])
            values = step.sqrt_alpha_bar, step.sqrt_one_minus_alpha_bar, step.timestep
            signal, sigma, timestep = (torch.tensor([value], device=noise.device) for value in values)
            given, clean = torch.cat([latents] * halves), torch.cat([first_frame] * halves)
            steered = None
            if control_features is not None and step.controlled:
                steered = torch.cat([control_features] * halves)
            residual = residual_unet(given, clean, timestep, text[-halves * batch :], step.shallow, steered)
            predicted = model.fusion(given, clean, residual, signal, sigma, timestep)
            if on_step:
                on_step(step, given, residual, predicted, residual_unet.features)
            latents, history = advance(step, latents, guide(step, predicted, batch), history)
    latents[:, :, 0] = first_frame
    return latents
