"""The control of a real video: how its pixels move, by optical flow of the very frames that are trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trip_reference.data.sample import ClipDataset, Sample
from trip_rt.config import TripConfig
from trip_rt.control import MOTION_UNIT, places_control
from trip_rt.optical_flow import FlowBetween, opencv

Frames = NDArray[np.uint8]
Array = NDArray[np.float32]

PATHS = 0.5  # share of clips whose control is the path of one point, as people draw it
UNSURE = 1.5  # pixels that flow there and back may differ by, where it is half known, about


class WithMotion:
    """A ClipDataset's clips with a control of motion each (trip_rt.control)."""

    def __init__(self, clips: ClipDataset, config: TripConfig):
        opencv()  # before any slow work
        self._clips, self._config = clips, config

    def __len__(self) -> int:
        return len(self._clips)

    def clip(self, index: int, rng: np.random.Generator) -> Sample:
        sample = self._clips.clip(index, rng)
        control = motion_of(sample.frames, self._config, rng)
        return Sample(sample.frames, sample.text, sample.name, control)

    def text(self, index: int, rng: np.random.Generator) -> str:
        return self._clips.text(index, rng)


def motion_of(frames: Frames, config: TripConfig, rng: np.random.Generator) -> Array:
    """The `motion` map [3, F, h, w] of a clip uint8 [F, H, W, 3]: of all its pixels or, as often, of one point alone,
    likely of what moves most."""
    back, forth = FlowBetween(frames[0], to_first=True), FlowBetween(frames[0], to_first=False)
    flows = [(back(frame), forth(frame)) for frame in frames]
    if rng.random() < PATHS:
        return places_control(_followed([there for _, there in flows], rng), config)
    return np.stack([_map(here, there, config) for here, there in flows], axis=1)


def _map(back: Array, forth: Array, config: TripConfig) -> Array:
    """One frame's map [3, h, w]: known where flow there and back agree."""
    cv = opencv()
    height, width = back.shape[:2]
    places = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
    returned = cv.remap(forth, places + back, None, cv.INTER_LINEAR, borderMode=cv.BORDER_REPLICATE)
    known = np.exp(-np.square(back + returned).sum(-1) / (2 * UNSURE**2))
    moved = -back / (np.array([width, height], np.float32) * MOTION_UNIT)
    _, h, w = config.frame_shape
    layers = np.dstack([moved * known[..., None], known]).astype(np.float32)
    shrunk: Array = cv.resize(layers, (w, h), interpolation=cv.INTER_AREA)
    return shrunk.transpose(2, 0, 1)


def _followed(forth: list[Array], rng: np.random.Generator) -> NDArray[np.float64]:
    """Where a point of frame 1 is in each frame, [F, 2] in shares of the sides; the farther a point goes, the likelier
    it is taken."""
    height, width = forth[0].shape[:2]
    far = np.linalg.norm(forth[-1], axis=-1).ravel().astype(np.float64) + 1e-3
    y, x = divmod(int(rng.choice(far.size, p=far / far.sum())), width)
    places = np.array([flow[y, x] + (x, y) for flow in forth], np.float64) + 0.5
    return np.clip(places / (width, height), 0, 1)
