"""Judges a clip of the demo world: did the shape move as the sentence says, and did everything else stay?

Each motion and shape is a hypothesis that the world can render from the same scene. The map of where the
clip differs from its background is compared with the same map of each hypothesis, by their cosine: that tells motions
and shapes apart whatever the colour.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trip_reference.demo_world import world
from trip_rt.accuracy import psnr

Array = NDArray[np.float32]

MAX_TRAIL = 0.03  # share of pixels
VISIBLE = 0.1  # a difference from the true frame that a person would see; levels range from 0 to 1
MOST_PSNR = 100.0  # dB, of equal pictures
MIN_BACKGROUND_PSNR = 28.0  # dB
MIN_FRAME_1_PSNR = 28.0  # dB
REACH = 3  # pixels of a 64-pixel picture around the shape that its shadow and its edge may colour


@dataclass(frozen=True)
class Verdict:
    """What was seen (`motion`, `shape`, `colour`), and how well the rest was kept.

    `trail` looks at the clip's second half and at the pixels that the shape has left or has not reached yet: it is the
    share of them that differ visibly from the truth.
    """

    motion: str
    shape: str
    colour: str
    trail: float
    background_psnr: float
    frame_1_psnr: float
    truth_psnr: float

    def checks(self, scene: world.Scene, motion: str) -> dict[str, bool]:
        """Each demand on a clip of `scene` that was told to show `motion`, and whether it is met."""
        return {
            "motion": self.motion == motion,
            "colour": self.colour == scene.colour,
            "shape": self.shape == scene.shape,
            "no trail": self.trail <= MAX_TRAIL,
            "background": self.background_psnr >= MIN_BACKGROUND_PSNR,
            "frame 1": self.frame_1_psnr >= MIN_FRAME_1_PSNR,
        }


def judge(frames: NDArray[np.uint8], scene: world.Scene, motion: str) -> Verdict:
    """Look at a clip uint8 [F, size, size, 3] that should show `scene` doing `motion`."""
    num_frames, size = frames.shape[:2]
    clip = frames.astype(np.float32) / 255

    def truth(of: world.Scene = scene, doing: str = motion) -> Array:
        return world.render(of, doing, num_frames, size).astype(np.float32) / 255

    empty = world.background(scene, size)
    seen = difference(clip, empty)

    def nearest(candidates: dict[str, Array], start: int) -> str:
        return max(candidates, key=lambda name: likeness(seen[start:], difference(candidates[name], empty)[start:]))

    true = truth()
    late = num_frames // 2
    motions = motions_of(scene.shape)
    seen_motion = nearest({name: truth(doing=name) for name in motions}, 1)
    seen_shape = nearest({name: truth(replace(scene, shape=name)) for name in world.SHAPES}, late)

    cover = world.mask(scene, motion, num_frames, size)
    inside = cover[late:] > 0.99
    colour = clip[late:][inside].mean(axis=0) if inside.any() else np.zeros(3)
    seen_colour = nearest_colour(colour)

    near = np.stack([_dilate(frame > 0.01, REACH * size // 64) for frame in cover])  # [F, H, W]
    path = near.any(axis=0)
    left_behind = path & ~near
    visible = np.abs(clip - true).mean(axis=-1)[late:] > VISIBLE
    trail = float(visible[left_behind[late:]].mean()) if left_behind[late:].any() else 0.0
    untouched, still = np.broadcast_to(~path, near.shape), np.broadcast_to(true[:1], true.shape)
    return Verdict(
        motion=seen_motion,
        shape=seen_shape,
        colour=seen_colour,
        trail=trail,
        background_psnr=psnr(clip[untouched], still[untouched], 1.0, MOST_PSNR),
        frame_1_psnr=psnr(clip[0], true[0], 1.0, MOST_PSNR),
        truth_psnr=psnr(clip, true, 1.0, MOST_PSNR),
    )


def motions_of(shape: str) -> list[str]:
    """Those that can be told apart: a spinning circle looks like a resting one."""
    return [name for name in world.MOTIONS if (shape, name) != ("circle", "spins")]


def nearest_colour(colour: Array) -> str:
    """The name of the colour nearest to an RGB one, levels 0 to 1."""
    return min(world.COLOURS, key=lambda name: float(np.square(colour - world.COLOURS[name]).sum()))


def difference(clip: Array, picture: Array) -> Array:
    """How far each pixel's colour is from the picture's, [F, H, W]."""
    return np.linalg.norm(clip - picture, axis=-1)


def likeness(a: Array, b: Array) -> float:
    return float((a * b).sum() / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12))


def _dilate(region: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """Grow a region by `reach` pixels in every direction."""
    padded = np.pad(region, reach)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    grown: NDArray[np.bool_] = windows.any(axis=(2, 3))
    return grown
