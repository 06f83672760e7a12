"""Seeded, captioned clips of one coloured shape that does one thing on a calm background.

A scene fixes everything but the motion, and each motion has one speed, so picture plus sentence determine the clip:
`render(scene, motion)` is the ground truth that `judge` judges against. Shapes are signed distance functions,
so edges are antialiased at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

COLOURS = {
    "red": (0.87, 0.14, 0.15),
    "orange": (0.97, 0.53, 0.08),
    "yellow": (0.98, 0.88, 0.16),
    "green": (0.12, 0.62, 0.24),
    "blue": (0.13, 0.33, 0.88),
    "purple": (0.52, 0.17, 0.70),
    "pink": (0.97, 0.47, 0.72),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
MOTIONS = ("left", "right", "up", "down", "grows", "shrinks", "spins", "still")
BACKGROUNDS = ("gradient", "radial", "rings", "stripes", "hills", "dunes", "blobs")

SPEED = 1.2 / 64  # fraction of the picture's side per frame
GROWTH, SHRINKAGE = 1.8, 0.5  # size in the last frame over size in the first
SIZES = {"grows": GROWTH, "shrinks": SHRINKAGE}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down
TURN = np.deg2rad(12.0)  # clockwise per frame

_NOUNS = {"circle": ("circle", "ball"), "cross": ("cross", "plus")}
_PHRASES = {
    "left": (
        "moves to the left",
        "slides to the left",
        "goes to the left",
        "drifts to the left",
        "rolls to the left",
        "moves left",
    ),
    "right": (
        "moves to the right",
        "slides to the right",
        "goes to the right",
        "drifts to the right",
        "rolls to the right",
        "moves right",
    ),
    "up": ("moves up", "slides up", "goes up", "drifts up", "rises", "moves upwards"),
    "down": ("moves down", "slides down", "goes down", "drifts down", "falls", "moves downwards"),
    "grows": ("grows", "gets bigger", "becomes larger"),
    "shrinks": ("shrinks", "gets smaller", "becomes smaller"),
    "spins": ("spins", "rotates", "turns around"),
    "still": ("stays still", "does not move", "rests"),
}


@dataclass(frozen=True)
class Scene:
    """A still picture: one shape on a background. Lengths are fractions of the picture's side; `seed` draws the
    background."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float
    background: str
    seed: int


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    """The (colour, shape, motion) triples that training sees, or those it never does (one in eight; every pair is still
    seen).

    A spinning circle looks like a resting one, so there is none.
    """
    triples = []
    for (c, colour), (s, shape), (m, motion) in product(enumerate(COLOURS), enumerate(SHAPES), enumerate(MOTIONS)):
        if (shape, motion) != ("circle", "spins") and ((c + 2 * s + 3 * m) % 8 == 0) == held_out:
            triples.append((colour, shape, motion))
    return triples


def sample(seed: int, held_out: bool = False) -> tuple[Scene, str, str]:
    """The seed's scene, motion and caption, drawn from `combinations(held_out)`."""
    rng = np.random.default_rng([seed, held_out])
    triples = combinations(held_out)
    colour, shape, motion = triples[rng.integers(len(triples))]
    scene = Scene(
        colour=colour,
        shape=shape,
        # The start says nothing about the motion: every motion fits every start (at worst the shape half leaves the
        # picture).
        x=float(rng.uniform(0.35, 0.65)),
        y=float(rng.uniform(0.35, 0.65)),
        radius=float(rng.uniform(0.15, 0.20)),
        angle=float(rng.uniform(-0.35, 0.35)),
        background=str(rng.choice(BACKGROUNDS)),
        seed=int(rng.integers(2**31)),
    )
    return scene, motion, caption(scene, motion, rng)


def caption(scene: Scene, motion: str, rng: np.random.Generator | None = None) -> str:
    """A sentence for the motion; without `rng`, the plainest one."""
    return told(scene, _PHRASES[motion], rng)


