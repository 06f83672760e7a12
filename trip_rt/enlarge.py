"""Clips larger than the engines make them: the given picture's own pixels, moved as the clip moves.

The clip says how things move, the picture at its full size how they look. For each frame, optical flow finds
where its pixels were in frame 1; the large picture is moved so, and takes on what the frame has changed on a large
scale, such as its light. Where the moved frame 1 is not this frame, as where something new comes
into view, the enlarged frame itself is shown; where nothing has changed, the picture is.

There are no tiles, so there are no seams, and one frame is made at a time, so memory is flat.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt.optical_flow import FlowBetween, opencv

Frame = NDArray[np.uint8]
Array = NDArray[np.float32]

# Levels of 255, by RMS over a neighbourhood: below RESTS a pixel counts as unchanged, above MOVED as not found in the
# picture (both are where half of it is left, about), and below NOISE a large change of light is the decoder's own.
RESTS, MOVED, NOISE = 5.0, 8.0, 3.0
# Neighbourhoods, in the engines' pixels: of an error, and of a change of light.
NEAR, WIDE = 1.0, 4.0


def enlarged(frames: Iterable[Frame], picture: Frame) -> Iterator[Frame]:
    """Each of a clip's frames, uint8 [H, W, 3], at the size of `picture`, uint8 [H', W', 3], from which the clip was
    made; InputError where OpenCV is not installed."""
    enlarge: _Enlarge | None = None
    for frame in frames:
        if enlarge is None:
            enlarge = _Enlarge(picture, frame)
        yield enlarge(frame)


class _Enlarge:
    def __init__(self, picture: Frame, first: Frame):
        self._cv = opencv()
        self._height, self._width = picture.shape[:2]
        self._scale = np.array([self._width / first.shape[1], self._height / first.shape[0]], np.float32)
        self._picture = picture.astype(np.float32)
        self._first_enlarged = self._large(first)
        self._places = np.stack(np.meshgrid(np.arange(self._width), np.arange(self._height)), -1).astype(np.float32)
        self._flow_to_first = FlowBetween(first, to_first=True)

    def __call__(self, frame: Frame) -> Frame:
        here = self._large(frame)
        flow = self._large(self._flow_to_first(frame)) * self._scale
        rests = np.exp(-self._mean_square(here - self._first_enlarged) / (2 * RESTS**2))
        difference = here - self._moved(self._first_enlarged, flow)
        found = np.exp(-self._mean_square(difference) / (2 * MOVED**2))
        light = self._blurred(found * difference, WIDE) / (self._blurred(found, WIDE)[..., None] + 1e-6)
        light = np.sign(light) * np.maximum(np.abs(light) - NOISE, 0)
        moved = found * (self._moved(self._picture, flow) + light) + (1 - found) * here
        made = rests * self._picture + (1 - rests) * moved
        levels: Frame = np.rint(np.clip(made, 0, 255)).astype(np.uint8)
        return levels

    def _large(self, image: NDArray[Any]) -> Array:
        large: Array = self._cv.resize(
            image.astype(np.float32), (self._width, self._height), interpolation=self._cv.INTER_CUBIC
        )
        return large

    def _moved(self, image: Array, flow: Array) -> Array:
        moved: Array = self._cv.remap(
            image, self._places + flow, None, self._cv.INTER_CUBIC, borderMode=self._cv.BORDER_REPLICATE
        )
        return moved

    def _mean_square(self, difference: Array) -> Array:
        """[H', W', 1], over colours and a neighbourhood."""
        return self._blurred(np.square(difference).mean(axis=-1), NEAR)[..., None]

    def _blurred(self, image: Array, reach: float) -> Array:
        blurred: Array = self._cv.GaussianBlur(
            image, (0, 0), float(self._scale[0] * reach), sigmaY=float(self._scale[1] * reach)
        )
        return blurred
