"""What every backend does for one component's engine: open, run, describe, close."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from trip_rt.manifest import EngineSpec

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class EngineOptions:
    """How engines are opened: on `device` (`auto` takes a GPU where there is one), with so many CPU `threads` (None: the library's own choice), and
    on a GPU replayed from a captured CUDA graph."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    cuda_graph: bool = False


class Engine(ABC):
    """An opened engine. Inputs are checked against the manifest before the library sees them.

    `backend` is the name under which the manifest lists its engines.
    """

    backend: ClassVar[str]

    def __init__(self, spec: EngineSpec):
        self.spec = spec

    @classmethod
    @abstractmethod
    def probe(cls, spec: EngineSpec, options: EngineOptions) -> Device:
        """The device on which this engine would run here, found without opening it; InputError says why it cannot and what to do."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path, spec: EngineSpec, options: EngineOptions) -> Engine:
        """Load the verified engine file; InputError where the library or this machine cannot."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name from inputs by name; ValueError where a name, dtype or shape is not the manifest's. The arrays are the caller's own."""
        for tensor in self.spec.inputs:
            array = inputs.get(tensor.name)
            if array is None or array.dtype != np.dtype(tensor.dtype) or array.shape != tensor.shape:
                found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
                raise ValueError(f"{self.spec.file}: input {tensor.name}: found {found}, expected {tensor.dtype} {list(tensor.shape)}")
        if len(inputs) != len(self.spec.inputs):
            unknown = sorted(set(inputs) - {tensor.name for tensor in self.spec.inputs})
            raise ValueError(f"{self.spec.file}: found unknown inputs {unknown}, expected {[tensor.name for tensor in self.spec.inputs]}")
        return self._run(inputs)

    @abstractmethod
    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]: ...

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Backend, library version and device, for logs and benchmarks."""

    @abstractmethod
    def close(self) -> None:
        """Free the engine; calling it again does nothing, running it afterwards raises RuntimeError."""

    def _closed(self) -> RuntimeError:
        return RuntimeError(f"{self.spec.file}: found a closed engine, expected an open one; open the bundle again")
