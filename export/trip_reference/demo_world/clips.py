"""Clips of the demo world: rendered one at a time as a source of training data, many in memory, or written as a data
set of real files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trip_reference.data.annotations import ANNOTATIONS, VALIDATION
from trip_reference.data.new_folder import new_folder
from trip_reference.data.sample import Sample
from trip_reference.demo_world import world
from trip_reference.progress import Progress, shown_progress
from trip_rt.config import TripConfig
from trip_rt.errors import InputError
from trip_rt.video import save


class DemoWorldClips:
    """The clips of seeds `first_seed` … `first_seed + count − 1`, rendered when asked for, in words drawn anew each
    time; a ClipDataset."""

    def __init__(self, config: TripConfig, count: int, first_seed: int = 0, held_out: bool = False):
        if config.width != config.height:
            raise InputError(
                f"size: found {config.width} x {config.height}, expected a square; the demo world has no other pictures"
            )
        self._config, self._count, self._first_seed, self._held_out = config, count, first_seed, held_out

    def __len__(self) -> int:
        return self._count

    def clip(self, index: int, rng: np.random.Generator) -> Sample:
        scene, motion = self._scene(index)
        frames = world.render(scene, motion, self._config.num_frames, self._config.height)
        return Sample(frames, world.caption(scene, motion, rng), f"demo world, seed {self._seed(index)}")

    def text(self, index: int, rng: np.random.Generator) -> str:
        scene, motion = self._scene(index)
        return world.caption(scene, motion, rng)

    def _seed(self, index: int) -> int:
        return self._first_seed + range(self._count)[index]

    def _scene(self, index: int) -> tuple[world.Scene, str]:
        scene, motion, _ = world.sample(self._seed(index), self._held_out)
        return scene, motion


@dataclass(frozen=True)
class RenderedClips:
    """`frames` is uint8 [N, F, H, W, 3]; `centres` are the shapes' middles in pixels (x, y), float32 [N, F, 2]."""

    frames: NDArray[np.uint8]
    centres: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.frames)


def render_clips(config: TripConfig, count: int, first_seed: int = 0, held_out: bool = False) -> RenderedClips:
    """The clips of seeds `first_seed` … `first_seed + count − 1`."""
    frames, centres = [], []
    for seed in shown_progress(range(first_seed, first_seed + count), count, "render clips", "clip"):
        scene, motion, _ = world.sample(seed, held_out)
        frames.append(world.render(scene, motion, config.num_frames, config.height))
        cover = world.mask(scene, motion, config.num_frames, config.height)
        pixels = np.arange(config.height, dtype=np.float32)
        total = cover.sum((1, 2))
        centres.append(np.stack([(cover.sum(1) @ pixels) / total, (cover.sum(2) @ pixels) / total], axis=1))
    return RenderedClips(np.stack(frames), np.stack(centres).astype(np.float32))


def write_demo_folder(
    folder: Path, count: int, val_count: int, size: int = 128, num_frames: int = 16, fps: float = 4.0
) -> None:
    """A data set of `count` .mp4 files of size × size pixels, and `val_count` of combinations that those leave out (no
    file for none).

    Appears whole; raises InputError where `folder` holds anything.
    """
    if min(count, size, num_frames) < 1 or val_count < 0:
        found = f"{count} clips, {val_count} for validation, {num_frames} frames of {size} pixels"
        raise InputError(f"demo: found {found}, expected at least 1, 0, 1 and 1")
    splits = [(ANNOTATIONS, "video", count, False), (VALIDATION, "val", val_count, True)]
    with (
        new_folder(folder) as draft,
        Progress("write clips", count + val_count, "clip") as progress,
    ):
        (draft / "videos").mkdir()
        for file, stem, clips, held_out in splits:
            entries = []
            for seed in range(clips):
                scene, motion, text = world.sample(seed, held_out)
                entries.append({"video_path": f"videos/{stem}_{seed:06d}.mp4", "text": text})
                save(world.render(scene, motion, num_frames, size), draft / entries[-1]["video_path"], fps)
                progress.advance()
                progress.say()
            if entries:
                (draft / file).write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")