def told(scene: Scene, phrases: Sequence[str], rng: np.random.Generator | None = None) -> str:
    """A sentence that says one of `phrases` of the scene's shape; without `rng`, the plainest one."""
    nouns = _NOUNS.get(scene.shape, (scene.shape,))
    noun, phrase = (nouns[0], phrases[0]) if rng is None else (str(rng.choice(nouns)), str(rng.choice(phrases)))
    article = "an" if scene.colour == "orange" else "a"
    if rng is not None and rng.random() < 0.3:
        article = "the"
    return f"{article} {scene.colour} {noun} {phrase}"


def vocabulary() -> list[str]:
    """Every word a caption can hold, sorted."""
    nouns = {noun for shape in SHAPES for noun in _NOUNS.get(shape, (shape,))}
    verbs = {word for phrases in _PHRASES.values() for phrase in phrases for word in phrase.split()}
    return sorted({"a", "an", "the"} | set(COLOURS) | nouns | verbs)


def render(scene: Scene, motion: str, num_frames: int = 16, size: int = 64) -> NDArray[np.uint8]:
    """The clip, uint8 [F, size, size, 3]; frame 1 is the scene itself whatever the motion."""
    picture = background(scene, size)
    distance = _distance(scene, motion, num_frames, size)  # [F, H, W], in pixels
    right, below = size // 64, size // 32
    cast = np.pad(distance, ((0, 0), (below, 0), (right, 0)), mode="edge")[:, :size, :size]
    shadow = 0.34 / (1 + np.exp(np.minimum(cast * 58 / size, 40)))
    clip = picture * (1 - shadow[..., None])
    down, across = np.gradient(distance, axis=(1, 2))
    slope = 1 - np.clip(-distance * 21 / size, 0, 1)  # of the bevelled edge, which is flat three 64ths inside
    light = np.linspace(1.06, 0.90, size, dtype=np.float32)[:, None] - 0.22 * slope * (0.45 * across + 0.89 * down)
    colour = np.array(COLOURS[scene.colour], np.float32) * light[..., None]  # lit from above, on the left
    alpha = np.clip(0.5 - distance, 0, 1)[..., None]
    clip = clip * (1 - alpha) + np.clip(colour, 0, 1) * alpha
    return np.rint(np.clip(clip, 0, 1) * 255).astype(np.uint8)


def mask(scene: Scene, motion: str, num_frames: int = 16, size: int = 64) -> Array:
    """How much of each pixel the shape covers, float32 [F, size, size] in 0 to 1."""
    return np.clip(0.5 - _distance(scene, motion, num_frames, size), 0, 1)


def background(scene: Scene, size: int = 64) -> Array:
    """The picture without its shape, float32 [size, size, 3] in 0 to 1. Muted, so that every shape's colour
    stands out."""
    rng = np.random.default_rng(scene.seed)
    near, far = _muted(rng), _muted(rng)
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size
    angle = rng.uniform(0, 2 * np.pi)
    along = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
    match scene.background:
        case "gradient":
            mix = along / 1.42 + 0.5
        case "radial":
            mix = np.hypot(x - rng.uniform(0.2, 0.8), y - rng.uniform(0.2, 0.8)) / 1.1
        case "rings":
            far = near + 0.45 * (far - near)
            away = np.hypot(x - rng.uniform(0.2, 0.8), y - rng.uniform(0.2, 0.8))
            mix = 0.5 + 0.5 * np.cos(2 * np.pi * away * rng.uniform(2.0, 3.5))
        case "stripes":
            far = near + 0.45 * (far - near)
            mix = 0.5 + 0.5 * np.sin(2 * np.pi * along * rng.uniform(2.0, 3.5) + rng.uniform(0, 6.28))
        case "hills":
            ridge = rng.uniform(0.45, 0.75) + 0.07 * np.sin(
                2 * np.pi * x * rng.uniform(0.6, 1.6) + rng.uniform(0, 6.28)
            )
            mix = np.clip((y - ridge) * size * 0.7 + 0.5, 0, 1) * 0.75 + 0.25 * y
        case "dunes":
            mix = 0.3 * y
            for height in (0.45, 0.62, 0.8):
                ridge = height + 0.05 * np.sin(2 * np.pi * x * rng.uniform(0.6, 1.6) + rng.uniform(0, 6.28))
                mix += np.clip((y - ridge) * size * 0.7 + 0.5, 0, 1) * 0.23
        case "blobs":
            mix = np.zeros_like(x)
            for _ in range(4):
                centre, radius = rng.uniform(0, 1, 2), rng.uniform(0.12, 0.25)
                mix += 0.6 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * radius**2))
        case kind:
            raise ValueError(f"background: found {kind!r}, expected one of {', '.join(BACKGROUNDS)}")
    mix = np.clip(mix, 0, 1)[..., None]
    return (near * (1 - mix) + far * mix).astype(np.float32)


