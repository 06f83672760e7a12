"""Frames of the demo world that its VAE is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from trip_reference import demo_world
from trip_rt.config import TripConfig


@dataclass(frozen=True)
class DemoClips:
    """`frames` is uint8 [N, F, H, W, 3]; `centres` are the shapes' middles in pixels (x, y), float32 [N, F, 2]."""

    frames: NDArray[np.uint8]
    centres: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.frames)


def render_clips(config: TripConfig, count: int, first_seed: int = 0, held_out: bool = False) -> DemoClips:
    """The clips of seeds `first_seed` … `first_seed + count − 1`."""
    frames, centres = [], []
    for seed in tqdm(range(first_seed, first_seed + count), desc="render clips", unit="clip", disable=None):
        scene, motion, _ = demo_world.sample(seed, held_out)
        frames.append(demo_world.render(scene, motion, config.num_frames, config.height))
        cover = demo_world.mask(scene, motion, config.num_frames, config.height)
        pixels = np.arange(config.height, dtype=np.float32)
        total = cover.sum((1, 2))
        centres.append(np.stack([(cover.sum(1) @ pixels) / total, (cover.sum(2) @ pixels) / total], axis=1))
    return DemoClips(np.stack(frames), np.stack(centres).astype(np.float32))


def to_pixels(frames: NDArray[np.uint8]) -> Tensor:
    """uint8 [..., H, W, 3] → float32 [..., 3, H, W] in [−1, 1]."""
    return torch.from_numpy(np.moveaxis(frames, -1, -3).astype(np.float32) / 127.5 - 1)
