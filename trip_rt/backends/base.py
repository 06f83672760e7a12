"""What every backend does for one component's engine: open, run, describe, close."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt.bundle import EngineSpec


class Engine(ABC):
    """An opened engine. Inputs are checked against the manifest before the library sees them."""

    def __init__(self, spec: EngineSpec):
        self.spec = spec

    @classmethod
    @abstractmethod
    def open(cls, path: Path, spec: EngineSpec, threads: int | None) -> Engine:
        """Load the verified engine file; `threads` None means the library's own choice."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name from inputs by name; ValueError where a name, dtype or shape is not the manifest's."""
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
        """Free the engine; calling it again does nothing."""
