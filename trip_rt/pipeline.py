"""The engines of a bundle bound to buffers on one device: tokens and pictures in, frames out, and nothing through the host in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt.after_unet import after_unet
from trip_rt.backends import Engine
from trip_rt.config import TripConfig
from trip_rt.devices import Device
from trip_rt.manifest import Profile
from trip_rt.sampler import Array, denoise, loop_buffers
from trip_rt.schedule import DDIMStep


class Pipeline:
    """Runs `profile.batch` clips at a time: `encode`, then `denoise`, then `decode` each.

    `cuda_graph`: whether a step is recorded once as a CUDA graph and replayed, where the engine lets itself be recorded; `graph` says whether it was.
    `folder` is the bundle's, for the kernels.
    """

    def __init__(self, device: Device, config: TripConfig, profile: Profile, engines: Mapping[str, Engine], folder: Path, cuda_graph: bool):
        self._device, self._batch = device, profile.batch
        self._runs = 0
        self._text, self._image, self._decoder = (_Bound(device, engines[name]) for name in ("text_encoder", "vae_encoder", "vae_decoder"))
        self._frames = device.read_back(self._decoder.output)
        self.buffers = buffers = loop_buffers(device, config, profile.batch)
        unet_engine = engines["unet"]
        unet = unet_engine.bind({tensor.name: getattr(buffers, tensor.name) for tensor in (*unet_engine.spec.inputs, *unet_engine.spec.outputs)})
        self.after_unet = after_unet(device, buffers, engines["tnf"], folder, profile.kernels.get(unet_engine.spec.precision))

        def denoising_step() -> None:
            unet()
            self.after_unet()

        self.graph = cuda_graph and device.kind == "cuda" and unet_engine.capturable and self.after_unet.capturable
        self._denoising_step = unet_engine.capture(denoising_step) if self.graph else denoising_step

    def encode(self, unconditional: NDArray[np.int64], conditional: NDArray[np.int64], pixels: Array) -> None:
        """Token ids [B, L] of both halves and pictures [B, 3, H, W], −1 to 1, to the loop's `text` and `first_frame`."""
        device, buffers, batch = self._device, self.buffers, self._batch
        self._runs += 1
        for half, ids in (buffers.text[:batch], unconditional), (buffers.text[batch:], conditional):
            device.write(self._text.input, ids)
            self._text.run()
            device.copy(self._text.output, half)
        device.write(self._image.input, pixels)
        self._image.run()
        for half in buffers.first_frame[:batch], buffers.first_frame[batch:]:
            device.copy(self._image.output, half)

    def denoise(self, noise: Array, steps: Sequence[DDIMStep], guidance_scale: float, on_step: Callable[[int, int], None] | None = None) -> None:
        """The loop on what `encode` left, from `noise` [B, C, F, h, w]."""
        denoise(self._device, self.buffers, self._denoising_step, self.after_unet, noise, steps, guidance_scale, on_step)

    def latents(self) -> Array:
        """The loop's result so far, [B, C, F, h, w]."""
        return self._device.read(self.buffers.latents[: self._batch])

    def load_latents(self, latents: Array) -> None:
        """Put one clip [C, F, h, w] where `decode(0)` finds it."""
        self._runs += 1
        self._device.write(self.buffers.latents.row(0), latents)

    def decode(self, clip: int) -> Iterator[Array]:
        """A clip's frames float32 [≤ decode_frames, 3, H, W], about −1 to 1, chunk by chunk so that memory stays flat; on a GPU the next chunk is
        being decoded while the caller has this one. RuntimeError if another clip has taken this one's place meanwhile."""
        latents = self.buffers.latents.row(clip)
        frames, chunk = latents.shape[1], self._decoder.input.shape[0]
        self._frames.drop()  # what an abandoned decode left
        waiting: list[int] = []
        run = self._runs
        for start in range(0, frames, chunk):
            if self._runs != run:
                raise RuntimeError("decode: found another clip begun before this one's frames were all taken; take them first")
            # The last chunk repeats its last frame, as shapes are static.
            self._device.gather_frames(latents, [min(frame, frames - 1) for frame in range(start, start + chunk)], self._decoder.input)
            self._decoder.run()
            self._frames.put()
            waiting.append(min(chunk, frames - start))
            if len(waiting) == self._frames.depth:
                yield self._frames.take()[: waiting.pop(0)]
        for count in waiting:
            yield self._frames.take()[:count]


class _Bound:
    """An engine of one input and one output, with a buffer for each; `run` queues it."""

    def __init__(self, device: Device, engine: Engine):
        (given,), (made,) = engine.spec.inputs, engine.spec.outputs
        self.input, self.output = device.zeros(given.dtype, given.shape), device.zeros(made.dtype, made.shape)
        self.run: Callable[[], Any] = engine.bind({given.name: self.input, made.name: self.output})
