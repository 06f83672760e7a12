"""The denoising networks bound to buffers of fixed address on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trip_rt.backends import Engine
from trip_rt.components import TensorSpec, variant
from trip_rt.config import TripConfig
from trip_rt.devices import Buffer, Device, Work
from trip_rt.errors import InputError
from trip_rt.sampling.loop import Array
from trip_rt.sampling.step import Arithmetic, Step, UNetKind


class OpenEngine(Protocol):
    """The engine of a component, to compute in its own precision or in less; None where the bundle has none."""

    def __call__(self, name: str, arithmetic: Arithmetic = "own") -> Engine | None: ...


@dataclass(frozen=True)
class StepBuffers:
    """The tensors of the denoising graphs, by the graphs' own names. Of guidance's halves the unconditional comes
    first.

    latents, residual_noise [2B, C, F, h, w]; first_frame [2B, C, h, w], clean; context [2B, L, K], the text's keys and
    values; features, deep ones of the UNet's, of the manifest's shape; timestep int64 [1]; control_features, of as many
    clips as there are, with the features' shape, where the UNet takes some. All others are fp32.
    """

    latents: Buffer
    first_frame: Buffer
    context: Buffer
    residual_noise: Buffer
    features: Buffer
    timestep: Buffer
    control_features: Buffer | None = None


def step_buffers(
    device: Device,
    config: TripConfig,
    batch: int,
    context_width: int,
    features_shape: Sequence[int],
    controlled: bool = False,
) -> StepBuffers:
    """Buffers for `batch` clips at a time; `context_width` and `features_shape` as in manifest.Profile."""
    return StepBuffers(
        latents=device.zeros("float32", (2 * batch, *config.latent_shape)),
        first_frame=device.zeros("float32", (2 * batch, *config.frame_shape)),
        context=device.zeros("float32", (2 * batch, config.text_length, context_width)),
        residual_noise=device.zeros("float32", (2 * batch, *config.latent_shape)),
        features=device.zeros("float32", (2 * batch, *features_shape)),
        timestep=device.zeros("int64", (1,)),
        control_features=device.zeros("float32", (batch, *features_shape)) if controlled else None,
    )


class BoundUNet:
    """The UNet of every kind of step, each bound when a run first asks for it; `engines` are those that were."""

    def __init__(self, buffers: StepBuffers, open_engine: OpenEngine):
        self._buffers, self._open_engine = buffers, open_engine
        self._works: dict[UNetKind, Work] = {}
        self.engines: dict[UNetKind, Engine] = {}

    def of(self, kind: UNetKind) -> Work:
        """The UNet of that kind; InputError where the bundle has none."""
        if kind not in self._works:
            engine = self._open_engine(variant("unet", kind.guided, kind.shallow), kind.arithmetic)
            if engine is None and kind.shallow:
                raise InputError(
                    "feature reuse: found no engine of the UNet's outermost layer in the bundle; export it again"
                    " without --no-speedups"
                )
            if engine is None:  # the guided network does more than is needed
                whole = kind._replace(guided=True)
                work, engine = self.of(whole), self.engines[whole]
            else:
                tensors = (*engine.spec.inputs, *engine.spec.outputs)
                work = engine.bind({tensor.name: last_rows(self._buffers, tensor) for tensor in tensors})
            self._works[kind], self.engines[kind] = work, engine
        return self._works[kind]

    def drop(self, arithmetic: Arithmetic) -> None:
        """Forget the networks that compute so."""
        for kind in [kind for kind in self._works if kind.arithmetic == arithmetic]:
            del self._works[kind], self.engines[kind]


def last_rows(buffers: StepBuffers, tensor: TensorSpec) -> Buffer:
    """The buffer of that name or, for a graph of half the batch, its conditional half."""
    buffer: Buffer = getattr(buffers, tensor.name)
    return buffer[-tensor.shape[0] :]


class EngineNetworks:
    """UNet and TNF by their engines, for a loop whose latents are on the host (sampling.windows.WindowNetworks)."""

    def __init__(
        self,
        device: Device,
        buffers: StepBuffers,
        unet: BoundUNet,
        open_engine: OpenEngine,
        steer: Callable[[Step], None] = lambda step: None,
    ):
        self._device, self._buffers, self._unet, self._open_engine = device, buffers, unet, open_engine
        self._steer = steer
        self._coefficients = {
            name: device.zeros("float32", (1,)) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar")
        }
        self._latents = halves(buffers.latents)
        self._tnf: dict[bool, tuple[Work, Buffer]] = {}
        self._fusion(True)

    def give(self, first_frame: Array, context: Array) -> None:
        self._device.write(self._buffers.context, context)
        for half in halves(self._buffers.first_frame):
            self._device.write(half, first_frame)

    def unet(self, step: Step, latents: Array) -> None:
        self._steer(step)
        for half in self._latents:
            self._device.write(half, latents)
        self._device.write(self._buffers.timestep, np.array([step.timestep]))
        self._unet.of(step.unet)()

    def fuse(self, step: Step) -> Array:
        for name, buffer in self._coefficients.items():
            self._device.write(buffer, np.array([getattr(step, name)], np.float32))
        work, noise = self._fusion(step.guided)
        work()
        return self._device.read(noise)

    def _fusion(self, guided: bool) -> tuple[Work, Buffer]:
        """TNF's call and its output; the guided one serves unguided steps where the bundle has no other."""
        if guided not in self._tnf:
            engine = self._open_engine(variant("tnf", guided))
            if engine is None:
                return self._fusion(True)
            (output,) = engine.spec.outputs
            noise = self._device.zeros(output.dtype, output.shape)
            inputs = {
                tensor.name: self._coefficients.get(tensor.name) or last_rows(self._buffers, tensor)
                for tensor in engine.spec.inputs
            }
            self._tnf[guided] = engine.bind(inputs | {output.name: noise}), noise
        return self._tnf[guided]


def halves(buffer: Buffer) -> tuple[Buffer, Buffer]:
    """Guidance's two halves, the unconditional and the conditional."""
    batch = buffer.shape[0] // 2
    return buffer[:batch], buffer[batch:]
