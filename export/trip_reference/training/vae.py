"""The demo's first stage: the VAE, on single frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn

from trip_reference.data.loader import BatchPlan
from trip_reference.demo_world.clips import RenderedClips
from trip_reference.model import to_pixels
from trip_reference.training.config import TrainConfig, VaeConfig
from trip_reference.training.log import Log
from trip_reference.training.loop import Stretch, train
from trip_reference.training.state import Place
from trip_rt.accuracy import psnr

CROP_SHARE = 0.8  # the first 80 % of the steps see crops, the rest whole frames
CROPS_PER_FRAME = 3  # in a batch: a crop costs a quarter of a frame
WARMUP = 100


class VaeLoss(nn.Module):
    """Mean squared error of the reconstructed frames plus `kl_weight` times the KL divergence."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float):
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """pixels: [B, 3, H, W] in [−1, 1]; noise: [B, C, h, w] of unit variance, which draws from the posterior."""
        posterior = self.vae.encode(pixels).latent_dist
        restored = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return (restored - pixels).square().mean() + self.kl_weight * posterior.kl().mean()


def train_vae(
    vae: AutoencoderKL, clips: RenderedClips, config: TrainConfig, accelerator: Accelerator, state: Path, run_id: str
) -> None:
    """Train `vae` to give frames back and leave the averaged weights in it.

    Most steps see half-size crops around the shape. On whole frames a shape is a twentieth of the pixels, and the
    network would learn only backgrounds for thousands of steps.
    """
    # The posterior begins with σ = exp(−3.5): with the usual σ = 1 its noise would hide what the encoder has learned.
    channels = vae.config["latent_channels"]
    with torch.no_grad():
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = -7
    vae.to(memory_format=torch.channels_last)
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    plan = BatchPlan(config.vae.batch, 1, accelerator.process_index, accelerator.num_processes)

    def parts_from(place: Place) -> Iterator[dict[str, Any]]:
        return (
            frames_of_step(clips, config.vae, plan, config.run.seed, step, channels, factor)
            for step in range(place.step, config.vae.steps)
        )

    def inputs_of(step: int, part: int, batch: dict[str, Any]) -> dict[str, Tensor]:
        pixels = batch["pixels"].to(accelerator.device, memory_format=torch.channels_last)
        return {"pixels": pixels, "noise": batch["noise"].to(accelerator.device)}

    average = train(
        accelerator,
        VaeLoss(vae, config.vae.kl_weight),
        lambda name: config.vae.lr,
        Stretch("vae", 0, config.vae.steps, WARMUP),
        parts_from,
        inputs_of,
        state,
        run_id,
        dataclasses.replace(config.run, accumulation=1),
        dataclasses.replace(config.optimizer, ema_decay=config.vae.ema_decay),
        Log(accelerator, state.with_suffix(".jsonl"), config.vae.batch, config.run.log_every),
    )
    vae.cpu().load_state_dict({name.removeprefix("vae."): tensor for name, tensor in average.items()})


def frames_of_step(
    clips: RenderedClips, config: VaeConfig, plan: BatchPlan, seed: int, step: int, channels: int, factor: int
) -> dict[str, Any]:
    """This process's frames of a step and the noise of their latents, from (seed, step) and their places in the batch
    alone."""
    cropped = step < CROP_SHARE * config.steps
    size = clips.frames.shape[2]
    side = size // 2 if cropped else size
    frames, noise = [], []
    for position in plan.positions(0):
        for piece in range(CROPS_PER_FRAME if cropped else 1):
            rng = np.random.default_rng([seed, step, position, piece])
            clip, frame = rng.integers(len(clips)), rng.integers(clips.frames.shape[1])
            corner = np.rint(clips.centres[clip, frame] - side / 2 + rng.uniform(-0.19 * size, 0.19 * size, 2))
            x, y = np.clip(corner, 0, size - side).astype(int)
            frames.append(clips.frames[clip, frame, y : y + side, x : x + side])
            noise.append(rng.standard_normal((channels, side // factor, side // factor), np.float32))
    return {"pixels": to_pixels(np.stack(frames)), "noise": torch.from_numpy(np.stack(noise))}


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, frames: np.ndarray) -> float:
    """Mean PSNR in dB of uint8 frames [N, H, W, 3] through the VAE and back."""
    pixels = to_pixels(frames)
    restored = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    pairs = zip(restored.numpy(), pixels.numpy(), strict=True)
    return float(np.mean([psnr(actual, expected, 2.0) for actual, expected in pairs]))


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, frames: np.ndarray) -> float:
    """The factor that brings the latents of uint8 frames [N, H, W, 3] to unit variance, rounded so that it prints
    exactly."""
    return float(np.round(1 / float(vae.encode(to_pixels(frames)).latent_dist.mean.std()), 4))
