"""`Animator`: a picture and a sentence in, a clip out."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trip_rt import backends, images, video
from trip_rt.bundle import Bundle, open_bundle
from trip_rt.config import TripConfig
from trip_rt.devices import open_device
from trip_rt.errors import InputError
from trip_rt.manifest import COMPONENTS
from trip_rt.pipeline import Pipeline
from trip_rt.sampler import Array, initial_noise
from trip_rt.speed import LoopStep, Speed, loop_steps, speed_named
from trip_rt.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from PIL import Image

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[np.uint8]"
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Animation:
    """A finished clip: `frames` uint8 [F, H, W, 3], to be shown at `fps`."""

    frames: NDArray[np.uint8]
    fps: int
    prompt: str
    seed: int

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write .mp4, .gif, .webp, or a folder of PNGs; InputError where that cannot be done, and nothing partial is
        left."""
        video.save(self.frames, path, self.fps)


def run_steps(
    config: TripConfig, speed: Speed | str, num_inference_steps: int | None, guidance_scale: float | None
) -> list[LoopStep]:
    """The steps of a run, with `num_inference_steps` in place of the speed's own where given; InputError where
    something is out of bounds."""
    chosen = speed_named(speed) if isinstance(speed, str) else speed
    if num_inference_steps is not None:
        chosen = dataclasses.replace(chosen, num_inference_steps=num_inference_steps)
    return loop_steps(config, chosen, guidance_scale)


def check_seeds(seeds: Sequence[int]) -> None:
    """InputError for a seed that the noise generator cannot take."""
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**64]:
        raise InputError(f"seed: found {wrong[0]}, expected 0 to 2^64 − 1")


