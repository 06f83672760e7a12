"""The denoising loop: a solver's steps with classifier-free guidance on the fused noise, frame 1 held at the given
picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trip_rt.config import TripConfig
from trip_rt.devices import Buffer, Device
from trip_rt.devices.base import Work
from trip_rt.speed import STEP_COLUMNS, LoopStep, step_table

Array = NDArray[np.float32]


@dataclass(frozen=True)
class LoopBuffers:
    """All that the loop reads and writes, on one device; of guidance's two halves the unconditional comes first.

    latents [2B, C, F, h, w]: both halves equal, moved on in place; first_frame [2B, C, h, w]: clean, both halves equal;
    first_noise [B, C, h, w]: frame 1's own; context [2B, L, K]: the text's keys and values; residual_noise [2B, C, F,
    h, w]: the UNet's output; features: deep ones of the UNet's, of the manifest's shape; history [3, B, C, F, h, w]:
    corrected latents and the clean latents of the two steps before (solvers.Step); timestep int64 [1]; table [rows,
    columns]: a step_table of any number of steps; step int32 [1]: the row to do next; done int32 [1]: a count of the
    fused kernel's own, zero between steps.
    """

    latents: Buffer
    first_frame: Buffer
    first_noise: Buffer
    context: Buffer
    residual_noise: Buffer
    features: Buffer
    history: Buffer
    timestep: Buffer
    table: Buffer
    step: Buffer
    done: Buffer


def loop_buffers(
    device: Device, config: TripConfig, batch: int, context_width: int, features_shape: Sequence[int]
) -> LoopBuffers:
    """Buffers for `batch` clips at a time; the last two as in manifest.Profile."""
    channels, frames, size = config.latent_channels, config.num_frames, (config.latent_height, config.latent_width)
    return LoopBuffers(
        latents=device.zeros("float32", (2 * batch, channels, frames, *size)),
        first_frame=device.zeros("float32", (2 * batch, channels, *size)),
        first_noise=device.zeros("float32", (batch, channels, *size)),
        context=device.zeros("float32", (2 * batch, config.text_length, context_width)),
        residual_noise=device.zeros("float32", (2 * batch, channels, frames, *size)),
        features=device.zeros("float32", (2 * batch, *features_shape)),
        history=device.zeros("float32", (3, batch, channels, frames, *size)),
        timestep=device.zeros("int64", (1,)),
        table=device.zeros("float32", (config.schedule.num_train_timesteps + 1, len(STEP_COLUMNS))),
        step=device.zeros("int32", (1,)),
        done=device.zeros("int32", (1,)),
    )


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Array:
    """Unit Gaussian noise float32 [len(seeds), *shape]; each clip's depends on its own seed alone."""
    return np.stack([np.random.Generator(np.random.Philox(seed)).standard_normal(shape, np.float32) for seed in seeds])


def denoise(
    device: Device,
    buffers: LoopBuffers,
    works: Mapping[tuple[bool, bool], Work],
    after_unet: Work,
    noise: Array,
    steps: Sequence[LoopStep],
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Turn `buffers.latents` into clean latents, from `noise` [B, C, F, h, w] and the `first_frame` and `context` that
    are there.

    `works[guided, shallow]` is a step of that kind: a UNet and then what `after_unet` does, which is all the rest and
    moves `buffers.step` on. The loop only counts: what a step is made of lies in the step table on the device.
    `on_step(done, total)` is called as steps end.
    """
    device.write(buffers.latents, np.concatenate([noise, noise]))
    device.write(buffers.first_noise, noise[:, :, 0])
    # The beginning multiplies them by 0: no NaN may be there.
    device.write(buffers.residual_noise, np.zeros(buffers.residual_noise.shape, np.float32))
    device.write(buffers.history, np.zeros(buffers.history.shape, np.float32))
    device.write(buffers.table[: len(steps) + 1], step_table(steps))
    device.write(buffers.step, np.zeros(1, np.int32))
    after_unet()  # the table's row 0: frame 1 on its path, the first timestep
    for done, step in enumerate(steps, 1):
        works[step.guided, step.shallow]()
        device.pace()
        if on_step:
            on_step(done, len(steps))
