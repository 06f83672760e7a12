"""The denoising loop: the UNet, the fusion with the image noise prior, guidance, the solver's update, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trip_rt.devices import Device, Work
from trip_rt.sampling.step import History, Step, UNetKind, advance, guide, hold_first_frame

Array = NDArray[np.float32]
OnStep = Callable[[int, int], None]


class Networks(Protocol):
    """The engines of a denoising step; what one leaves for the next stays on the device."""

    def unet(self, step: Step, latents: Array) -> None:
        """Residual noise Δε̃ of `latents` [B, C, F, h, w], for both of guidance's halves or the conditional one."""

    def fuse(self, step: Step) -> Array:
        """ε̃ of Δε̃ and the image noise prior (TNF), [2B, C, F, h, w] or [B, C, F, h, w]."""


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Array:
    """Unit Gaussian noise float32 [len(seeds), *shape]; each clip's depends on its own seed alone."""
    return np.stack([np.random.Generator(np.random.Philox(seed)).standard_normal(shape, np.float32) for seed in seeds])


def denoise(
    networks: Networks, first_frame: Array, noise: Array, steps: Sequence[Step], on_step: OnStep | None = None
) -> Array:
    """Clean latents [B, C, F, h, w] from `noise` of that shape; frame 1 is held at `first_frame` [B, C, h, w]."""
    latents, history = noise.copy(), History()
    for done, step in enumerate(steps, 1):
        hold_first_frame(step, latents, first_frame, noise[:, :, 0])
        networks.unet(step, latents)
        guided = guide(step, networks.fuse(step), len(latents))
        latents, history = advance(step, latents, guided, history)
        if on_step:
            on_step(done, len(steps))
    latents[:, :, 0] = first_frame
    return latents


def denoise_on_gpu(
    device: Device,
    works: Mapping[UNetKind, Work],
    steps: Sequence[Step],
    on_step: OnStep | None = None,
    steer: Callable[[Step], None] = lambda step: None,
) -> None:
    """The same where the fused kernel does all that follows the UNet: the host only says which kind of step is next.

    `works[step.unet]` is UNet and kernel, one CUDA graph; latents and the steps' numbers are on the GPU already.
    `steer` makes the UNet's control right for a step.
    """
    for done, step in enumerate(steps, 1):
        steer(step)
        works[step.unet]()
        device.pace()
        if on_step:
            on_step(done, len(steps))