class Animator:
    """Runs a bundle's engines. Opening one verifies every file of the bundle.

    `backend` is one of `trip_rt.backends.NAMES`, `auto`, or an Engine class of one's own; `profile` names one of the
    bundle's sets of shapes (its first); `options` say how the engines are opened. Use as a context manager, or
    `close()`. A `Bundle` object is taken as verified.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle,
        backend: str | type[backends.Engine] = "auto",
        profile: str | None = None,
        options: backends.EngineOptions | None = None,
    ):
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
        options = options or backends.EngineOptions()
        self.tokenizer_json = opened.tokenizer_json
        self.profile = opened.manifest.profile(profile)
        self.config = opened.manifest.config_of(self.profile)
        if isinstance(backend, str):
            self.backend, self.backend_reason = backends.choose(self.profile, backend, options)
            cls = backends.engine_class(self.backend)
        else:
            self.backend, self.backend_reason, cls = backend.backend, "a class of one's own", backend
        self._tokenizer = PromptTokenizer(opened.tokenizer_json, self.config.text_length)
        self._device = open_device(cls.probe(self.profile.engines["unet"][self.backend], options))
        self.engines: dict[str, backends.Engine] = {}
        self._bundle, self._engine_class, self._options = opened, cls, options
        try:
            if self._device.kind == "cpu":
                with ThreadPoolExecutor(
                    os.cpu_count()
                ) as pool:  # opening an engine is mostly one thread's work, and the UNet's takes longest
                    list(pool.map(self.engine, sorted(COMPONENTS, key=lambda name: name != "unet")))
            self._pipeline = Pipeline(
                self._device, self.config, self.profile, self.engine, opened.folder, options.cuda_graph
            )
        except BaseException:
            self.close()
            raise

    def __call__(self, image: Picture, prompt: str, *, seed: int = 0, **settings: Any) -> Animation:
        """Animate one picture (path, PIL image, or uint8 [h, w, 3]) as `prompt` says. Settings are those of `batch`."""
        return self.batch([image], [prompt], seeds=[seed], **settings)[0]

    def batch(
        self,
        pictures: Sequence[Picture],
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        negative_prompt: str = "",
        speed: Speed | str = "exact",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        fit: images.Fit = "crop",
        on_step: OnStep | None = None,
    ) -> list[Animation]:
        """Animate several pictures, `profile.batch` at a time; a clip depends on its own seed and not on its
        neighbours.

        `seeds` default to 0, 1, …; `speed` is one of `trip_rt.speed.SPEEDS` or a Speed; `num_inference_steps` and
        `guidance_scale` default to the speed's and the model's own; `fit` is `crop` or `letterbox`; `on_step(done,
        total)` is called after every denoising step of all groups. InputError for anything out of bounds.
        """
        seeds = list(range(len(pictures))) if seeds is None else list(seeds)
        if not len(pictures) == len(prompts) == len(seeds):
            raise InputError(
                f"batch: found {len(pictures)} pictures, {len(prompts)} prompts and {len(seeds)} seeds, expected as"
                " many of each"
            )
        loaded = [images.load_image(picture, self.config.height, self.config.width, fit) for picture in pictures]
        fitted = np.stack(loaded) if loaded else np.zeros((0, self.config.height, self.config.width, 3), np.uint8)
        steps = run_steps(self.config, speed, num_inference_steps, guidance_scale)
        clips: list[Animation] = []
        for rows in self._denoised(fitted, prompts, seeds, negative_prompt, steps, on_step):
            for clip, row in enumerate(rows):
                frames = np.concatenate([images.to_frames(pixels) for pixels in self._pipeline.decode(clip)])
                clips.append(Animation(frames, self.config.fps, prompts[row], seeds[row]))
        return clips

    def stream(
        self,
        image: Picture,
        prompt: str,
        *,
        seed: int = 0,
        negative_prompt: str = "",
        speed: Speed | str = "exact",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        fit: images.Fit = "crop",
        on_step: OnStep | None = None,
    ) -> Iterator[NDArray[np.uint8]]:
        """One clip's frames, uint8 [H, W, 3] each, as they are decoded; settings as in `batch`."""
        picture = images.load_image(image, self.config.height, self.config.width, fit)
        steps = run_steps(self.config, speed, num_inference_steps, guidance_scale)
        for _ in self._denoised(picture[None], [prompt], [seed], negative_prompt, steps, on_step):
            for pixels in self._pipeline.decode(0):
                yield from images.to_frames(pixels)

    def latents(
        self,
        pictures: NDArray[np.uint8],
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative_prompt: str = "",
        speed: Speed | str = "exact",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: OnStep | None = None,
    ) -> Array:
        """The denoised latents float32 [n, C, F, h, w] of fitted pictures uint8 [n, H, W, 3]."""
        steps = run_steps(self.config, speed, num_inference_steps, guidance_scale)
        groups = [
            self._pipeline.latents()[: len(rows)]
            for rows in self._denoised(pictures, prompts, seeds, negative_prompt, steps, on_step)
        ]
        return np.concatenate(groups) if groups else np.zeros((0, *self.config.latent_shape), np.float32)

    def decode(self, latents: Array) -> Iterator[NDArray[np.uint8]]:
        """One clip's frames from its latents [C, F, h, w], uint8 [≤ decode_frames, H, W, 3] at a time, so memory stays
        flat."""
        for pixels in self.decode_pixels(latents):
            yield images.to_frames(pixels)

    def decode_pixels(self, latents: Array) -> Iterator[Array]:
        """As `decode`, but the decoder's own float32 [n, 3, H, W], about −1 to 1."""
        self._pipeline.load_latents(latents)
        yield from self._pipeline.decode(0)

    def _denoised(
        self,
        pictures: NDArray[np.uint8],
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompt: str,
        steps: list[LoopStep],
        on_step: OnStep | None,
    ) -> Iterator[range]:
        """Denoise `profile.batch` pictures at a time: yields which they are, while the pipeline holds their latents."""
        check_seeds(seeds)
        batch = self.profile.batch
        total = len(steps) * math.ceil(len(pictures) / batch)
        for start in range(0, len(pictures), batch):
            rows = [
                min(row, len(pictures) - 1) for row in range(start, start + batch)
            ]  # the last group repeats its last clip

            def report(done: int, _: int, before: int = start // batch * len(steps)) -> None:
                if on_step:
                    on_step(before + done, total)

            unconditional, conditional = (
                self._tokenizer([negative_prompt] * batch),
                self._tokenizer([prompts[row] for row in rows]),
            )
            self._pipeline.encode(unconditional, conditional, images.to_model(pictures[rows]))
            noise = initial_noise([seeds[row] for row in rows], self.config.latent_shape)
            self._pipeline.denoise(noise, steps, report)
            yield range(start, min(start + batch, len(pictures)))

    def engine(self, name: str) -> backends.Engine | None:
        """A component's engine, opened when first asked for; None where the bundle has none for this backend."""
        spec = self.profile.engines.get(name, {}).get(self.backend)
        if spec and name not in self.engines:
            self.engines[name] = self._engine_class.open(
                self._bundle.engine_path(spec), spec, self._options, self._device
            )
        return self.engines.get(name)

    def describe(self) -> dict[str, Any]:
        """The backend in use, why, what it runs on, and how the loop runs there."""
        loop = {"after_unet": self._pipeline.after_unet.name, "cuda_graph": self._pipeline.graph}
        return {**self.engines["unet"].describe(), "reason": self.backend_reason, **loop}

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()
        self._device.close()

    def __enter__(self) -> Animator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
