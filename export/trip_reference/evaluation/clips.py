"""What is evaluated: pictures with their sentences and true clips, and the clips that a checkpoint or a bundle makes of
them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from trip_reference import checkpoint
from trip_reference.data.folder import VideoFolder
from trip_reference.data.sample import BrokenClip, ClipFormat
from trip_reference.demo_world import world
from trip_reference.model import TripModel, to_pixels
from trip_reference.progress import Progress, shown_progress
from trip_reference.sampling import sample
from trip_rt import Animator
from trip_rt.backends import Engine
from trip_rt.bundle import MANIFEST, read_manifest
from trip_rt.config import TripConfig
from trip_rt.errors import InputError
from trip_rt.images import to_frames
from trip_rt.launch import note
from trip_rt.sampling.loop import initial_noise
from trip_rt.sampling.step import Step
from trip_rt.settings import Settings, check_seed
from trip_rt.tokenizer import PromptTokenizer

Clip = NDArray[np.uint8]
T = TypeVar("T")

BATCH = 8


@dataclass(frozen=True)
class Case:
    """A true clip uint8 [F, H, W, 3], whose first frame is animated, its sentence, and what the demo world
    knows of it."""

    clip: Clip
    prompt: str
    scene: world.Scene | None = None
    motion: str = ""


def demo_cases(config: TripConfig, count: int, first_seed: int = 0) -> list[Case]:
    """The held-out scenes of the demo world, which is square, of `count` seeds from `first_seed` on."""
    if config.height != config.width:
        raise InputError(
            f"demo world: found a model of {config.width} × {config.height} pixels, expected a square one; name videos"
            " with --data"
        )
    drawn = [world.sample(seed, held_out=True) for seed in range(first_seed, first_seed + count)]
    return [
        Case(world.render(scene, motion, config.num_frames, config.height), text, scene, motion)
        for scene, motion, text in drawn
    ]


def folder_cases(folder: Path, annotations: str, config: TripConfig, fps: float, count: int) -> list[Case]:
    """The first `count` clips of a data set, from their beginnings, cut at the centre; broken ones are named and left
    out."""
    clip_format = ClipFormat(config.num_frames, config.height, config.width, fps, crop="centre", start="first")
    clips = VideoFolder(folder, clip_format, annotations)
    cases: list[Case] = []
    for index in range(len(clips)):
        if len(cases) == count:
            break
        try:
            sample = clips.clip(index, np.random.default_rng(index))
            cases.append(Case(sample.frames, sample.text))
        except BrokenClip as error:
            note(f"warning: left out: {error}")
    if not cases:
        raise InputError(f"{folder}: found no clip that could be read; `trip-data check` reports on a data set")
    return cases


def is_bundle(source: Path) -> bool:
    """Whether it is a bundle's folder, and not a checkpoint's."""
    return (source / MANIFEST).is_file()


def config_of(source: Path) -> TripConfig:
    """The config of a checkpoint or bundle."""
    if is_bundle(source):
        manifest = read_manifest(source)
        return manifest.config_of(manifest.profile())
    return checkpoint.load_config(source)


def make_clips(source: Path, cases: Sequence[Case], settings: Settings, seed: int = 0) -> list[Clip]:
    """Each case's first frame animated by its sentence, by the PyTorch model of a checkpoint."""
    seeds = seeds_of(cases, seed)
    model = checkpoint.from_pretrained(source)
    steps = settings.steps(model.config)
    tokenizer = PromptTokenizer(checkpoint.load_tokenizer_json(source), model.config.text_length, model.vocabulary)

    def animate(start: int) -> list[Clip]:
        group = slice(start, start + BATCH)
        return animate_batch(
            model,
            tokenizer,
            [case.clip[0] for case in cases[group]],
            [case.prompt for case in cases[group]],
            seeds[group],
            steps,
            settings.negative_prompt,
        )

    return [clip for group in by_batches(animate, len(cases), "animate") for clip in group]


def by_batches(work: Callable[[int], T], count: int, label: str) -> list[T]:
    """`work(start)` for every batch of BATCH of `count` cases. Each core has whole batches: the demo's tensors are too
    small to keep several busy."""
    starts = range(0, count, BATCH)
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(shown_progress(pool.map(work, starts), len(starts), label, "batch"))


@torch.no_grad()
def animate_batch(
    model: TripModel,
    tokenizer: PromptTokenizer,
    pictures: Sequence[Clip],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: Sequence[Step],
    negative_prompt: str = "",
) -> list[Clip]:
    """Clips of pictures uint8 [H, W, 3], by the oracle."""
    config = model.config
    text = model.encode_text(torch.from_numpy(tokenizer([negative_prompt] * len(prompts) + list(prompts))))
    first_frame = model.encode_image(to_pixels(np.stack(pictures)))
    latents = sample(model, first_frame, torch.from_numpy(initial_noise(seeds, config.latent_shape)), text, steps)
    return [to_frames(model.decode(clip.transpose(0, 1)).numpy()) for clip in latents]


def clips_of_bundle(
    source: Path, cases: Sequence[Case], settings: Settings, seed: int = 0, backend: str | type[Engine] = "auto"
) -> tuple[list[Clip], dict[str, Any]]:
    """The same by a bundle's engines, and what they are."""
    seeds = seeds_of(cases, seed)
    with Animator(source, backend) as animator:
        calls = -(-len(cases) // animator.profile.batch) * len(settings.steps(animator.config))
        with Progress("animate", calls, "step") as progress:

            def on_step(done: int, total: int) -> None:
                progress.advance()
                progress.say()

            animations = animator.batch(
                [case.clip[0] for case in cases],
                [case.prompt for case in cases],
                seeds=seeds,
                settings=settings,
                on_step=on_step,
            )
        return [animation.frames for animation in animations], animator.describe()


def seeds_of(cases: Sequence[Case], seed: int) -> list[int]:
    """The seed of each case's noise; InputError where one would be out of bounds."""
    return [check_seed(seed + i) for i in range(len(cases))]
