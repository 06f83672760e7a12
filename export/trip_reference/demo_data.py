"""Training data from the demo world: scenes and their rendered clips, and the latents that the denoiser trains on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from trip_reference import demo_world
from trip_reference.model import TripModel
from trip_rt.config import TripConfig


@dataclass(frozen=True)
class DemoClips:
    """`frames` is uint8 [N, F, H, W, 3]; `centres` are the shapes' middles in pixels (x, y), float32 [N, F, 2]."""

    scenes: list[demo_world.Scene]
    motions: list[str]
    frames: NDArray[np.uint8]
    centres: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.scenes)


def render_clips(config: TripConfig, count: int, first_seed: int = 0, held_out: bool = False) -> DemoClips:
    """The clips of seeds `first_seed` … `first_seed + count − 1`."""
    scenes, motions, frames, centres = [], [], [], []
    for seed in tqdm(range(first_seed, first_seed + count), desc="render clips", unit="clip", disable=None):
        scene, motion, _ = demo_world.sample(seed, held_out)
        scenes.append(scene)
        motions.append(motion)
        frames.append(demo_world.render(scene, motion, config.num_frames, config.height))
        cover = demo_world.mask(scene, motion, config.num_frames, config.height)
        pixels = np.arange(config.height, dtype=np.float32)
        total = cover.sum((1, 2))
        centres.append(np.stack([(cover.sum(1) @ pixels) / total, (cover.sum(2) @ pixels) / total], axis=1))
    return DemoClips(scenes, motions, np.stack(frames), np.stack(centres).astype(np.float32))


def to_pixels(frames: NDArray[np.uint8]) -> Tensor:
    """uint8 [..., H, W, 3] → float32 [..., 3, H, W] in [−1, 1]."""
    return torch.from_numpy(np.moveaxis(frames, -1, -3).astype(np.float32) / 127.5 - 1)


@torch.no_grad()
def encode_clips(model: TripModel, frames: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, F, H, W, 3] → latents float32 [N, C, F, h, w]."""
    return torch.stack([model.encode_image(to_pixels(clip)).transpose(0, 1) for clip in tqdm(frames, desc="encode clips", unit="clip", disable=None)])
