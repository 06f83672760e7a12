"""The demo's first stage: the VAE, on single frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from trip_reference.demo_data import DemoClips, to_pixels
from trip_reference.training import StageConfig, run_stage, step_rngs

KL_WEIGHT = 1e-7
CROP_SHARE = 0.8  # of the steps see crops, the rest whole frames
CROPS_PER_FRAME = 3  # in a batch: a crop costs a quarter of a frame


def train_vae(vae: AutoencoderKL, clips: DemoClips, config: StageConfig, seed: int, folder: Path, inputs: str) -> AutoencoderKL:
    """Train `vae` to give frames back (mean squared error and a trace of KL) and return the averaged one.

    Most steps see half-size crops around the shape: on whole frames a shape is a twentieth of the pixels, and the network
    spends its first thousands of steps on backgrounds alone.
    """
    # Steady codes from the first step: with its usual start (σ = 1) the posterior drowns what the encoder has yet to learn to say.
    channels = vae.config["latent_channels"]
    with torch.no_grad():
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = -7
    vae.to(memory_format=torch.channels_last)
    size = clips.frames.shape[2]
    side = size // 2

    def batch(step: int) -> tuple[Tensor, torch.Generator]:
        rng, generator = step_rngs(seed, step)
        cropped = step < CROP_SHARE * config.steps
        count = config.batch * (CROPS_PER_FRAME if cropped else 1)
        clip, frame = rng.integers(len(clips), size=count), rng.integers(clips.frames.shape[1], size=count)
        frames = clips.frames[clip, frame]
        if cropped:
            corners = np.rint(clips.centres[clip, frame] - side / 2 + rng.uniform(-0.19 * size, 0.19 * size, (count, 2)))
            corners = np.clip(corners, 0, size - side).astype(int)
            frames = np.stack([f[y : y + side, x : x + side] for f, (x, y) in zip(frames, corners, strict=True)])
        return to_pixels(frames).contiguous(memory_format=torch.channels_last), generator

    def losses_of(step: int) -> list[Callable[[], Tensor]]:
        pixels, generator = batch(step)

        def loss() -> Tensor:
            posterior = vae.encode(pixels).latent_dist
            restored = vae.decode(posterior.sample(generator)).sample
            return (restored - pixels).square().mean() + KL_WEIGHT * posterior.kl().mean()

        return [loss]

    return run_stage("vae", vae, config, losses_of, folder, inputs)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, frames: np.ndarray) -> float:
    """Mean PSNR in dB, on the 0 to 255 scale, of uint8 frames [N, H, W, 3] through the VAE and back."""
    pixels = to_pixels(frames)
    restored = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return float((10 * torch.log10(4 / (restored - pixels).square().mean(dim=(1, 2, 3)))).mean())
