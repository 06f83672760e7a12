"""Where the pixels of a clip's frames were in its first one: optical flow by OpenCV's DIS (Kroeger et al. 2016)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt.errors import InputError

LEAST_SIDE = 16  # of frames in which anything is looked for


def opencv() -> Any:
    """The library; InputError where it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise InputError("optical flow: OpenCV is not installed; pip install 'trip-rt[larger]'") from error
    return cv2


class FlowBetween:
    """From one frame to others, uint8 [H, W, 3], that follow each other; `to_first` from them to it.

    A call gives displacements [H, W, 2] in pixels, to the right and down: what is at p in the one frame is at p + flow
    in the other. What the frame before had is where the search begins.
    """

    def __init__(self, first: NDArray[np.uint8], to_first: bool):
        self._cv, self._to_first = opencv(), to_first
        self._first = self._grey(first)
        self._search = self._cv.DISOpticalFlow_create(self._cv.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self._before: NDArray[np.float32] | None = None

    def __call__(self, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
        if min(frame.shape[:2]) < LEAST_SIDE:
            return np.zeros((*frame.shape[:2], 2), np.float32)
        pair = (self._grey(frame), self._first) if self._to_first else (self._first, self._grey(frame))
        self._before = self._search.calc(*pair, self._before)
        flow: NDArray[np.float32] = self._before.copy()
        return flow

    def _grey(self, frame: NDArray[np.uint8]) -> Any:
        return self._cv.cvtColor(frame, self._cv.COLOR_RGB2GRAY)
