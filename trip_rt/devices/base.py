"""A device: memory, and work that is done in the order in which it is handed over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["cpu", "cuda"]
Work = Callable[[], object]  # hands work over to a device; on the host, does it


@dataclass(frozen=True)
class Buffer:
    """A tensor of static shape at a fixed address; on the host, `array` is a view of it. Slices of the first axis are
    views."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    address: int
    array: NDArray[Any] | None = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> Buffer:
        start, stop, _ = rows.indices(self.shape[0])
        stride = self.nbytes // self.shape[0]
        view = None if self.array is None else self.array[start:stop]
        return replace(self, shape=(stop - start, *self.shape[1:]), address=self.address + start * stride, array=view)

    def row(self, index: int) -> Buffer:
        """One entry of the first axis, without that axis."""
        entry = self[index : index + 1]
        return replace(entry, shape=self.shape[1:], array=None if entry.array is None else entry.array[0])


class ReadBack(ABC):
    """Reads a buffer again and again while the device works on: up to `depth` contents are under way at a time."""

    depth: ClassVar[int]

    @abstractmethod
    def put(self) -> None:
        """Have the buffer's present contents read."""

    @abstractmethod
    def take(self) -> NDArray[Any]:
        """The contents of the oldest `put` not yet taken, the caller's own; waits for them."""

    @abstractmethod
    def drop(self) -> None:
        """Forget what was put and not taken."""


class Device(ABC):
    """Everything asked of a device happens in order. `kind` is where it is; `stream` is the handle of the CUDA stream
    that its work is queued on, 0 on the host."""

    kind: ClassVar[Kind]
    stream: int = 0

    @abstractmethod
    def use(self) -> None:
        """Have this thread's calls go to this device, as those of the thread that opened it do."""

    @abstractmethod
    def zeros(self, dtype: str, shape: Sequence[int]) -> Buffer:
        """A new buffer; InputError where memory is short."""

    @abstractmethod
    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Fill a buffer from an array of its dtype and shape, which may be changed as soon as this returns."""

    @abstractmethod
    def read(self, buffer: Buffer) -> NDArray[Any]:
        """A buffer's contents once all work before is done; the caller's own."""

    @abstractmethod
    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy one buffer to another of the same size."""

    @abstractmethod
    def gather_frames(self, clip: Buffer, frames: Sequence[int], target: Buffer) -> None:
        """Copy `frames` of a clip [C, F, h, w] to `target` [len(frames), C, h, w]."""

    @abstractmethod
    def read_back(self, buffer: Buffer) -> ReadBack:
        """A way to read this buffer while work goes on."""

    @abstractmethod
    def capture(self, body: Work) -> Work:
        """`body` in the form that repeats fastest, after running it once or not at all: what it leaves in buffers must
        not matter."""

    @abstractmethod
    def pace(self) -> None:
        """Wait until all is done but what was asked since the last call, so that the caller is never far ahead and the
        device never waits."""

    @abstractmethod
    def close(self) -> None:
        """Free all buffers; calling it again does nothing."""
