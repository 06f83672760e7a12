"""An Animator whose engines sleep, for tests and measurements of what is around them: Ray, queues, losses."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trip_rt.bundle import read_manifest
from trip_rt.serving.protocol import Open

STEP_S = float(os.environ.get("SLEEPING_STEP_S", "0.02"))


class SleepingAnimator:
    """What a worker asks of one: each step of a group of clips sleeps for STEP_S, and the frames are the seed's."""

    backend = "sleeping"

    def __init__(self, opening: Open):
        manifest = read_manifest(Path(opening.bundle))
        self.profile = manifest.profile(opening.profile)
        self.config = manifest.config_of(self.profile)
        self.closed = False

    def latents(self, pictures, prompts, seeds, *, settings=None, on_step=None, num_inference_steps=None, **_):
        steps = num_inference_steps or len(settings.steps(self.config))
        for done in range(1, steps + 1):
            time.sleep(STEP_S)
            if on_step is not None:
                on_step(done, steps)
        return np.stack([np.full(self.config.latent_shape, seed % 251, np.float32) for seed in seeds])

    def decode(self, latents: np.ndarray, picture=None) -> Iterator[np.ndarray]:
        config = self.config
        yield np.full((config.num_frames, config.height, config.width, 3), int(latents.flat[0]), np.uint8)

    def describe(self) -> dict:
        return {"device": "none"}

    def close(self) -> None:
        self.closed = True


def open_sleeping(opening: Open) -> SleepingAnimator:
    return SleepingAnimator(opening)
