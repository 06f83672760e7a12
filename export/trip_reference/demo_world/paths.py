"""Clips of the demo world in which the object goes along a path that no sentence could say, and a judge of where it
went: what a control learns from, and is measured by."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trip_reference.data.sample import Sample
from trip_reference.demo_world import world
from trip_reference.demo_world.clips import DemoWorldClips
from trip_reference.demo_world.judge import difference
from trip_reference.demo_world.stories import place_of, render_poses
from trip_rt.control import path_control, places_along

Points = NDArray[np.float64]

EDGE = 0.2  # of the side, that a path keeps away from the picture's edge
LONGEST = 0.55  # of the side; the sentences' own motions go 0.28
MOST_TURNS = 3
RESTING = 0.05  # share of paths that stay where they are
NEUTRAL = 0.5  # share of sentences that say no direction, whatever the path
OFF = 0.5  # of the radius: how far from the object's middle a path may begin


def draw_path(scene: world.Scene, rng: np.random.Generator) -> Points:
    """Points [n, 2] from the object's middle on, in shares of the picture's side."""
    start = np.array([scene.x, scene.y])
    if rng.random() < RESTING:
        return np.stack([start, start])
    points = [start, *rng.uniform(EDGE, 1 - EDGE, (rng.integers(1, MOST_TURNS + 1), 2))]
    walked = [np.linalg.norm(after - before) for before, after in pairwise(points)]
    shorter = min(1.0, LONGEST * rng.uniform(0.4, 1) / max(sum(walked), 1e-9))
    return np.stack([start + (point - start) * shorter for point in points])


def render_places(scene: world.Scene, places: Points, size: int) -> NDArray[np.uint8]:
    """The clip whose object is at `places` [F, 2], uint8 [F, size, size, 3]."""
    return render_poses([dataclasses.replace(scene, x=float(x), y=float(y)) for x, y in places], size)


def sentence(scene: world.Scene, points: Points, rng: np.random.Generator) -> str:
    """What a person might say of a path: its direction, where it has one, or that the object moves."""
    dx, dy = points[-1] - points[0]
    across, along = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if across < 0.02:
        return world.caption(scene, "still", rng)
    if rng.random() < NEUTRAL or along > across / 2:
        return world.told(scene, ("moves",), rng)
    names = {"right" if dx > 0 else "left": abs(dx), "down" if dy > 0 else "up": abs(dy)}
    return world.caption(scene, max(names, key=lambda name: names[name]), rng)


class DemoPathClips(DemoWorldClips):
    """As those, but the object of each scene goes along a path of its own, which is the clip's control."""

    def clip(self, index: int, rng: np.random.Generator) -> Sample:
        scene, points = self.case(index)
        places = places_along(points, self._config.num_frames)
        off = rng.uniform(-1, 1, 2) * OFF * scene.radius / np.sqrt(2)
        control = path_control(np.clip(points + off, 0, 1), self._config)
        frames = render_places(scene, places, self._config.height)
        return Sample(frames, sentence(scene, points, rng), f"demo world, path {self._seed(index)}", control)

    def text(self, index: int, rng: np.random.Generator) -> str:
        return sentence(*self.case(index), rng)

    def case(self, index: int) -> tuple[world.Scene, Points]:
        """The scene and the path of one clip."""
        seed = self._seed(index)
        scene, _, _ = world.sample(seed, self._held_out)
        return scene, draw_path(scene, np.random.default_rng([seed, self._held_out, 1]))


def away_from_path(frames: NDArray[np.uint8], scene: world.Scene, points: Points) -> NDArray[np.float64]:
    """How far the object of a clip uint8 [F, size, size, 3] is from where it should be, in 64ths of the side, [F].

    Both are measured alike: the middle of what differs from the background, in the clip and in the true one.
    """
    size = frames.shape[1]
    empty = world.background(scene, size)
    true = render_places(scene, places_along(points, len(frames)), size)
    seen, wanted = (difference(clip.astype(np.float32) / 255, empty) for clip in (frames, true))
    found = np.array([place_of(frame)[0] for frame in seen])
    expected = np.array([place_of(frame)[0] for frame in wanted])
    away: NDArray[np.float64] = np.linalg.norm(found - expected, axis=1) * 64 / size
    return away
