"""What every backend does for one component's engine: open, bind, describe, close."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from trip_rt.checks import one_of, shown, whole_number
from trip_rt.components import TensorSpec
from trip_rt.devices import Buffer, Device, Kind, Work
from trip_rt.errors import EngineError, InputError, one_line, printable
from trip_rt.manifest import EngineSpec

MAX_THREADS = 256
Tensor = tuple[str, Sequence[object]]  # dtype and shape; a side that is not fixed may be anything but a number


@dataclass(frozen=True)
class EngineOptions:
    """How engines are opened: on `device` (`auto` takes a GPU where there is one) and with that number of CPU `threads`
    (None: the library's own choice).

    `cuda_graph`: on a GPU, whether a denoising step is recorded once as a CUDA graph and replayed, for those engines
    that let themselves be recorded.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        if self.threads is not None:
            whole_number("threads", self.threads, 1, MAX_THREADS)
        if not isinstance(self.cuda_graph, bool):
            raise InputError(f"cuda_graph: found {shown(self.cuda_graph)}, expected True or False")


class Engine(ABC):
    """An opened engine, bound to buffers of its device. What it is bound to is checked against the manifest before the
    library sees it.

    `backend` is the name under which the manifest lists its engines; `capturable` says, once it is bound, whether a
    CUDA graph can record its work.
    """

    backend: ClassVar[str]
    capturable: bool = False

    def __init__(self, spec: EngineSpec, device: Device, owns_device: bool = False):
        self.spec, self.device = spec, device
        self._owns_device = owns_device
        self._own: tuple[dict[str, Buffer], Work] | None = None
        self._is_closed = False

    @classmethod
    @abstractmethod
    def probe(cls, spec: EngineSpec, options: EngineOptions) -> Kind:
        """Where this engine would run here, found without opening it; InputError says why it cannot and what to do."""

    @classmethod
    def lowers(cls) -> bool:
        """Whether this library can compute in bf16 here what a file says in fp32; `open` then does so for a `spec` that
        says bf16."""
        return False

    @classmethod
    @abstractmethod
    def open(cls, path: Path, spec: EngineSpec, options: EngineOptions, device: Device | None = None) -> Engine:
        """Load the verified engine file, to work on `device` (by default one of its own); InputError where the library
        or this machine cannot."""

    @abstractmethod
    def bind(self, buffers: Mapping[str, Buffer]) -> Work:
        """A call that queues the engine's work on its device, from and to `buffers` of the device's, by the names of
        its inputs and outputs.

        ValueError where a name, dtype or shape is not the manifest's. Bindings to other buffers may be made beside this
        one; each keeps its buffers.
        """

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name from inputs by name, on buffers of the engine's own; ValueError as for `bind`. The arrays are
        the caller's own."""
        if self._is_closed:
            raise self.closed_error()
        self.check(inputs, self.spec.inputs)
        if self._own is None:
            tensors = (*self.spec.inputs, *self.spec.outputs)
            buffers = {tensor.name: self.device.zeros(tensor.dtype, tensor.shape) for tensor in tensors}
            self._own = buffers, self.bind(buffers)
        buffers, work = self._own
        for name, array in inputs.items():
            self.device.write(buffers[name], array)
        work()
        return {tensor.name: self.device.read(buffers[tensor.name]) for tensor in self.spec.outputs}

    def capture(self, body: Work) -> Work:
        """`body`, which this engine has part in, recorded as a CUDA graph; only where it is `capturable`."""
        return self.device.capture(body)

    def check(
        self, actual: Mapping[str, Buffer] | Mapping[str, NDArray[Any]], expected: Sequence[TensorSpec] | None = None
    ) -> None:
        """ValueError unless `actual` are these tensors, by default all that the engine has."""
        if expected is None:
            expected = (*self.spec.inputs, *self.spec.outputs)
        sides = {tensor.name: "input" for tensor in self.spec.inputs}
        for tensor in expected:
            given = actual.get(tensor.name)
            if given is None or given.dtype != np.dtype(tensor.dtype) or given.shape != tensor.shape:
                what = "nothing" if given is None else f"{given.dtype} {list(given.shape)}"
                side = sides.get(tensor.name, "output")
                wanted = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{self.spec.file}: {side} {tensor.name}: found {what}, expected {wanted}")
        names = [tensor.name for tensor in expected]
        if unknown := sorted(set(actual) - set(names)):
            raise ValueError(f"{self.spec.file}: found unknown inputs {unknown}, expected {names}")

    def check_opened(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """InputError unless the opened engine's own tensors, (dtype, shape) by name, are the manifest's."""
        found = {
            name: f"{side} {printable(name)[:100]} {dtype[:100]} {list(shape)}"
            for side, tensors in (("input", inputs), ("output", outputs))
            for name, (dtype, shape) in tensors.items()
        }
        expected = {
            tensor.name: f"{side} {tensor.name} {tensor.dtype} {list(tensor.shape)}"
            for side, tensors in (("input", self.spec.inputs), ("output", self.spec.outputs))
            for tensor in tensors
        }
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                absent = f"no {printable(name)[:100]}"
                raise InputError(
                    f"{self.spec.file}: found {found.get(name, absent)}, expected {expected.get(name, absent)}; the"
                    " engine is not this manifest's, export the bundle again"
                )

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Backend, library version and device, for logs and benchmarks."""

    @abstractmethod
    def close(self) -> None:
        """Free the engine, and its device if that is its own; calling it again does nothing, running it afterwards
        raises RuntimeError."""
        self._own, self._is_closed = None, True
        if self._owns_device:
            self.device.close()

    def failed(self, error: Exception) -> EngineError:
        """What to raise where the library fails in the midst of a run."""
        return EngineError(f"{self.spec.file}: failed while it ran ({one_line(error)}); export the bundle again")

    def closed_error(self) -> RuntimeError:
        """What to raise where a closed engine is asked to run."""
        return RuntimeError(f"{self.spec.file}: found a closed engine, expected an open one; open the bundle again")


class HostEngine(Engine):
    """An engine whose library takes and gives numpy arrays: a class gives `compute` in place of `bind`."""

    @abstractmethod
    def compute(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Outputs by name from inputs by name, both as the manifest says."""

    def bind(self, buffers: Mapping[str, Buffer]) -> Work:
        self.check(buffers)
        arrays = {name: buffer.array for name, buffer in buffers.items() if buffer.array is not None}
        inputs = {tensor.name: arrays[tensor.name] for tensor in self.spec.inputs}

        def work() -> None:
            for name, output in self.compute(inputs).items():
                arrays[name][...] = output

        return work
