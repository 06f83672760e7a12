"""The first stage: the VAE, on single frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from trip_reference.data.loader import BatchPlan
from trip_reference.data.sample import Sample
from trip_reference.model import to_pixels
from trip_reference.training.config import TrainConfig, VaeConfig
from trip_reference.training.log import Log
from trip_reference.training.loop import Stretch, train
from trip_reference.training.state import Place
from trip_rt.accuracy import psnr
from trip_rt.config import TripConfig

CROP_SHARE = 0.8  # the first 80 % of the steps see crops, the rest whole frames
CROPS_PER_FRAME = 3  # in a batch: a crop costs a quarter of a frame
WARMUP = 100
MOST_BYTES = 2**30  # of frames in memory
AT_ONCE = 16  # frames that are measured together


@dataclass(frozen=True)
class Clips:
    """What the VAE learns from: `frames` uint8 [N, F, H, W, 3], and where something is to be seen in them: `centres` in
    pixels (x, y), float32 [N, F, 2]; None: anywhere."""

    frames: NDArray[np.uint8]
    centres: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Clips:
        return cls(np.stack([sample.frames for sample in samples]))

    @property
    def each(self) -> NDArray[np.uint8]:
        """The frames, [N·F, H, W, 3]."""
        return self.frames.reshape(-1, *self.frames.shape[2:])


def most_clips(trip: TripConfig) -> int:
    """How many clips MOST_BYTES can hold."""
    return max(1, MOST_BYTES // (3 * trip.num_frames * trip.height * trip.width))


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
    vae: AutoencoderKL, clips: Clips, config: TrainConfig, accelerator: Accelerator, state: Path, run_id: str
) -> None:
    """Train `vae` to give frames back and leave the averaged weights in it.

    Most steps see half-size crops: around the shape in the demo world, where on whole frames a shape is a twentieth of
    the pixels and the network would learn only backgrounds for thousands of steps; anywhere in other clips.
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
    clips: Clips, config: VaeConfig, plan: BatchPlan, seed: int, step: int, channels: int, factor: int
) -> dict[str, Any]:
    """This process's frames of a step and the noise of their latents, from (seed, step) and their places in the batch
    alone."""
    cropped = step < CROP_SHARE * config.steps
    size = np.array(clips.frames.shape[2:4])  # height, width
    side = np.maximum(size // 2 // factor, 1) * factor if cropped else size
    frames, noise = [], []
    for position in plan.positions(0):
        for piece in range(CROPS_PER_FRAME if cropped else 1):
            rng = np.random.default_rng([seed, step, position, piece])
            clip, frame = rng.integers(len(clips.frames)), rng.integers(clips.frames.shape[1])
            if clips.centres is None:
                corner = rng.uniform(0, (size - side)[::-1])
            else:
                near = 0.19 * size[::-1]
                corner = clips.centres[clip, frame] - side[::-1] / 2 + rng.uniform(-near, near)
            x, y = np.clip(np.rint(corner), 0, (size - side)[::-1]).astype(int)
            frames.append(clips.frames[clip, frame, y : y + side[0], x : x + side[1]])
            noise.append(rng.standard_normal((channels, *side // factor), np.float32))
    return {"pixels": to_pixels(np.stack(frames)), "noise": torch.from_numpy(np.stack(noise))}


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, frames: np.ndarray) -> float:
    """Mean PSNR in dB of uint8 frames [N, H, W, 3] through the VAE and back."""
    found = []
    for pixels in map(to_pixels, _some(frames)):
        restored = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        pairs = zip(restored.numpy(), pixels.numpy(), strict=True)
        found += [psnr(actual, expected, 2.0) for actual, expected in pairs]
    return float(np.mean(found))


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, frames: np.ndarray) -> float:
    """The factor that brings the latents of uint8 frames [N, H, W, 3] to unit variance, rounded so that it prints
    exactly."""
    latents = torch.cat([vae.encode(to_pixels(some)).latent_dist.mean for some in _some(frames)])
    return float(np.round(1 / float(latents.std()), 4))


def _some(frames: np.ndarray) -> Iterator[np.ndarray]:
    return (frames[first : first + AT_ONCE] for first in range(0, len(frames), AT_ONCE))
