"""The randomness of a training step: every clip's timestep, noise and dropped text follow from (seed, step, place in
the batch) alone.

So a resumed run draws what an undisturbed one would, and many processes draw together what one would alone.
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

    Timesteps come one from each of `batch` equal parts of their distribution, as the loss varies more with t than with
    the clip.
    """
    whole = np.random.default_rng([seed, step])
    quantile = (whole.permutation(batch) + whole.random(batch)) / batch
    timestep = (np.sqrt(quantile) if config.timesteps == "high" else quantile) * num_train_timesteps
    dropped = whole.random(batch) < config.text_dropout * drop
    chosen = list(positions)
    noise = [torch.randn(tuple(shape), generator=_generator(seed, step, position)) for position in chosen]
    return Draws(torch.stack(noise), torch.from_numpy(timestep[chosen]).long(), torch.from_numpy(dropped[chosen]))


def seed_torch(seed: int, step: int, part: int, rank: int) -> None:
    """Set torch's own generators, from which dropout draws, for one part of a step in one process."""
    torch.manual_seed(int(np.random.default_rng([seed, step, part, rank, 1]).integers(2**62)))


def _generator(seed: int, step: int, position: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.default_rng([seed, step, position]).integers(2**62)))
