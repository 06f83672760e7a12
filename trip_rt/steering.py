"""What a control adds to the UNet: made once a clip, there or not as each step says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trip_rt.devices import Buffer, Device
from trip_rt.sampling.loop import Array
from trip_rt.sampling.step import Step


class Steering:
    """Keeps the UNet's buffer `control_features` [B, F', C', h, w], which is zero where nothing steers.

    `encode` makes these features of controls [B, K, F, h, w].
    """

    def __init__(self, device: Device, buffer: Buffer, encode: Callable[[Array], Array]):
        self._device, self._buffer, self._encode = device, buffer, encode
        self._nothing = np.zeros(buffer.shape, np.float32)
        self._features = self._nothing
        self._there = self._nothing  # what the buffer holds

    def give(self, controls: Sequence[Array | None], scale: float) -> None:
        """Controls [K, F, h, w] of a group of clips, None for one that nothing steers, and how strongly they count."""
        present = next((control for control in controls if control is not None), None)
        if present is None or scale == 0:
            self._features = self._nothing
            return
        whole = np.stack([np.zeros_like(present) if control is None else control for control in controls])
        steered = np.array([control is not None for control in controls]).reshape(-1, *[1] * (self._nothing.ndim - 1))
        self._features = np.where(steered, np.float32(scale) * self._encode(whole), np.float32(0))

    def __call__(self, step: Step) -> None:
        """Make the buffer right for `step`."""
        wanted = self._features if step.controlled else self._nothing
        if wanted is not self._there:
            self._device.write(self._buffer, wanted)
            self._there = wanted
