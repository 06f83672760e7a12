"""What every backend does for one component's engine: open, bind, describe, close."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from trip_rt.devices import Buffer, Device, Kind, open_device
from trip_rt.devices.base import Work
from trip_rt.manifest import EngineSpec, TensorSpec


@dataclass(frozen=True)
class EngineOptions:
    """How engines are opened: on `device` (`auto` takes a GPU where there is one) and with so many CPU `threads` (None:
    the library's own choice).

    `cuda_graph`: on a GPU, whether a denoising step is recorded once as a CUDA graph and replayed, for those engines
    that let themselves be recorded.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    cuda_graph: bool = True


class Engine(ABC):
    """An opened engine. What it is bound to or run on is checked against the manifest before the library sees it.

    `backend` is the name under which the manifest lists its engines; `capturable`, whether a CUDA graph can record its
    work. A class gives `bind` or, where its library is one of numpy arrays on the host, `_run`.
    """

    backend: ClassVar[str]
    capturable: ClassVar[bool] = False

    def __init__(self, spec: EngineSpec, device: Device | None = None, owns_device: bool = False):
        self.spec = spec
        self._device, self._owns_device = device, owns_device
        self._own: tuple[dict[str, Buffer], Work] | None = None
        self._is_closed = False

    @classmethod
    @abstractmethod
    def probe(cls, spec: EngineSpec, options: EngineOptions) -> Kind:
        """Where this engine would run here, found without opening it; InputError says why it cannot and what to do."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path, spec: EngineSpec, options: EngineOptions, device: Device | None = None) -> Engine:
        """Load the verified engine file, to work on `device` (by default one of its own); InputError where the library
        or this machine cannot."""

    @property
    def device(self) -> Device:
        """Where the buffers lie that it can be bound to."""
        if self._device is None:
            self._device = open_device("cpu")
        return self._device

    def bind(self, buffers: Mapping[str, Buffer]) -> Work:
        """A call that queues the engine's work on its device, from and to `buffers` of the device's, by the names of
        its inputs and outputs.

        ValueError where a name, dtype or shape is not the manifest's. Bindings to other buffers may be made beside this
        one; each keeps its buffers.
        """
        self.check(buffers, (*self.spec.inputs, *self.spec.outputs))
        arrays = {name: buffer.array for name, buffer in buffers.items() if buffer.array is not None}

        def work() -> None:
            for name, made in self._run({tensor.name: arrays[tensor.name] for tensor in self.spec.inputs}).items():
                arrays[name][...] = made

        return work

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name from inputs by name; ValueError where a name, dtype or shape is not the manifest's. The
        arrays are the caller's own."""
        if self._is_closed:
            raise self._closed()
        self.check(inputs, self.spec.inputs)
        return self._run(inputs)

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        device = self.device
        if self._own is None:
            buffers = {
                tensor.name: device.zeros(tensor.dtype, tensor.shape)
                for tensor in (*self.spec.inputs, *self.spec.outputs)
            }
            self._own = buffers, self.bind(buffers)
        buffers, work = self._own
        for name, array in inputs.items():
            device.write(buffers[name], array)
        work()
        return {tensor.name: device.read(buffers[tensor.name]) for tensor in self.spec.outputs}

    def capture(self, body: Work) -> Work:
        """`body`, which this engine has part in, recorded as a CUDA graph; only where it is `capturable`."""
        return self.device.capture(body)

    def check(self, found: Mapping[str, Buffer] | Mapping[str, NDArray[Any]], expected: Sequence[TensorSpec]) -> None:
        """ValueError unless `found` are these tensors."""
        sides = {tensor.name: "input" for tensor in self.spec.inputs}
        for tensor in expected:
            one = found.get(tensor.name)
            if one is None or one.dtype != np.dtype(tensor.dtype) or one.shape != tensor.shape:
                there = "nothing" if one is None else f"{one.dtype} {list(one.shape)}"
                side = sides.get(tensor.name, "output")
                raise ValueError(
                    f"{self.spec.file}: {side} {tensor.name}: found {there}, expected {tensor.dtype}"
                    f" {list(tensor.shape)}"
                )
        if len(found) != len(expected):
            unknown = sorted(set(found) - {tensor.name for tensor in expected})
            raise ValueError(
                f"{self.spec.file}: found unknown inputs {unknown}, expected {[tensor.name for tensor in expected]}"
            )

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Backend, library version and device, for logs and benchmarks."""

    @abstractmethod
    def close(self) -> None:
        """Free the engine, and its device if that is its own; calling it again does nothing, running it afterwards
        raises RuntimeError."""
        self._own, self._is_closed = None, True
        if self._owns_device and self._device:
            self._device.close()

    def _closed(self) -> RuntimeError:
        return RuntimeError(f"{self.spec.file}: found a closed engine, expected an open one; open the bundle again")