def _muted(rng: np.random.Generator) -> Array:
    hue, saturation, value = rng.uniform(0, 1), rng.uniform(0.08, 0.35), rng.uniform(0.45, 0.80)
    wheel = np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return (value * (1 - saturation + saturation * np.clip(wheel, 0, 1))).astype(np.float32)


def _distance(scene: Scene, motion: str, num_frames: int, size: int) -> Array:
    """Signed distance to the shape's edge in pixels, negative inside, [F, size, size]."""
    step = np.arange(num_frames, dtype=np.float32)
    # Sizes are set for the last of 16 frames, so that a longer clip goes on at the same pace.
    change = SIZES.get(motion, 1.0) ** (step / 15)
    dx, dy = DIRECTIONS.get(motion, (0, 0))
    angle = scene.angle + (TURN * step if motion == "spins" else 0 * step)
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size
    x = x - (scene.x + dx * SPEED * step)[:, None, None]  # [F, H, W]
    y = y - (scene.y + dy * SPEED * step)[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    scale = (scene.radius * change)[:, None, None]
    u, v = (x * cos + y * sin) / scale, (-x * sin + y * cos) / scale
    return (_SDF[scene.shape](u, v) * scale * size).astype(np.float32)


def _circle(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - 0.92


def _box(u: Array, v: Array, a: float, b: float) -> Array:
    qu, qv = np.abs(u) - a, np.abs(v) - b
    return np.hypot(np.maximum(qu, 0), np.maximum(qv, 0)) + np.minimum(np.maximum(qu, qv), 0)


def _square(u: Array, v: Array) -> Array:
    return _box(u, v, 0.70, 0.70) - 0.08


def _cross(u: Array, v: Array) -> Array:
    return np.minimum(_box(u, v, 0.92, 0.26), _box(u, v, 0.26, 0.92)) - 0.06


def _polygon(u: Array, v: Array, points: list[tuple[float, float]]) -> Array:
    """Exact distance to a polygon: nearest edge, sign by crossings."""
    distance, inside = np.full_like(u, np.inf), np.zeros(u.shape, bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, u - ax, v - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, np.hypot(wx - ex * along, wy - ey * along))
        if ey != 0:
            inside ^= ((ay > v) != (by > v)) & (u < ex * (v - ay) / ey + ax)
    return np.where(inside, -distance, distance)


def _ring(count: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    turns = [2 * np.pi * i / count - np.pi / 2 for i in range(count)]
    return [
        (radii[i % len(radii)] * np.cos(turn), radii[i % len(radii)] * np.sin(turn)) for i, turn in enumerate(turns)
    ]


def _triangle(u: Array, v: Array) -> Array:
    return _polygon(u, v, _ring(3, (1.0,))) - 0.08


def _star(u: Array, v: Array) -> Array:
    return _polygon(u, v, _ring(10, (1.05, 0.50))) - 0.05


def _heart(u: Array, v: Array) -> Array:
    turn = np.linspace(0, 2 * np.pi, 25)[:-1]
    x = 16 * np.sin(turn) ** 3
    y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    return _polygon(u, v, list(zip((x / 17).tolist(), ((-y - 2.5) / 17).tolist(), strict=True))) - 0.02


_SDF = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "heart": _heart, "cross": _cross}
