"""What every source of training data gives: clips of one format, each with its sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from trip_rt.config import MOST_CLIP
from trip_rt.errors import InputError

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Sample:
    """`frames` is uint8 [F, H, W, 3]; `name` says where the clip came from; `control` [K, F, h, w] what steers it."""

    frames: Frames
    text: str
    name: str
    control: NDArray[np.float32] | None = None


class BrokenClip(Exception):
    """A clip that cannot be used; the message is one line that names its file. Training goes on without it."""


@dataclass(frozen=True)
class ClipFormat:
    """The clips that training wants, `num_frames` pictures with stride / fps seconds between them, and the most it
    takes of a file.

    A clip starts at a random frame from which all of it fits, or at the first. Pictures are scaled until they cover
    height × width, then cut. `max_bytes` is of a file, `max_pixels` of a picture in it, `max_seconds` of its length.
    """

    num_frames: int
    height: int
    width: int
    fps: float = 4.0
    stride: int = 1
    crop: Literal["centre", "random"] = "random"
    start: Literal["random", "first"] = "random"
    max_bytes: int = 2**30
    max_pixels: int = 4096 * 4096
    max_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for name, most in (("num_frames", 4096), ("height", 8192), ("width", 8192), ("stride", 1_000_000)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name}: found {getattr(self, name)}, expected 1 to {most}")
        if (size := 3 * self.num_frames * self.height * self.width) > MOST_CLIP:
            raise InputError(
                f"found clips of {self.num_frames} frames of {self.width}x{self.height}, {size / 2**30:.1f} GiB,"
                f" expected at most {MOST_CLIP >> 30}"
            )
        if not 0 < self.fps <= 1000:
            raise InputError(f"fps: found {self.fps:g}, expected more than 0 and at most 1000")


def evenly(count: int, most: int) -> list[int]:
    """At most `most` numbers below `count`, evenly spread, the first and the last among them."""
    return [int(number) for number in np.unique(np.linspace(0, count - 1, most).astype(int))]


class ClipDataset(Protocol):
    """Clips that can be had in any order."""

    def __len__(self) -> int: ...

    def clip(self, index: int, rng: np.random.Generator) -> Sample:
        """Clip `index`. All that is random about it comes from `rng`. Raises BrokenClip."""
        ...

    def text(self, index: int, rng: np.random.Generator) -> str:
        """A sentence for clip `index`, without its pictures."""
        ...
