"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from trip_rt.backends.base import Engine
from trip_rt.bundle import EngineSpec
from trip_rt.errors import InputError


class OnnxRuntimeEngine(Engine):
    """One ONNX file in one inference session."""

    def __init__(self, spec: EngineSpec, library: Any, session: Any):
        super().__init__(spec)
        self._library, self._session = library, session

    @classmethod
    def open(cls, path: Path, spec: EngineSpec, threads: int | None) -> OnnxRuntimeEngine:
        onnxruntime = _library()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: warnings are about graphs that the user cannot change
        options.intra_op_num_threads = threads or 0
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # each failure has its own type, under no common one
            raise InputError(f"{path}: ONNX Runtime cannot open it ({' '.join(str(error).split())[:200]}); export the bundle again") from error
        return cls(spec, onnxruntime, session)

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self._session is None:
            raise RuntimeError(f"{self.spec.file}: found a closed engine, expected an open one; open the bundle again")
        names = [tensor.name for tensor in self.spec.outputs]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))

    def describe(self) -> dict[str, Any]:
        return {"backend": "onnxruntime", "version": self._library.__version__, "device": "cpu"}

    def close(self) -> None:
        self._session = None


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("the onnxruntime backend needs the package onnxruntime; pip install onnxruntime") from error
    return onnxruntime
