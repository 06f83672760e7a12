"""The engines of a bundle bound to buffers on one device: tokens and pictures in, frames out."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt.backends import Engine
from trip_rt.config import ControlConfig, TripConfig
from trip_rt.devices import Device, Work
from trip_rt.errors import EngineError, InputError
from trip_rt.fused_step import FusedStep, fitting
from trip_rt.manifest import Profile
from trip_rt.networks import BoundUNet, EngineNetworks, OpenEngine, halves, step_buffers
from trip_rt.sampling.loop import Array, OnStep, denoise, denoise_on_gpu
from trip_rt.sampling.step import Arithmetic, Step, UNetKind
from trip_rt.sampling.windows import denoise_windows
from trip_rt.steering import Steering
from trip_rt.turns import Turn

_LONG = 0.2  # seconds of a call that is not timed twice


class Pipeline:
    """Runs `profile.batch` clips at a time: `encode`, then `denoise`, then `latents`, and `decode` of each clip's.

    There is one set of buffers: whoever calls the first three holds `turn` from first to last. `decode` takes it by
    itself.

    `open_engine` opens a component's engine; those that only some steps need are asked for when they come. `cuda_graph`
    allows recording a step as a CUDA graph; `graph` says whether one was. `folder` is the bundle's, for the kernels;
    `fused_step` is the kernel that does all after the UNet, if one does.
    """

    def __init__(
        self,
        device: Device,
        config: TripConfig,
        profile: Profile,
        open_engine: OpenEngine,
        folder: Path,
        cuda_graph: bool,
        control: ControlConfig | None = None,
    ):
        self._device, self._profile, self._cuda_graph = device, profile, cuda_graph
        self._open_engine = open_engine
        self.turn = Turn(device.use)
        names = ("text_encoder", "text_projection", "vae_encoder", "vae_decoder")
        self._text, self._projection, self._image, self._decoder = (
            _Bound(device, _present(open_engine, name)) for name in names
        )
        self._frames = device.read_back(self._decoder.output)
        self._clip = device.zeros("float32", config.latent_shape)
        self._decoding: object = None  # whose latents `_clip` holds
        self.buffers = step_buffers(
            device, config, profile.batch, profile.context_width, profile.features_shape, control is not None
        )
        self._steering = self._open_steering()
        self._unet = BoundUNet(self.buffers, open_engine)
        self._unet.of(UNetKind())
        self.graph = False
        self._works: dict[UNetKind, Work] = {}
        self.fused_step = self._open_kernel(config, folder)
        self._networks: EngineNetworks | None = None
        if self.fused_step:
            self._work(UNetKind())
        else:
            self._host_networks()

    def _open_steering(self) -> Steering | None:
        """What hands a clip's control to UNets that take one."""
        if self.buffers.control_features is None:
            return None
        device = self._device
        engine = _present(self._open_engine, "control_encoder")
        (given, _), (result,) = engine.spec.inputs, engine.spec.outputs
        control, features = device.zeros(given.dtype, given.shape), device.zeros(result.dtype, result.shape)
        first_frame, _ = halves(self.buffers.first_frame)
        run = engine.bind({"control": control, "first_frame": first_frame, result.name: features})

        def encode(controls: Array) -> Array:
            device.write(control, controls)
            run()
            return device.read(features)

        return Steering(device, self.buffers.control_features, encode)

    def _steer(self, step: Step) -> None:
        if self._steering:
            self._steering(step)

    @property
    def after_unet(self) -> str:
        """What does the rest of a step, for people."""
        return self.fused_step.name if self.fused_step else "the engine of tnf"

    def _open_kernel(self, config: TripConfig, folder: Path) -> FusedStep | None:
        """The fused kernel for this GPU; None on a CPU and, with a warning, on a GPU that the bundle has none for."""
        if self._device.kind == "cpu":
            return None
        from trip_rt.devices.cuda import CudaDevice

        device = self._device
        assert isinstance(device, CudaDevice)
        kernel = self._profile.kernels.get(self._unet.engines[UNetKind()].spec.precision)
        present = device.compute_capability
        actual = "no kernel of this precision"
        if kernel:
            actual = f"kernels for compute capability {', '.join(kernel.cubins)}"
            if capability := fitting(kernel.cubins, present):
                try:
                    return FusedStep(device, config, self.buffers, folder, kernel, capability)
                except EngineError as error:
                    actual += f", of which the driver does not take the one for {capability} ({error})"
        warnings.warn(
            f"the bundle has {actual}, this GPU ({device.name}) is {present}: the engine of tnf runs in its place, more"
            " slowly; export the bundle again with this GPU among --gpus, if trip-export knows it",
            stacklevel=2,
        )
        return None

    def _work(self, kind: UNetKind) -> Work:
        """A whole step of that kind on a GPU: UNet and fused kernel, recorded as a CUDA graph where that can be."""
        if kind not in self._works:
            unet, fused_step = self._unet.of(kind), self.fused_step
            assert fused_step

            def step() -> None:
                unet()
                fused_step()

            engine = self._unet.engines[kind]
            graph = self._cuda_graph and engine.capturable
            self.graph |= graph
            self._works[kind] = engine.capture(step) if graph else step
        return self._works[kind]

    def _host_networks(self) -> EngineNetworks:
        """For loops on the host; beside the fused kernel, opened when a clip of several windows first asks for them."""
        if self._networks is None:
            self._networks = EngineNetworks(self._device, self.buffers, self._unet, self._open_engine, self._steer)
        return self._networks

    def encode(self, unconditional: NDArray[np.int64], conditional: NDArray[np.int64], pixels: Array) -> None:
        """Token ids [B, L] of both halves and pictures [B, 3, H, W], −1 to 1, to the buffers `context` and
        `first_frame`."""
        self.encode_text(unconditional, conditional)
        self.encode_images(pixels)

    def encode_text(self, unconditional: NDArray[np.int64], conditional: NDArray[np.int64]) -> None:
        """Token ids [B, L] of both halves to the buffer `context`."""
        device = self._device
        for half, ids in zip(halves(self._projection.input), (unconditional, conditional), strict=True):
            device.write(self._text.input, ids)
            self._text.run()
            device.copy(self._text.output, half)
        self._projection.run()
        device.copy(self._projection.output, self.buffers.context)

    def context(self) -> Array:
        """What `encode_text` made, [2B, L, K]; the caller's own."""
        return self._device.read(self.buffers.context)

    def encode_images(self, pixels: Array) -> None:
        """Pictures [B, 3, H, W], −1 to 1, to the buffer `first_frame`."""
        self._device.write(self._image.input, pixels)
        self._image.run()
        for half in halves(self.buffers.first_frame):
            self._device.copy(self._image.output, half)

    def first_frame(self) -> Array:
        """What `encode_images` made or `give` was given, clean latents [B, C, h, w]; the caller's own."""
        return self._device.read(halves(self.buffers.first_frame)[0])

    def give(self, first_frame: Array) -> None:
        """Clean latents [B, C, h, w] to the buffer `first_frame`."""
        for half in halves(self.buffers.first_frame):
            self._device.write(half, first_frame)

    def steer(self, controls: Sequence[Array | None], scale: float = 1.0) -> None:
        """Controls [K, F, h, w] for the next runs of the pictures that are encoded, one or None for each clip, and how
        strongly they count; those before count no more. InputError where the UNets take none."""
        if self._steering:
            self._steering.give(controls, scale)
        elif any(control is not None for control in controls):
            raise InputError(
                "control: found one, but the UNet of this bundle takes none; export it with trip-export --control DIR"
            )

    def denoise(self, noise: Array, steps: Sequence[Step], on_step: OnStep | None = None) -> None:
        """The loop on what `encode` left, from `noise` [B, C, F, h, w]; `latents` reads what it made.

        `on_step(done, total)` is called as steps end. InputError where the bundle lacks what a step asks for.
        """
        device, buffers = self._device, self.buffers
        kinds = {step.unet for step in steps}
        for kind in kinds:
            self._unet.of(kind)
        if self.fused_step:
            works = {kind: self._work(kind) for kind in kinds}
            self.fused_step.begin(noise, steps)
            denoise_on_gpu(device, works, steps, on_step, self._steer)
        else:
            clean = denoise(self._host_networks(), self.first_frame(), noise, steps, on_step)
            device.write(halves(buffers.latents)[0], clean)

    def seconds(self, arithmetic: Arithmetic) -> float:
        """Seconds of a call of the whole guided UNet that computes so: the faster of two or, where calls are long, one,
        after one that does not count."""
        took = list[float]()
        with self.turn:
            work = self._unet.of(UNetKind(arithmetic=arithmetic))
            while len(took) < 2 or (len(took) < 3 and took[-1] < _LONG):
                began = time.perf_counter()
                work()
                self._device.read(self.buffers.timestep)  # on a GPU, which only queues, waits for it
                took.append(time.perf_counter() - began)
        return min(took[1:])

    def drop(self, arithmetic: Arithmetic) -> None:
        """Forget the UNets that compute so; whoever has the turn may close their engines then."""
        self._unet.drop(arithmetic)
        self._works = {kind: work for kind, work in self._works.items() if kind.arithmetic != arithmetic}

    def denoise_windows(
        self, contexts: Sequence[Array], noise: Array, steps: Sequence[Step], on_step: OnStep | None = None
    ) -> Array:
        """The same by overlapping windows, from `noise` [B, C, N, h, w] of more frames than the engines have, each
        window by its own context; the loop runs on the host and returns clean latents of that shape."""
        whole = [dataclasses.replace(step, shallow=False) for step in steps]
        return denoise_windows(
            self._host_networks(), self.first_frame(), contexts, noise, whole, self._clip.shape[1], on_step
        )

    def latents(self) -> Array:
        """The loop's result, [B, C, F, h, w]; the caller's own."""
        return self._device.read(halves(self.buffers.latents)[0])

    def decode(self, latents: Array) -> Iterator[Array]:
        """The frames of a clip's latents [C, N, h, w], float32 [≤ decode_frames, 3, H, W], about −1 to 1.

        They come chunk by chunk, so that memory stays flat; on a GPU the next chunk is being decoded while the caller
        has this one. Between chunks others may have their turn: then what they displaced is decoded again.
        """
        length = self._clip.shape[1]
        for start in range(0, latents.shape[1], length):
            part = latents[:, start : start + length]
            frames = part.shape[1]
            padded = part if frames == length else np.pad(part, ((0, 0), (0, length - frames), (0, 0), (0, 0)))
            yield from self._decode_clip(padded, frames)

    def _decode_clip(self, latents: Array, frames: int) -> Iterator[Array]:
        """The first `frames` frames of latents [C, F, h, w]."""
        chunk = self._decoder.input.shape[0]
        starts, ours = range(0, frames, chunk), object()
        put = 0  # chunks handed to the decoder
        for taken, start in enumerate(starts):
            with self.turn:
                if self._decoding is not ours:
                    self._frames.drop()
                    self._device.write(self._clip, latents)
                    self._decoding, put = ours, taken
                while put < min(taken + self._frames.depth, len(starts)):
                    # The last chunk repeats its last frame, as shapes are static.
                    wanted = [min(frame, frames - 1) for frame in range(starts[put], starts[put] + chunk)]
                    self._device.gather_frames(self._clip, wanted, self._decoder.input)
                    self._decoder.run()
                    self._frames.put()
                    put += 1
                pixels = self._frames.take()
            yield pixels[: min(chunk, frames - start)]


def _present(open_engine: OpenEngine, name: str) -> Engine:
    engine = open_engine(name)
    assert engine  # the manifest asks for it
    return engine


class _Bound:
    """An engine of one input and one output, with a buffer for each; `run` queues it."""

    def __init__(self, device: Device, engine: Engine):
        (given,), (result,) = engine.spec.inputs, engine.spec.outputs
        self.input, self.output = device.zeros(given.dtype, given.shape), device.zeros(result.dtype, result.shape)
        self.run: Any = engine.bind({given.name: self.input, result.name: self.output})
