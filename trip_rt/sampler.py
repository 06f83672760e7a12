"""The denoising loop: DDIM with classifier-free guidance on the fused noise, frame 1 held at the given picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trip_rt.config import TripConfig
from trip_rt.devices import Buffer, Device
from trip_rt.devices.base import Work
from trip_rt.schedule import STEP_COLUMNS, DDIMStep, step_table

Array = NDArray[np.float32]


@dataclass(frozen=True)
class LoopBuffers:
    """All that the loop reads and writes, on one device; of guidance's two halves the unconditional comes first.

    latents [2B, C, F, h, w]: both halves equal, moved on in place; first_frame [2B, C, h, w]: clean, both halves equal; first_noise [B, C, h, w]:
    frame 1's own; text [2B, L, D]; residual_noise [2B, C, F, h, w]: the UNet's output; timestep int64 [1]; table [rows, columns]: a step_table
    of any number of steps; step int32 [1]: the row to do next; done int32 [1]: a count of the fused kernel's own, zero between steps.
    """

    latents: Buffer
    first_frame: Buffer
    first_noise: Buffer
    text: Buffer
    residual_noise: Buffer
    timestep: Buffer
    table: Buffer
    step: Buffer
    done: Buffer


def loop_buffers(device: Device, config: TripConfig, batch: int) -> LoopBuffers:
    """Buffers for `batch` clips at a time."""
    channels, frames, size = config.latent_channels, config.num_frames, (config.latent_height, config.latent_width)
    return LoopBuffers(
        latents=device.zeros("float32", (2 * batch, channels, frames, *size)),
        first_frame=device.zeros("float32", (2 * batch, channels, *size)),
        first_noise=device.zeros("float32", (batch, channels, *size)),
        text=device.zeros("float32", (2 * batch, config.text_length, config.text_width)),
        residual_noise=device.zeros("float32", (2 * batch, channels, frames, *size)),
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
    denoising_step: Work,
    after_unet: Work,
    noise: Array,
    steps: Sequence[DDIMStep],
    guidance_scale: float,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Turn `buffers.latents` into clean latents, from `noise` [B, C, F, h, w] and the `first_frame` and `text` that are there.

    `after_unet` does all of a step but the UNet and moves `buffers.step` on; `denoising_step` is the UNet and then that. The loop only counts: what a
    step is made of lies in the step table on the device. `on_step(done, total)` is called as steps end.
    """
    device.write(buffers.latents, np.concatenate([noise, noise]))
    device.write(buffers.first_noise, noise[:, :, 0])
    device.write(buffers.residual_noise, np.zeros(buffers.residual_noise.shape, np.float32))  # the beginning multiplies it by 0: no NaN may be there
    device.write(buffers.table[: len(steps) + 1], step_table(steps, guidance_scale))
    device.write(buffers.step, np.zeros(1, np.int32))
    after_unet()  # the table's row 0: frame 1 on its path, the first timestep
    for done in range(1, len(steps) + 1):
        denoising_step()
        device.pace()
        if on_step:
            on_step(done, len(steps))
