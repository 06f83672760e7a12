"""The randomness of a training step. A clip's timestep, its noise and whether its text is dropped depend on (seed,
step, place in the batch) alone.

So a resumed run draws what an uninterrupted run draws, and several processes draw together what one process draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trip_reference.training.config import LossConfig


@dataclass(frozen=True)
class Draws:
    """noise: [b, C, F, h, w] of unit variance; timestep: int64 [b]; drop_text: bool [b]."""

    noise: Tensor
    timestep: Tensor
    drop_text: Tensor


def draw(
    seed: int,
    step: int,
    positions: Sequence[int],
    batch: int,
    shape: Sequence[int],
    num_train_timesteps: int,
    config: LossConfig,
    drop: bool = True,
) -> Draws:
    """What the clips at `positions` of a step's `batch` get; `shape` is one clip's latents [C, F, h, w].

    Timesteps are stratified: one comes from each of `batch` equal parts of their distribution, because the loss depends
    on t more than on the clip.
    """
    whole = np.random.default_rng([seed, step])
    quantile = (whole.permutation(batch) + whole.random(batch)) / batch
    timestep = (np.sqrt(quantile) if config.timesteps == "high" else quantile) * num_train_timesteps
    dropped = whole.random(batch) < config.text_dropout * drop
    places = list(positions)
    noise = [torch.randn(tuple(shape), generator=_generator(seed, step, position)) for position in places]
    return Draws(torch.stack(noise), torch.from_numpy(timestep[places]).long(), torch.from_numpy(dropped[places]))


def seed_torch(seed: int, step: int, part: int, rank: int) -> None:
    """Set torch's own generators, from which dropout draws, for one part of a step in one process."""
    torch.manual_seed(int(np.random.default_rng([seed, step, part, rank, 1]).integers(2**62)))


def _generator(seed: int, step: int, position: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.default_rng([seed, step, position]).integers(2**62)))
