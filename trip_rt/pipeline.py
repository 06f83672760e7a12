"""The engines of a bundle bound to buffers on one device: tokens and pictures in, frames out, and nothing through the
host in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt.after_unet import AfterUNet, after_unet
from trip_rt.backends import Engine
from trip_rt.config import TripConfig
from trip_rt.devices import Buffer, Device
from trip_rt.devices.base import Work
from trip_rt.errors import InputError
from trip_rt.manifest import Profile, TensorSpec
from trip_rt.sampler import Array, denoise, loop_buffers
from trip_rt.speed import LoopStep


class Pipeline:
    """Runs `profile.batch` clips at a time: `encode`, then `denoise`, then `decode` each.

    `engine` opens a component's engine, or gives None where the bundle has none; those that only some steps need are
    asked for when they come. `cuda_graph`: whether a step is recorded once as a CUDA graph and replayed, where the
    engine lets itself be recorded; `graph` says whether it was. `folder` is the bundle's, for the kernels.
    """

    def __init__(
        self,
        device: Device,
        config: TripConfig,
        profile: Profile,
        engine: Callable[[str], Engine | None],
        folder: Path,
        cuda_graph: bool,
    ):
        self._device, self._profile, self._folder, self._engine, self._cuda_graph = (
            device,
            profile,
            folder,
            engine,
            cuda_graph,
        )
        self._runs = 0
        self._text, self._projection, self._image, self._decoder = (
            _Bound(device, _present(engine, name))
            for name in ("text_encoder", "text_projection", "vae_encoder", "vae_decoder")
        )
        self._frames = device.read_back(self._decoder.output)
        self.buffers = loop_buffers(device, config, profile.batch, profile.context_width, profile.features_shape)
        self.graph = False
        self._after: dict[bool, AfterUNet] = {}
        self._works: dict[tuple[bool, bool], Work] = {}
        self.after_unet = self._after_unet(True)
        self._work(True, False)

    def _work(self, guided: bool, shallow: bool) -> Work:
        """A denoising step with guidance or without, by the whole UNet or by its outermost layer; InputError where the
        bundle cannot."""
        if (guided, shallow) not in self._works:
            engine = self._engine(f"unet{'' if guided else '_unguided'}{'_shallow' if shallow else ''}")
            if engine is None and not shallow:
                self._works[guided, shallow] = self._work(True, False)  # which does more than is needed
                return self._works[guided, shallow]
            if engine is None:
                raise InputError(
                    "feature reuse: found no engine of the UNet's outermost layer in the bundle; export it again"
                    " without --no-speedups"
                )
            unet = engine.bind(
                {tensor.name: self._part(tensor) for tensor in (*engine.spec.inputs, *engine.spec.outputs)}
            )
            after_unet = self._after_unet(guided)

            def denoising_step() -> None:
                unet()
                after_unet()

            graph = self._cuda_graph and self._device.kind == "cuda" and engine.capturable and after_unet.capturable
            self.graph |= graph
            self._works[guided, shallow] = engine.capture(denoising_step) if graph else denoising_step
        return self._works[guided, shallow]

    def _part(self, tensor: TensorSpec) -> Buffer:
        """The loop's buffer of that name, or its conditional half for an engine of half the batch."""
        buffer: Buffer = getattr(self.buffers, tensor.name)
        return buffer[-tensor.shape[0] :]

    def _after_unet(self, guided: bool) -> AfterUNet:
        if guided not in self._after:
            if not guided and self.after_unet.capturable:
                return self.after_unet  # the kernel serves both kinds of step
            tnf = self._engine("tnf" if guided else "tnf_unguided")
            if tnf is None:
                return self.after_unet
            precision = _present(self._engine, "unet").spec.precision
            self._after[guided] = after_unet(
                self._device, self.buffers, tnf, self._folder, self._profile.kernels.get(precision)
            )
        return self._after[guided]

    def encode(self, unconditional: NDArray[np.int64], conditional: NDArray[np.int64], pixels: Array) -> None:
        """Token ids [B, L] of both halves and pictures [B, 3, H, W], −1 to 1, to the loop's `context` and
        `first_frame`."""
        device, buffers, batch = self._device, self.buffers, self._profile.batch
        self._runs += 1
        for half, ids in (self._projection.input[:batch], unconditional), (self._projection.input[batch:], conditional):
            device.write(self._text.input, ids)
            self._text.run()
            device.copy(self._text.output, half)
        self._projection.run()
        device.copy(self._projection.output, buffers.context)
        device.write(self._image.input, pixels)
        self._image.run()
        for half in buffers.first_frame[:batch], buffers.first_frame[batch:]:
            device.copy(self._image.output, half)

    def denoise(
        self, noise: Array, steps: Sequence[LoopStep], on_step: Callable[[int, int], None] | None = None
    ) -> None:
        """The loop on what `encode` left, from `noise` [B, C, F, h, w]; InputError where the bundle lacks what a step
        asks for."""
        works = {(step.guided, step.shallow): self._work(step.guided, step.shallow) for step in steps}
        denoise(self._device, self.buffers, works, self.after_unet, noise, steps, on_step)

    def latents(self) -> Array:
        """The loop's result so far, [B, C, F, h, w]."""
        return self._device.read(self.buffers.latents[: self._profile.batch])

    def load_latents(self, latents: Array) -> None:
        """Put one clip [C, F, h, w] where `decode(0)` finds it."""
        self._runs += 1
        self._device.write(self.buffers.latents.row(0), latents)

    def decode(self, clip: int) -> Iterator[Array]:
        """A clip's frames float32 [≤ decode_frames, 3, H, W], about −1 to 1, chunk by chunk so that memory stays flat;
        on a GPU the next chunk is being decoded while the caller has this one. RuntimeError if another clip has taken
        this one's place meanwhile."""
        latents = self.buffers.latents.row(clip)
        frames, chunk = latents.shape[1], self._decoder.input.shape[0]
        self._frames.drop()  # what an abandoned decode left
        waiting: list[int] = []
        run = self._runs
        for start in range(0, frames, chunk):
            if self._runs != run:
                raise RuntimeError(
                    "decode: found another clip begun before this one's frames were all taken; take them first"
                )
            # The last chunk repeats its last frame, as shapes are static.
            self._device.gather_frames(
                latents, [min(frame, frames - 1) for frame in range(start, start + chunk)], self._decoder.input
            )
            self._decoder.run()
            self._frames.put()
            waiting.append(min(chunk, frames - start))
            if len(waiting) == self._frames.depth:
                yield self._frames.take()[: waiting.pop(0)]
        for count in waiting:
            yield self._frames.take()[:count]


def _present(engine: Callable[[str], Engine | None], name: str) -> Engine:
    found = engine(name)
    assert found  # the manifest's schema asks for it
    return found


class _Bound:
    """An engine of one input and one output, with a buffer for each; `run` queues it."""

    def __init__(self, device: Device, engine: Engine):
        (given,), (made,) = engine.spec.inputs, engine.spec.outputs
        self.input, self.output = device.zeros(given.dtype, given.shape), device.zeros(made.dtype, made.shape)
        self.run: Callable[[], Any] = engine.bind({given.name: self.input, made.name: self.output})
