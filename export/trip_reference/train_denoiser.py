"""The demo's second stage: text encoder, residual UNet and noise fusion together, on cached latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from trip_reference import demo_world
from trip_reference.demo_data import DemoClips
from trip_reference.model import TripModel
from trip_reference.training import StageConfig, run_stage, step_rngs
from trip_rt.schedule import alpha_bars

TEXT_DROPOUT = 0.1  # so that guidance has an unconditional branch
MAX_WEIGHT = 1000.0


def train_denoiser(
    model: TripModel, tokenizer: Tokenizer, clips: DemoClips, latents: Tensor, config: StageConfig, seed: int, folder: Path, inputs: str
) -> None:
    """Train all of `model` but its VAE and leave the averaged weights in it.

    latents: [N, C, F, h, w], of `clips`. The loss is the mean squared error of the fused noise (TRIP, eq. 7), weighted by 1/ᾱ_t up
    to 1000: the prior makes ε so easy at large t that the plain loss hardly teaches motion.
    """
    table = torch.from_numpy(alpha_bars(model.config.schedule))
    total = model.config.schedule.num_train_timesteps
    trained = nn.ModuleDict({"text_encoder": model.text_encoder, "residual_unet": model.residual_unet, "fusion": model.fusion})
    # The 3D-UNet's temporal convolutions drop a tenth of their features in training; on clips this clean that is only noise.
    for module in trained.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def losses_of(step: int) -> list[Callable[[], Tensor]]:
        rng, generator = step_rngs(seed, step)
        chosen = rng.integers(len(clips), size=config.batch)
        clean = latents[torch.from_numpy(chosen)]
        sentences = ["" if rng.random() < TEXT_DROPOUT else demo_world.caption(clips.scenes[i], clips.motions[i], rng) for i in chosen]
        ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(sentences)])
        # One timestep from each of `batch` equal parts, as the loss varies more with t than with the clip; the higher the likelier,
        # as up there the sentence alone decides what moves.
        quantile = (rng.permutation(config.batch) + rng.random(config.batch)) / config.batch
        timestep = torch.from_numpy(np.sqrt(quantile) * total).long()
        alpha_bar = table[timestep]
        signal, sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        noise = torch.randn(clean.shape, generator=generator)
        noised = signal[:, None, None, None, None] * clean + sigma[:, None, None, None, None] * noise
        weight = (1 / alpha_bar).clamp(max=MAX_WEIGHT).float()

        def loss_of(part: slice) -> Tensor:
            text = model.encode_text(ids[part])
            predicted = model.predict_noise(noised[part], clean[part, :, 0], timestep[part], text, signal[part], sigma[part])
            return ((predicted - noise[part]).square().mean(dim=(1, 2, 3, 4)) * weight[part]).mean()

        half = config.batch // 2
        return [partial(loss_of, slice(start, start + half)) for start in (0, half)]

    average = run_stage("denoiser", trained, config, losses_of, folder, inputs)
    trained.load_state_dict(average.state_dict())


def latent_scale(latents: Tensor) -> float:
    """The factor that brings latents to unit variance, rounded so that it prints exactly."""
    return float(np.round(1 / float(latents.std()), 4))
