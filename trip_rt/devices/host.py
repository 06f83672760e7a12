"""The host: buffers are numpy arrays, and work is done when it is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt.devices.base import Buffer, Device, ReadBack, Work


class HostDevice(Device):
    """The CPU's own memory."""

    kind = "cpu"

    def use(self) -> None:
        """There is but one host."""

    def zeros(self, dtype: str, shape: Sequence[int]) -> Buffer:
        array = np.zeros(shape, dtype)
        return Buffer(array.dtype, array.shape, array.ctypes.data, array)

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        _array(buffer)[...] = array

    def read(self, buffer: Buffer) -> NDArray[Any]:
        return _array(buffer).copy()

    def copy(self, source: Buffer, target: Buffer) -> None:
        _array(target)[...] = _array(source)

    def gather_frames(self, clip: Buffer, frames: Sequence[int], target: Buffer) -> None:
        _array(target)[...] = _array(clip)[:, list(frames)].swapaxes(0, 1)

    def read_back(self, buffer: Buffer) -> ReadBack:
        return _HostReadBack(_array(buffer))

    def capture(self, body: Work) -> Work:
        return body

    def pace(self) -> None:
        """All is done already."""

    def close(self) -> None:
        """Arrays free themselves."""


class _HostReadBack(ReadBack):
    depth = 1

    def __init__(self, array: NDArray[Any]):
        self._array = array
        self._taken: deque[NDArray[Any]] = deque()

    def put(self) -> None:
        self._taken.append(self._array.copy())

    def take(self) -> NDArray[Any]:
        return self._taken.popleft()

    def drop(self) -> None:
        self._taken.clear()


def _array(buffer: Buffer) -> NDArray[Any]:
    assert buffer.array is not None, "a buffer of the host's"
    return buffer.array
