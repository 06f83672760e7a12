"""`Animator`: a picture and a sentence in, a clip out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

import numpy as np
from numpy.typing import NDArray

from trip_rt import backends, images, video
from trip_rt.bundle import Bundle, open_bundle
from trip_rt.components import REQUIRED
from trip_rt.devices import open_device
from trip_rt.errors import InputError
from trip_rt.pipeline import Pipeline
from trip_rt.sampling.loop import Array, OnStep, initial_noise
from trip_rt.settings import Settings, SettingsKeywords
from trip_rt.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from PIL import Image

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[np.uint8]"


@dataclass(frozen=True)
class Animation:
    """A finished clip: `frames` uint8 [F, H, W, 3], to be shown at `fps`."""

    frames: NDArray[np.uint8]
    fps: float
    prompt: str
    seed: int

    def save(self, path: str | os.PathLike[str], fps: float | None = None) -> None:
        """Write .mp4, .gif, .webp, or a folder of PNGs, at `fps` frames a second (the clip's own); InputError where
        that cannot be done, and nothing partial is left."""
        video.save(self.frames, path, self.fps if fps is None else fps)


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
                # One thread opens an engine, mostly. The UNet's takes longest.
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    list(pool.map(self.engine, sorted(REQUIRED, key=lambda name: name != "unet")))
            self._pipeline = Pipeline(
                self._device, self.config, self.profile, self.engine, opened.folder, options.cuda_graph
            )
        except BaseException:
            self.close()
            raise

    def __call__(
        self,
        image: Picture,
        prompt: str,
        *,
        seed: int = 0,
        settings: Settings | None = None,
        on_step: OnStep | None = None,
        **changes: Unpack[SettingsKeywords],
    ) -> Animation:
        """Animate one picture (path, PIL image, or uint8 [h, w, 3]) as `prompt` says.

        How it is made is said by a `settings` object or by the fields of Settings as keywords, such as `speed="fast"`
        or `guidance_scale=3`; keywords replace the object's fields. `on_step(done, total)` is called after every step.
        InputError for anything out of bounds.
        """
        return self.batch([image], [prompt], seeds=[seed], settings=settings, on_step=on_step, **changes)[0]

    def batch(
        self,
        pictures: Sequence[Picture],
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        settings: Settings | None = None,
        on_step: OnStep | None = None,
        **changes: Unpack[SettingsKeywords],
    ) -> list[Animation]:
        """Animate several pictures, `profile.batch` at a time; a clip depends on its own seed and not on its
        neighbours.

        `seeds` default to 0, 1, …; the rest is as in a call, with `on_step` counting the steps of all groups.
        """
        settings = (settings or Settings()).changed(changes)
        seeds = list(range(len(pictures))) if seeds is None else list(seeds)
        if not len(pictures) == len(prompts) == len(seeds):
            counts = f"{len(pictures)} pictures, {len(prompts)} prompts and {len(seeds)} seeds"
            raise InputError(f"batch: found {counts}, expected as many of each")
        fitted = self._fitted(pictures, settings)
        clips: list[Animation] = []
        for rows in self._denoised(fitted, prompts, seeds, settings, on_step):
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
        settings: Settings | None = None,
        on_step: OnStep | None = None,
        **changes: Unpack[SettingsKeywords],
    ) -> Iterator[NDArray[np.uint8]]:
        """One clip's frames, uint8 [H, W, 3] each, as they are decoded; the arguments are those of a call."""
        settings = (settings or Settings()).changed(changes)
        for _ in self._denoised(self._fitted([image], settings), [prompt], [seed], settings, on_step):
            for pixels in self._pipeline.decode(0):
                yield from images.to_frames(pixels)

    def latents(
        self,
        pictures: NDArray[np.uint8],
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        settings: Settings | None = None,
        on_step: OnStep | None = None,
        **changes: Unpack[SettingsKeywords],
    ) -> Array:
        """The denoised latents float32 [n, C, F, h, w] of fitted pictures uint8 [n, H, W, 3]."""
        settings = (settings or Settings()).changed(changes)
        groups = [
            self._pipeline.latents()[: len(rows)]
            for rows in self._denoised(pictures, prompts, seeds, settings, on_step)
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

    def _fitted(self, pictures: Sequence[Picture], settings: Settings) -> NDArray[np.uint8]:
        """uint8 [n, H, W, 3] of the model's size."""
        height, width = self.config.height, self.config.width
        fitted = np.empty((len(pictures), height, width, 3), np.uint8)
        for i, picture in enumerate(pictures):
            fitted[i] = images.load_image(picture, height, width, settings.fit)
        return fitted

    def _denoised(
        self,
        pictures: NDArray[np.uint8],
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        on_step: OnStep | None,
    ) -> Iterator[range]:
        """Denoise `profile.batch` pictures at a time: yields which they are, while the pipeline holds their latents."""
        check_seeds(seeds)
        steps, batch = settings.steps(self.config), self.profile.batch
        total = len(steps) * math.ceil(len(pictures) / batch)
        for start in range(0, len(pictures), batch):
            # The last group repeats its last clip.
            rows = [min(row, len(pictures) - 1) for row in range(start, start + batch)]

            def report(done: int, _: int, before: int = start // batch * len(steps)) -> None:
                if on_step:
                    on_step(before + done, total)

            unconditional = self._tokenizer([settings.negative_prompt] * batch)
            conditional = self._tokenizer([prompts[row] for row in rows])
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
        loop = {"after_unet": self._pipeline.after_unet, "cuda_graph": self._pipeline.graph}
        return {**self.engines["unet"].describe(), "reason": self.backend_reason, **loop}

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()
        self._device.close()

    def __enter__(self) -> Animator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
