"""What a denoising step does after the UNet: fuse the prior, guide, update the latents, hold frame 1. By an engine and
numpy, or by one kernel."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from trip_rt.backends import Engine
from trip_rt.devices import Device
from trip_rt.errors import InputError
from trip_rt.manifest import KernelSpec
from trip_rt.sampler import Array, LoopBuffers

if TYPE_CHECKING:
    from trip_rt.devices.cuda import CudaDevice


class AfterUNet(Protocol):
    """One row of the step table, done to the loop's buffers. `name` says by what; `capturable` whether a CUDA graph can
    record it."""

    name: str
    capturable: bool

    def __call__(self) -> None: ...


class EngineStep:
    """TNF by its engine, the rest by numpy: on any device, but through the host. An engine of half the batch is that of
    steps without guidance, and works on the conditional half."""

    name = "the engine of tnf"
    capturable = False

    def __init__(self, device: Device, buffers: LoopBuffers, tnf: Engine):
        self._device, self._buffers = device, buffers
        self._signal, self._sigma = device.zeros("float32", (1,)), device.zeros("float32", (1,))
        self._noise = device.zeros("float32", tnf.spec.outputs[0].shape)
        halves = {
            name: getattr(buffers, name)[-self._noise.shape[0] :]
            for name in ("latents", "first_frame", "residual_noise")
        }
        coefficients = {
            "timestep": buffers.timestep,
            "sqrt_alpha_bar": self._signal,
            "sqrt_one_minus_alpha_bar": self._sigma,
        }
        self._tnf = tnf.bind(halves | coefficients | {"noise": self._noise})

    def __call__(self) -> None:
        device, buffers = self._device, self._buffers
        row = int(device.read(buffers.step)[0])
        columns = device.read(buffers.table.row(row))
        _, signal, sigma, guidance_scale = columns[:4]
        of_latents, of_corrected, (next_timestep, next_signal, next_sigma) = columns[4:9], columns[9:14], columns[14:]
        batch = clips(buffers)
        latents, first_frame = device.read(buffers.latents[:batch]), device.read(buffers.first_frame[:batch])
        if row > 0:
            device.write(self._signal, np.array([signal]))
            device.write(self._sigma, np.array([sigma]))
            self._tnf()
            noise = device.read(self._noise)
            if len(noise) > batch:
                unconditional, conditional = np.split(noise, 2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            history = device.read(buffers.history)
            terms = (latents, noise, *history)
            clean = (latents - sigma * noise) / signal
            device.write(buffers.history, np.stack([_combined(of_corrected, terms), clean, history[1]]))
            latents = _combined(of_latents, terms)
        # Frame 1 follows its exact path, on which its prior is its exact noise.
        latents[:, :, 0] = next_signal * first_frame + next_sigma * device.read(buffers.first_noise)
        device.write(buffers.latents, np.concatenate([latents, latents]))
        device.write(buffers.timestep, np.array([next_timestep], np.int64))
        device.write(buffers.step, np.array([row + 1], np.int32))


def _combined(coefficients: Array, terms: Sequence[Array]) -> Array:
    """The linear combination, without the terms whose coefficient is 0."""
    parts = [coefficient * term for coefficient, term in zip(coefficients, terms, strict=True) if coefficient != 0]
    return sum(parts[1:], start=parts[0]) if parts else np.zeros_like(terms[0])


def clips(buffers: LoopBuffers) -> int:
    """How many clips: half of what guidance doubles."""
    return buffers.latents.shape[0] // 2


class KernelStep:
    """All of it in one launch of the fused kernel (trip_kernels/fused_step.py), compiled when the bundle was made."""

    capturable = True

    def __init__(self, device: CudaDevice, buffers: LoopBuffers, folder: Path, spec: KernelSpec, capability: str):
        cubin = spec.cubins[capability]
        self.name = f"the fused kernel for compute capability {capability}"
        self._device, self._cubin, self.buffers = device, cubin, buffers
        batch, pixels = clips(buffers), int(np.prod(buffers.first_frame.shape[2:]))
        self._programs = batch * -(-pixels // cubin.pixels)
        blob = np.fromfile(folder / spec.weights, np.uint8)
        weights = device.zeros("uint8", blob.shape)
        device.write(weights, blob)
        known: dict[str, tuple[int, Any]] = {
            name: (buffer.address, ctypes.c_void_p) for name, buffer in vars(buffers).items() if buffer
        }
        known |= {name: (weights.address + start, ctypes.c_void_p) for name, start in spec.tensors.items()}
        known |= {"batch": (batch, ctypes.c_int32), "pixels": (pixels, ctypes.c_int32), "scratch": (0, ctypes.c_void_p)}
        if unknown := [name for name in spec.parameters if name not in known]:
            raise InputError(
                f"{cubin.file}: found a kernel that wants {', '.join(unknown)}, which this trip-rt does not know;"
                " upgrade it or export again"
            )
        self._arguments, self._types = zip(*(known[name] for name in spec.parameters), strict=True)
        self._function = device.kernel((folder / cubin.file).read_bytes(), spec.entry, cubin.shared_bytes)

    def __call__(self) -> None:
        self._device.launch(
            self._function, self._programs, self._cubin.warps, self._cubin.shared_bytes, self._arguments, self._types
        )


def after_unet(device: Device, buffers: LoopBuffers, tnf: Engine, folder: Path, kernel: KernelSpec | None) -> AfterUNet:
    """The fused kernel where the bundle has one for this GPU; on a GPU without, a warning that says so."""
    if device.kind == "cpu":
        return EngineStep(device, buffers, tnf)
    from trip_rt.devices.cuda import CudaDevice

    assert isinstance(device, CudaDevice)
    there = device.compute_capability
    if kernel and (capability := fitting(kernel.cubins, there)):
        return KernelStep(device, buffers, folder, kernel, capability)
    found = f"kernels for compute capability {', '.join(kernel.cubins)}" if kernel else "no kernel of this precision"
    warnings.warn(
        f"the bundle has {found}, this GPU ({device.name}) is {there}: the engine of tnf runs in its place, more"
        " slowly; export the bundle again with this GPU among --gpus, if trip-export knows it",
        stacklevel=2,
    )
    return EngineStep(device, buffers, tnf)


def fitting(capabilities: Iterable[str], there: str) -> str | None:
    """Of the capabilities compiled for, the one to run on `there`: machine code runs on its own and on later minor
    versions of the same major one."""
    major, minor = map(int, there.split("."))
    minors = [int(name.split(".")[1]) for name in capabilities if int(name.split(".")[0]) == major]
    best = max((found for found in minors if found <= minor), default=None)
    return None if best is None else f"{major}.{best}"
