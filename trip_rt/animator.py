"""`Animator`: a picture and a sentence in, a clip out."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from trip_rt import backends, images, video
from trip_rt.arithmetic import Asked, Chooser
from trip_rt.bundle import Bundle, open_bundle
from trip_rt.checks import check_array, several, shown
from trip_rt.components import QUANTISED, REQUIRED, quantised_name
from trip_rt.control import check_control, path_control
from trip_rt.devices import open_device
from trip_rt.enlarge import enlarged
from trip_rt.errors import EngineError, InputError
from trip_rt.images import Picture
from trip_rt.optical_flow import opencv
from trip_rt.pipeline import Pipeline
from trip_rt.sampling.loop import Array, OnStep, initial_noise
from trip_rt.sampling.step import Arithmetic, Step
from trip_rt.sampling.windows import anchored, sentence_of_window, shuffled_noise, window_starts
from trip_rt.settings import Settings, SettingsKeywords, check_prompt, check_seed
from trip_rt.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class Animation:
    """A finished clip: `frames` uint8 [F, H, W, 3], to be shown at `fps`, and the clean latents float32 [C, F, h, w]
    that they were decoded from, by which `Animator.extend` goes on without loss."""

    frames: NDArray[np.uint8]
    fps: float
    prompt: str
    seed: int
    latents: Array | None = field(default=None, repr=False, compare=False)

    def save(self, path: str | os.PathLike[str], fps: float | None = None) -> None:
        """Write .mp4, .gif, .webp, or a folder of PNGs, at `fps` frames a second (the clip's own); InputError where
        that cannot be done, and nothing partial is left."""
        video.save(self.frames, path, self.fps if fps is None else fps)


class Animator:
    """Runs a bundle's engines. Opening one verifies every file of the bundle.

    `backend` is one of `trip_rt.backends.NAMES`, `auto`, or an Engine class of one's own; `profile` names one of the
    bundle's sets of shapes (its first); `options` say how the engines are opened. Use as a context manager, or
    `close()`. A `Bundle` object is taken as verified.

    It may be shared by threads. There is one set of buffers, so their calls wait for each other: a group of clips is
    denoised, or a chunk of frames decoded, at a time. Two at once take two Animators.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle,
        backend: str | type[backends.Engine] = "auto",
        profile: str | None = None,
        options: backends.EngineOptions | None = None,
    ):
        if not isinstance(bundle, (str, os.PathLike, Bundle)):
            raise InputError(f"bundle: found {shown(bundle)}, expected the path of a folder")
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
        options = backends.EngineOptions() if options is None else options
        if not isinstance(options, backends.EngineOptions):
            raise InputError(f"options: found {shown(options)}, expected EngineOptions(...)")
        self.tokenizer_json = opened.tokenizer_json
        self.profile = opened.manifest.profile(profile)
        self.config = opened.manifest.config_of(self.profile)
        if isinstance(backend, str):
            self.backend, self.backend_reason = backends.choose(self.profile, backend, options)
            cls = backends.engine_class(self.backend)
        else:
            if not (isinstance(backend, type) and issubclass(backend, backends.Engine)):
                raise InputError(f"backend: found {shown(backend)}, expected a name or an Engine class")
            self.backend, self.backend_reason, cls = backend.backend, "a class of one's own", backend
        self._tokenizer = PromptTokenizer(opened.tokenizer_json, self.config.text_length, opened.manifest.vocabulary)
        self._device = open_device(cls.probe(self.profile.engines["unet"][self.backend], options))
        self.engines: dict[str, backends.Engine] = {}
        self._closed = False
        self._bundle, self._engine_class, self._options = opened, cls, options
        try:
            if self._device.kind == "cpu":
                # One thread opens an engine, mostly. The UNet's takes longest.
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    list(pool.map(self.engine, sorted(REQUIRED, key=lambda name: name != "unet")))
            self._pipeline = Pipeline(
                self._device,
                self.config,
                self.profile,
                self.engine,
                opened.folder,
                options.cuda_graph,
                opened.manifest.control,
            )
            self._chooser = Chooser(cls, options, self.profile, self._pipeline.seconds, self._drop)
        except BaseException:
            self._free()
            raise

    def __call__(
        self,
        image: Picture,
        prompt: str | Sequence[str],
        *,
        seed: int = 0,
        control: Array | None = None,
        settings: Settings | None = None,
        on_step: OnStep | None = None,
        **changes: Unpack[SettingsKeywords],
    ) -> Animation:
        """Animate one picture (a path, an open file, a PIL image, an array: images.load_image) as `prompt` says.

        How it is made is said by a `settings` object or by the fields of Settings as keywords, such as `speed="fast"`
        or `guidance_scale=3`; keywords replace the object's fields. `on_step(done, total)` is called after every step.
        `num_frames` may be more than the engines have: then every window of a step counts as one, and `prompt` may be
        several sentences, which share the frames equally. `control` [K, F, h, w] steers the clip, such as `path` makes
        it, where the bundle was exported with --control. InputError for anything out of bounds.
        """
        return self.batch(
            [image], [prompt], seeds=[seed], controls=[control], settings=settings, on_step=on_step, **changes
        )[0]

    def path(self, points: Sequence[tuple[float, float]]) -> Array:
        """A control by which what lies at the first of `points` goes along them at an even pace (control.py).

        Points are (x, y) in shares of the picture's sides, y down. InputError where this bundle's UNet takes none.
        """
        if self._bundle.manifest.control is None:
            raise InputError("path: the UNet of this bundle takes no control; export it with trip-export --control DIR")
        return path_control(points, self.config)

    def batch(
        self,
        pictures: Sequence[Picture],
        prompts: Sequence[str | Sequence[str]] | str,
        *,
        seeds: Sequence[int] | None = None,
        controls: Sequence[Array | None] | None = None,
        settings: Settings | None = None,
        on_step: OnStep | None = None,
        **changes: Unpack[SettingsKeywords],
    ) -> list[Animation]:
        """Animate several pictures, `profile.batch` at a time; a clip depends on its own seed and not on its
        neighbours.

        One sentence as `prompts` is for all of them. `seeds` default to 0, 1, …, `controls` to none; the rest is as in
        a call, with `on_step` counting the steps of all groups.
        """
        settings = _settings(settings, changes)
        pictures = several("pictures", pictures)
        prompts = [prompts] * len(pictures) if isinstance(prompts, str) else several("prompts", prompts)
        seeds = list(range(len(pictures))) if seeds is None else several("seeds", seeds)
        fitted = self._fitted(pictures, settings)
        clips: list[Animation] = []
        for rows, latents in self._denoised(fitted, prompts, seeds, settings, on_step, controls):
            for row, clip in zip(rows, latents, strict=True):
                frames = np.concatenate(list(self.decode(clip, fitted[row])))
                told = "; ".join(_sentences(prompts[row]))
                clips.append(Animation(frames, self.config.fps, told, int(seeds[row]), clip))
        return clips

    def extend(
        self,
        animation: Animation,
        prompt: str,
        *,
        seed: int | None = None,
        settings: Settings | None = None,
        on_step: OnStep | None = None,
        **changes: Unpack[SettingsKeywords],
    ) -> Animation:
        """The clip going on as `prompt` says, which may be another sentence: the whole of it, with one engine's frames
        after its own, or with `num_frames` new ones, run after run.

        Each run begins at the last frame, where what has hardly changed since the first is put back to it, so that long
        chains drift less. `seed` is the first run's (one more than the clip's own), later runs count on from it, and
        the new clip has the last one's. InputError for a clip of another size.
        """
        settings = _settings(settings, changes)
        runs = settings.runs(self.config)
        first, last = self._ends(animation)
        seed = check_seed((animation.seed + 1) % 2**64 if seed is None else seed)
        frames, latents = [animation.frames], []
        for more in self._chained(first, last, prompt, seed, settings, on_step):
            latents.append(more)
            frames.extend(self._frames(pixels) for pixels in self._pipeline.decode(more))
        told = prompt if animation.prompt == prompt else f"{animation.prompt}; {prompt}"
        whole = None if animation.latents is None else np.concatenate([animation.latents, *latents], axis=1)
        return Animation(np.concatenate(frames), animation.fps, told, (seed + runs - 1) % 2**64, whole)

    def follow(
        self,
        first: NDArray[np.uint8],
        last: NDArray[np.uint8],
        prompt: str,
        seed: int,
        *,
        settings: Settings | None = None,
        on_step: OnStep | None = None,
        **changes: Unpack[SettingsKeywords],
    ) -> Array:
        """The clean latents float32 [C, N, h, w] of what `extend` adds to a clip that began with the picture `first`
        and has come to `last`, both uint8 [H, W, 3]; InputError for pictures of another size."""
        settings, config = _settings(settings, changes), self.config
        settings.runs(config)
        for name, picture in (("first", first), ("last", last)):
            check_array(name, picture, "uint8", (config.height, config.width, 3))
        began, came_to = self._encoded(np.stack([first, last]))
        runs = self._chained(began, came_to, prompt, check_seed(seed), settings, on_step)
        return np.concatenate(list(runs), axis=1)

    def _chained(
        self, first: Array, last: Array, prompt: str, seed: int, settings: Settings, on_step: OnStep | None
    ) -> Iterator[Array]:
        """The clean latents [C, ≤ F − 1, h, w] of run after run, each of which goes on from the one before."""
        each, runs = self.config.num_frames - 1, settings.runs(self.config)
        wanted = each if settings.num_frames is None else int(settings.num_frames)
        for run in range(runs):
            more = self.more(first, last, prompt, (seed + run) % 2**64, settings, _counting(on_step, run, runs))
            last = more[:, -1]
            yield more[:, : wanted - run * each]

    def _ends(self, animation: Animation) -> tuple[Array, Array]:
        """The clean latents [C, h, w] of a clip's first and last frame."""
        config = self.config
        if not isinstance(animation, Animation):
            raise InputError(f"animation: found {shown(animation)}, expected an Animation, such as a call returns")
        check_array("animation.frames", animation.frames, "uint8", (None, config.height, config.width, 3))
        channels, _, height, width = config.latent_shape
        if animation.latents is not None:
            shape = (channels, len(animation.frames), height, width)
            check_array("animation.latents", animation.latents, "float32", shape)
            return animation.latents[:, 0], animation.latents[:, -1]
        first, last = self._encoded(animation.frames[[0, -1]])
        return first, last

    def _encoded(self, pictures: NDArray[np.uint8]) -> list[Array]:
        """The clean latents [C, h, w] of each of some pictures [n, H, W, 3] of the engines' size."""
        encoded = []
        with self._pipeline.turn:
            for picture in pictures:
                self._pipeline.encode_images(images.to_model(np.stack([picture] * self.profile.batch)))
                encoded.append(self._pipeline.first_frame()[0])
        return encoded

    def more(
        self, first: Array, last: Array, prompt: str, seed: int, settings: Settings, on_step: OnStep | None = None
    ) -> Array:
        """The clean latents [C, F − 1, h, w] that follow `last` in a clip that began at `first`, both [C, h, w]."""
        check_prompt(prompt)
        steps, batch = self._steps(settings), self.profile.batch
        noise = initial_noise([seed] * batch, self.config.latent_shape)
        with self._pipeline.turn:
            self._encode_text([prompt] * batch, settings)
            self._pipeline.give(np.concatenate([anchored(last[None], first[None])] * batch))
            self._pipeline.steer([None] * batch)
            self._pipeline.denoise(noise, steps, on_step)
            latents: Array = self._pipeline.latents()
        return latents[0, :, 1:]

    def stream(
        self,
        image: Picture,
        prompt: str | Sequence[str],
        *,
        seed: int = 0,
        control: Array | None = None,
        settings: Settings | None = None,
        on_step: OnStep | None = None,
        **changes: Unpack[SettingsKeywords],
    ) -> Iterator[NDArray[np.uint8]]:
        """One clip's frames, uint8 [H, W, 3] each, as they are decoded; the arguments are those of a call."""
        settings = _settings(settings, changes)
        fitted = self._fitted([image], settings)
        for _, latents in self._denoised(fitted, [prompt], [seed], settings, on_step, [control]):
            for frames in self.decode(latents[0], fitted[0]):
                yield from frames

    def latents(
        self,
        pictures: NDArray[np.uint8],
        prompts: Sequence[str | Sequence[str]],
        seeds: Sequence[int],
        *,
        controls: Sequence[Array | None] | None = None,
        settings: Settings | None = None,
        on_step: OnStep | None = None,
        **changes: Unpack[SettingsKeywords],
    ) -> Array:
        """The denoised latents float32 [n, C, F, h, w] of fitted pictures uint8 [n, H, W, 3], of the size that is asked
        for."""
        config, settings = self.config, _settings(settings, changes)
        check_array("pictures", pictures, "uint8", (None, *settings.picture_size(config), 3))
        groups = [latents for _, latents in self._denoised(pictures, prompts, seeds, settings, on_step, controls)]
        channels, _, height, width = config.latent_shape
        empty = np.zeros((0, channels, settings.frames(config), height, width), np.float32)
        return np.concatenate([empty, *groups])

    def decode(self, latents: Array, picture: NDArray[np.uint8] | None = None) -> Iterator[NDArray[np.uint8]]:
        """One clip's frames from its latents [C, N, h, w], uint8 [≤ decode_frames, H, W, 3] at a time, so memory stays
        flat; of the size of `picture`, uint8 [H', W', 3], where that is the larger one that the clip was made from."""
        chunks = (self._frames(pixels) for pixels in self.decode_pixels(latents))
        if picture is None or picture.shape[:2] == (self.config.height, self.config.width):
            yield from chunks
        else:
            for frame in enlarged((frame for frames in chunks for frame in frames), picture):
                yield frame[None]

    def decode_pixels(self, latents: Array) -> Iterator[Array]:
        """As `decode`, but the decoder's own float32 [n, 3, H, W], about −1 to 1."""
        channels, _, height, width = self.config.latent_shape
        check_array("latents", latents, "float32", (channels, None, height, width))
        yield from self._pipeline.decode(latents)

    def _frames(self, pixels: Array) -> NDArray[np.uint8]:
        try:
            return images.to_frames(pixels)
        except EngineError as error:
            half = any(engine.spec.precision == "fp16" for engine in list(self.engines.values()))
            remedy = (
                "a half-precision engine may have overflowed: export the bundle in fp32 or bf16"
                if half
                else "the model's weights are broken: export the bundle again from a sound checkpoint"
            )
            raise EngineError(f"{error}; {remedy}") from error

    def _fitted(self, pictures: Sequence[Picture], settings: Settings) -> NDArray[np.uint8]:
        """uint8 [n, H, W, 3] of the size that is asked for."""
        height, width = settings.picture_size(self.config)
        if (height, width) != (self.config.height, self.config.width):
            opencv()  # before any slow work
        fitted = np.empty((len(pictures), height, width, 3), np.uint8)
        for i, picture in enumerate(pictures):
            fitted[i] = images.load_image(picture, height, width, settings.fit)
        return fitted

    def _denoised(
        self,
        pictures: NDArray[np.uint8],
        prompts: Sequence[str | Sequence[str]],
        seeds: Sequence[int],
        settings: Settings,
        on_step: OnStep | None,
        controls: Sequence[Array | None] | None = None,
    ) -> Iterator[tuple[range, Array]]:
        """Denoise `profile.batch` pictures at a time: yields which they are and their latents [≤ batch, C, F, h, w].
        Pictures may be larger than the engines take."""
        if not len(pictures) == len(prompts) == len(seeds):
            counts = f"{len(pictures)} pictures, {len(prompts)} prompts and {len(seeds)} seeds"
            raise InputError(f"batch: found {counts}, expected as many of each")
        steering = self._checked(controls, len(pictures), settings)
        told = [_sentences(prompt) for prompt in prompts]
        seeds = [check_seed(seed) for seed in seeds]
        if on_step is not None and not callable(on_step):
            raise InputError(f"on_step: found {shown(on_step)}, expected a function of two numbers, done and total")
        steps, batch, frames = self._steps(settings), self.profile.batch, settings.frames(self.config)
        most, windows = max(map(len, told), default=1), len(window_starts(frames, self.config.num_frames))
        if most > windows:
            raise InputError(
                f"prompt: found {most} sentences for {frames} frames, which are {windows} of these engines' windows;"
                " expected a sentence a window at most: ask for more with num_frames, or go on with extend"
            )
        groups = math.ceil(len(pictures) / batch)
        for start in range(0, len(pictures), batch):
            # The last group repeats its last clip.
            rows = [min(row, len(pictures) - 1) for row in range(start, start + batch)]
            report = _counting(on_step, start // batch, groups)
            noise = shuffled_noise([seeds[row] for row in rows], self.config.latent_shape, frames)
            with self._pipeline.turn:
                small = images.at_size(pictures[rows], self.config.height, self.config.width)
                self._pipeline.encode_images(images.to_model(small))
                self._pipeline.steer([steering[row] for row in rows], settings.control_scale)
                if frames > self.config.num_frames:
                    contexts = self._contexts([told[row] for row in rows], settings)
                    latents = self._pipeline.denoise_windows(contexts, noise, steps, report)
                else:
                    self._encode_text([told[row][0] for row in rows], settings)
                    self._pipeline.denoise(noise, steps, report)
                    latents = self._pipeline.latents()
            taken = range(start, min(start + batch, len(pictures)))
            yield taken, latents[: len(taken)]

    def _checked(
        self, controls: Sequence[Array | None] | None, count: int, settings: Settings
    ) -> Sequence[Array | None]:
        """The controls of `count` clips; InputError for those that do not fit."""
        controls = [None] * count if controls is None else several("controls", controls)
        if len(controls) != count:
            raise InputError(f"controls: found {len(controls)} for {count} pictures, expected as many of each")
        config, kind = self.config, self._bundle.manifest.control
        for control in controls:
            if control is None:
                continue
            if kind:
                check_control(control, config, kind)
            if (frames := settings.frames(config)) > config.num_frames:
                raise InputError(
                    f"control: found one for a clip of {frames} frames, expected {config.num_frames}, which these"
                    " engines make at once; go on from its end with extend"
                )
        return controls

    def _contexts(self, told: Sequence[Sequence[str]], settings: Settings) -> list[Array]:
        """The sentences of every window of a group of clips, as the pipeline's contexts."""
        frames, length = settings.frames(self.config), self.config.num_frames
        known: dict[tuple[str, ...], Array] = {}
        contexts = []
        for start in window_starts(frames, length):
            now = tuple(some[sentence_of_window(start, length, frames, len(some))] for some in told)
            if now not in known:
                self._encode_text(now, settings)
                known[now] = self._pipeline.context()
            contexts.append(known[now])
        return contexts

    def _encode_text(self, sentences: Sequence[str], settings: Settings) -> None:
        """A sentence for each clip of a group, and what none of them should show."""
        unconditional = self._tokenizer([settings.negative_prompt] * len(sentences))
        self._pipeline.encode_text(unconditional, self._tokenizer(sentences))

    def _steps(self, settings: Settings) -> list[Step]:
        steps = self._chooser.steps(settings.resolved_speed.arithmetic, settings.steps(self.config))
        if settings.negative_prompt and not any(step.guided for step in steps):
            warnings.warn(
                "negative prompt: it says nothing at guidance scale 1, which is this run's; ask for more, such as"
                " guidance_scale=2",
                stacklevel=3,
            )
        return steps

    def engine(self, name: str, arithmetic: Arithmetic = "own") -> backends.Engine | None:
        """A component's engine, which computes in its own precision or in less, opened when first asked for; None where
        the bundle has none for this backend."""
        stored = quantised_name(name, arithmetic) if arithmetic in QUANTISED else name
        spec = self.profile.engines.get(stored, {}).get(self.backend)
        key = name if arithmetic == "own" else f"{name} in {arithmetic}"
        if spec and key not in self.engines:
            lowered = dataclasses.replace(spec, precision="bf16") if arithmetic == "bf16" else spec
            self.engines[key] = self._engine_class.open(
                self._bundle.engine_path(spec), lowered, self._options, self._device
            )
        return self.engines.get(key)

    def arithmetic(self, asked: Asked) -> tuple[Arithmetic, str]:
        """What a run computes in that asks for that, and a line that says why; `auto` is measured here, once.

        InputError where what is asked for cannot be had.
        """
        if asked == "auto":
            return self._chooser.auto()
        return self._chooser(asked), f"{asked}: asked for"

    def _drop(self, arithmetic: Arithmetic) -> None:
        """Free the UNets that compute so."""
        with self._pipeline.turn:
            self._pipeline.drop(arithmetic)
            for key in [key for key in self.engines if key.endswith(f" in {arithmetic}")]:
                self.engines.pop(key).close()

    def describe(self) -> dict[str, Any]:
        """The backend in use, why, what it runs on, and how the loop runs there."""
        loop = {
            "after_unet": self._pipeline.after_unet,
            "cuda_graph": self._pipeline.graph,
            "auto_arithmetic": self._chooser.said,
        }
        return {**self.engines["unet"].describe(), "reason": self.backend_reason, **loop}

    def close(self) -> None:
        """Free the engines, after the call that is under way; calling it again does nothing."""
        if not self._closed:
            with self._pipeline.turn:
                self._free()

    def _free(self) -> None:
        self._closed = True
        for engine in self.engines.values():
            engine.close()
        self._device.close()

    def __enter__(self) -> Animator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sentences(prompt: str | Sequence[str]) -> tuple[str, ...]:
    """The sentences of a clip, one or several."""
    told = (prompt,) if isinstance(prompt, str) else tuple(several("prompt", prompt))
    for sentence in told:
        check_prompt(sentence)
    if not told:
        raise InputError("prompt: found no sentence, expected one or several")
    return told


def _counting(on_step: OnStep | None, run: int, runs: int) -> OnStep:
    """What counts the steps of one run of several."""

    def report(done: int, total: int) -> None:
        if on_step:
            on_step(run * total + done, runs * total)

    return report


def _settings(settings: Settings | None, changes: SettingsKeywords) -> Settings:
    if settings is not None and not isinstance(settings, Settings):
        raise InputError(f"settings: found {shown(settings)}, expected Settings(...)")
    return (settings or Settings()).changed(changes)
