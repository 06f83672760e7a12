"""Clips of the demo world of any length, in which one thing happens after another, and what a judge sees at their end.

A story is a list of motions, one from each frame to the next: the truth at any length. Over a long clip small errors of
place and size add up, so shape and motion are judged where and as large as the object is seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_reference.demo_world import world
from trip_reference.demo_world.judge import difference, likeness, motions_of, nearest_colour
from trip_rt.accuracy import psnr

Array = NDArray[np.float32]
Frames = NDArray[np.uint8]

# What brings an object back after each motion, so that a story of any length stays in the picture.
BACK = {"left": "right", "right": "left", "up": "down", "down": "up", "grows": "shrinks", "shrinks": "grows"}
SPAN = 12  # last frames of a clip that its motion is judged by
MOST_STEP = 2.0  # times the object's true pace: a larger displacement from one frame to the next is a jump
_SEEN = 0.15  # of a pixel's distance from the background; a shadow is fainter


@dataclass(frozen=True)
class Ending:
    """What is seen in the last SPAN frames (`motion`) and in the last frame (`shape`, `colour`); how far the object
    moves from one frame to the next at most, in shares of its true pace (`step`); and the frames' PSNR to the truth in
    dB, of the whole clip and of its last SPAN frames."""

    motion: str
    shape: str
    colour: str
    step: float
    truth_psnr: float
    last_psnr: float

    def checks(self, scene: world.Scene, motion: str) -> dict[str, bool]:
        """Each demand on a clip of `scene` that should end with `motion`, and whether it is met."""
        return {
            "motion": self.motion == motion,
            "shape": self.shape == scene.shape,
            "colour": self.colour == scene.colour,
            "no jump": self.step <= MOST_STEP,
        }


def poses(scene: world.Scene, story: Sequence[str]) -> list[world.Scene]:
    """The scene as it is in each of len(story) + 1 frames."""
    found = [scene]
    for motion in story:
        dx, dy = world.DIRECTIONS.get(motion, (0, 0))
        change = world.SIZES.get(motion, 1.0) ** (1 / 15)
        now = found[-1]
        found.append(
            dataclasses.replace(
                now,
                x=now.x + dx * world.SPEED,
                y=now.y + dy * world.SPEED,
                radius=now.radius * change,
                angle=now.angle + (world.TURN if motion == "spins" else 0),
            )
        )
    return found


def render_story(scene: world.Scene, story: Sequence[str], size: int = 64) -> Frames:
    """The truth, uint8 [len(story) + 1, size, size, 3]."""
    return render_poses(poses(scene, story), size)


def render_poses(poses: Sequence[world.Scene], size: int) -> Frames:
    """A clip with a scene a frame, uint8 [len(poses), size, size, 3]."""
    return np.concatenate([world.render(pose, "still", 1, size) for pose in poses])


def judge_ending(frames: Frames, scene: world.Scene, story: Sequence[str]) -> Ending:
    """Look at a clip uint8 [len(story) + 1, size, size, 3] that should show `scene` doing one motion after another."""
    size, true = frames.shape[1], poses(scene, story)
    empty = world.background(scene, size)
    truth, clip = render_story(scene, story, size).astype(np.float32) / 255, frames.astype(np.float32) / 255
    seen = difference(clip, empty)

    start = len(frames) - SPAN
    begins = _aligned(true[start], seen[start], empty)
    of_motions = {
        name: likeness(seen[start + 1 :], _looks(begins, empty, name, SPAN)[1:]) for name in motions_of(scene.shape)
    }
    shape, colour = seen_in(frames[-1], true[-1])
    places = np.array([place_of(frame)[0] for frame in seen])
    paces = np.linalg.norm(np.diff(places, axis=0), axis=1) / (world.SPEED * size)
    return Ending(
        motion=max(of_motions, key=lambda name: of_motions[name]),
        shape=shape,
        colour=colour,
        step=float(paces.max()),
        truth_psnr=psnr(clip, truth, 1.0, 100.0),
        last_psnr=psnr(clip[start:], truth[start:], 1.0, 100.0),
    )


def seen_in(frame: NDArray[np.uint8], pose: world.Scene) -> tuple[str, str]:
    """The shape and the colour of what a frame uint8 [size, size, 3] shows, where and as large as it is seen; `pose` is
    what it should show."""
    empty, picture = world.background(pose, len(frame)), frame.astype(np.float32) / 255
    seen = difference(picture[None], empty)[0]
    shapes = {name: _aligned(dataclasses.replace(pose, shape=name), seen, empty) for name in world.SHAPES}
    alike = {name: likeness(seen, _looks(shaped, empty)[0]) for name, shaped in shapes.items()}
    inside = world.mask(shapes[pose.shape], "still", 1, len(frame))[0] > 0.99
    colour = picture[inside].mean(axis=0) if inside.any() else np.zeros(3)
    return max(alike, key=lambda name: alike[name]), nearest_colour(colour)


def _looks(pose: world.Scene, empty: Array, motion: str = "still", count: int = 1) -> Array:
    picture = world.render(pose, motion, count, len(empty)).astype(np.float32) / 255
    return difference(picture, empty)


def _aligned(pose: world.Scene, seen: Array, empty: Array) -> world.Scene:
    """The pose, where and as large as something is `seen` in a frame."""
    size = len(empty)
    for _ in range(2):
        (x, y), area = place_of(seen)
        (at_x, at_y), covers = place_of(_looks(pose, empty)[0])
        larger = float(np.clip(np.sqrt(area / max(covers, 1)), 0.5, 2.0))
        pose = dataclasses.replace(
            pose, x=pose.x + (x - at_x) / size, y=pose.y + (y - at_y) / size, radius=pose.radius * larger
        )
    return pose


def place_of(seen: Any) -> tuple[tuple[float, float], float]:
    """Middle (x, y) and area, in pixels, of what differs from the background in one frame."""
    there = np.maximum(seen - _SEEN, 0)
    there[there > 0] = 1  # its colour says nothing of its place
    area = float(there.sum())
    if not area:
        return (0.0, 0.0), 0.0
    y, x = np.mgrid[: seen.shape[0], : seen.shape[1]]
    return (float((there * x).sum() / area), float((there * y).sum() / area)), area
