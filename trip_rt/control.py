"""Maps that steer a clip beside its picture and its sentence, float32 [K, F, h, w] on the grid of the latents.

`motion` (K = 3) says of each place how far what is seen there has moved since frame 1, to the right and down, in
quarters of the picture's sides, and how far that is known, 0 to 1. A drawn path makes such a map, and so does optical
flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt.checks import check_array, is_number, several, shown
from trip_rt.config import ControlConfig, TripConfig
from trip_rt.errors import InputError

Array = NDArray[np.float32]

MOTION_UNIT = 0.25  # of the picture's side: what a displacement of 1 is
REACH = 0.125  # of the picture's shorter side: the standard deviation of what a point of a path speaks for
MAX_POINTS = 1000


def path_control(points: Sequence[Any], config: TripConfig) -> Array:
    """The `motion` map [3, F, h, w] of what lies at the first of `points` going along them at an even pace.

    Points are (x, y) in shares of the picture's sides, 0 to 1, y down; InputError for others.
    """
    _, height, width = config.frame_shape
    return places_control(places_along(check_points(points), config.num_frames, (width, height)), config)


def places_control(places: NDArray[np.float64], config: TripConfig) -> Array:
    """The `motion` map [3, F, h, w] of one point that is at `places` [F, 2], in shares of the sides."""
    _, height, width = config.frame_shape
    y, x = np.mgrid[:height, :width] + 0.5
    reach = max(REACH * min(height, width), 1.0)
    away = np.hypot(x - places[:, 0, None, None] * width, y - places[:, 1, None, None] * height) / reach
    known = np.exp(-0.5 * np.square(away))
    moved = (places - places[0]) / MOTION_UNIT
    return np.stack([moved[:, 0, None, None] * known, moved[:, 1, None, None] * known, known]).astype(np.float32)


def check_control(control: Any, config: TripConfig, kind: ControlConfig) -> None:
    """InputError for what is no map of that kind for clips of that config."""
    check_array("control", control, "float32", (kind.channels, *config.latent_shape[1:]))
    if not np.isfinite(control).all():
        raise InputError("control: found a number that is not finite, expected finite ones")


def check_points(points: Any) -> NDArray[np.float64]:
    """The points of a path as [n, 2]; InputError for anything but 2 to MAX_POINTS pairs of numbers from 0 to 1."""
    points = several("path", points)
    if not 2 <= len(points) <= MAX_POINTS:
        raise InputError(f"path: found {len(points)} points, expected 2 to {MAX_POINTS}, the first on what is to move")
    for point in points:
        pair = list(point) if isinstance(point, Sequence | np.ndarray) and not isinstance(point, str) else []
        if len(pair) != 2 or not all(is_number(number) and 0 <= number <= 1 for number in pair):
            raise InputError(f"path: found {shown(point)}, expected (x, y) in shares of the picture's sides, 0 to 1")
    return np.array([list(point) for point in points], np.float64)


def places_along(
    points: NDArray[np.float64], num_frames: int, sides: tuple[float, float] = (1, 1)
) -> NDArray[np.float64]:
    """Where something is in each frame that goes along `points` [n, 2] at an even pace, [num_frames, 2], in a picture
    of these sides (width, height)."""
    lengths = [float(np.linalg.norm((after - before) * sides)) for before, after in pairwise(points)]
    walked = np.concatenate([[0.0], np.cumsum(lengths)])
    at = np.linspace(0, walked[-1], num_frames)
    return np.stack([np.interp(at, walked, points[:, axis]) for axis in (0, 1)], axis=1)
