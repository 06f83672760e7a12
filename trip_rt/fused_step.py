"""All that follows the UNet in a step, as one launch of a kernel compiled when the bundle was made
(trip_kernels/fused_step.py): fusion, guidance, the solver's update, frame 1 held."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trip_rt.config import TripConfig
from trip_rt.devices import Buffer
from trip_rt.errors import InputError
from trip_rt.manifest import KernelSpec
from trip_rt.networks import StepBuffers, halves
from trip_rt.sampling.loop import Array
from trip_rt.sampling.step import Step
from trip_rt.sampling.step_table import COLUMNS, step_table

if TYPE_CHECKING:
    from trip_rt.devices.cuda import CudaDevice


@dataclass(frozen=True)
class KernelBuffers:
    """What the kernel keeps on the GPU besides the networks' tensors.

    first_noise [B, C, h, w], frame 1's own; history [3, B, C, F, h, w], a sampling.step.History; table [rows, columns],
    a step_table of any number of steps; step int32 [1], the row to do next; done int32 [1], a count of the kernel's
    own, zero between steps.
    """

    first_noise: Buffer
    history: Buffer
    table: Buffer
    step: Buffer
    done: Buffer


class FusedStep:
    """The kernel with its weights on the GPU and buffers of its `own`. A call moves the latents on by the table's next
    row. EngineError where the driver does not take the machine code; then nothing was allocated."""

    def __init__(
        self,
        device: CudaDevice,
        config: TripConfig,
        buffers: StepBuffers,
        folder: Path,
        spec: KernelSpec,
        capability: str,
    ):
        cubin = spec.cubins[capability]
        self.name = f"the fused kernel for compute capability {capability}"
        self._device, self._cubin, self.buffers = device, cubin, buffers
        self._function = device.kernel((folder / cubin.file).read_bytes(), spec.entry, cubin.shared_bytes)
        batch, pixels = buffers.latents.shape[0] // 2, int(np.prod(config.frame_shape[1:]))
        rows = config.schedule.num_train_timesteps + 1
        self.own = KernelBuffers(
            first_noise=device.zeros("float32", (batch, *config.frame_shape)),
            history=device.zeros("float32", (3, batch, *config.latent_shape)),
            table=device.zeros("float32", (rows, len(COLUMNS))),
            step=device.zeros("int32", (1,)),
            done=device.zeros("int32", (1,)),
        )
        self._programs = batch * -(-pixels // cubin.pixels)
        blob = np.fromfile(folder / spec.weights, np.uint8)
        weights = device.zeros("uint8", blob.shape)
        device.write(weights, blob)
        pointers = vars(buffers) | vars(self.own) | {"weights": weights}
        known: dict[str, tuple[int, Any]] = {
            name: (buffer.address, ctypes.c_void_p) for name, buffer in pointers.items() if buffer is not None
        }
        known |= {"batch": (batch, ctypes.c_int32), "pixels": (pixels, ctypes.c_int32), "scratch": (0, ctypes.c_void_p)}
        if unknown := [name for name in spec.parameters if name not in known]:
            raise InputError(
                f"{cubin.file}: found a kernel that wants {', '.join(unknown)}, which this trip-rt does not know; "
                "upgrade it or export again"
            )
        self._arguments, self._types = zip(*(known[name] for name in spec.parameters), strict=True)

    def begin(self, noise: Array, steps: Sequence[Step]) -> None:
        """Put a run's noise [B, C, F, h, w] and steps on the GPU, and frame 1 on its path by the table's row 0."""
        device, own = self._device, self.own
        for half in halves(self.buffers.latents):
            device.write(half, noise)
        device.write(own.first_noise, noise[:, :, 0])
        # Row 0 multiplies these by 0, and a NaN would stay one.
        for buffer in self.buffers.residual_noise, own.history:
            device.write(buffer, np.zeros(buffer.shape, np.float32))
        device.write(own.table[: len(steps) + 1], step_table(steps))
        device.write(own.step, np.zeros(1, np.int32))
        self()

    def __call__(self) -> None:
        cubin = self._cubin
        self._device.launch(
            self._function, self._programs, cubin.warps, cubin.shared_bytes, self._arguments, self._types
        )


def fitting(capabilities: Iterable[str], present: str) -> str | None:
    """Of the capabilities compiled for, the one to run on `present`: machine code runs on its own and, below 9.0, on
    later minor versions of the same major one. From 9.0 on Triton compiles for the features of one capability alone
    (sm_90a, sm_100a, sm_120a)."""
    major, minor = map(int, present.split("."))
    minors = [int(name.split(".")[1]) for name in capabilities if int(name.split(".")[0]) == major]
    fits = [candidate for candidate in minors if candidate == minor or (candidate < minor and major < 9)]
    return f"{major}.{max(fits)}" if fits else None
