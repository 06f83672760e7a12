"""The denoising loop: DDIM with classifier-free guidance on the fused noise, frame 1 held at the given picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from trip_rt.schedule import DDIMStep

Array = NDArray[np.float32]


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Array:
    """Unit Gaussian noise float32 [len(seeds), *shape]; each clip's depends on its own seed alone."""
    return np.stack([np.random.Generator(np.random.Philox(seed)).standard_normal(shape, np.float32) for seed in seeds])


def ddim_loop(
    predict_noise: Callable[[Array, DDIMStep], Array],
    first_frame: Array,
    noise: Array,
    steps: Sequence[DDIMStep],
    guidance_scale: float,
    on_step: Callable[[int, int], None] | None = None,
) -> Array:
    """Clean latents float32 [B, C, F, h, w] from `noise` of that shape and the clean `first_frame` [B, C, h, w].

    `predict_noise(latents, step)` gets [2B, C, F, h, w], the unconditional half first, and returns the fused noise ε̃ of both;
    `on_step(done, total)` is called after every step.
    """
    latents = noise.copy()
    for done, step in enumerate(steps, start=1):
        # Frame 1 follows its exact path, on which its prior is its exact noise.
        latents[:, :, 0] = step.sqrt_alpha_bar * first_frame + step.sqrt_one_minus_alpha_bar * noise[:, :, 0]
        unconditional, conditional = np.split(predict_noise(np.concatenate([latents, latents]), step), 2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        latents = (step.a * latents + step.b * guided).astype(np.float32)
        if on_step:
            on_step(done, len(steps))
    latents[:, :, 0] = first_frame
    return latents
