"""OpenVINO on the CPU. It runs the same ONNX files as ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt.backends.base import Device, Engine, EngineOptions
from trip_rt.errors import InputError
from trip_rt.manifest import EngineSpec


class OpenVINOEngine(Engine):
    """One ONNX file compiled for this CPU."""

    backend = "openvino"

    def __init__(self, spec: EngineSpec, library: Any, compiled: Any, arithmetic: str):
        super().__init__(spec)
        self._library, self._compiled, self._arithmetic = library, compiled, arithmetic
        self._request = compiled.create_infer_request()

    @classmethod
    def probe(cls, spec: EngineSpec, options: EngineOptions) -> Device:
        if options.device == "cuda":
            raise InputError("openvino: runs on a CPU, found that cuda was asked for; use tensorrt or onnxruntime")
        _library()
        return "cpu"

    @classmethod
    def open(cls, path: Path, spec: EngineSpec, options: EngineOptions) -> OpenVINOEngine:
        cls.probe(spec, options)
        try:
            # OpenVINO's CPU plugin gives the thread that starts it a signal stack and frees that in whichever thread ends it; were it the main
            # thread's, Ctrl-C could crash afterwards. So a thread starts it that nothing is ever signalled to.
            with ThreadPoolExecutor(1) as thread:
                compiled, arithmetic = thread.submit(_compile, path, spec.precision, options.threads).result()
            return cls(spec, _library(), compiled, arithmetic)
        except RuntimeError as error:
            raise InputError(f"{path}: OpenVINO cannot open it ({' '.join(str(error).split())[:200]}); export the bundle again") from error

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self._request is None:
            raise self._closed()
        self._request.infer({name: np.ascontiguousarray(array) for name, array in inputs.items()})
        return {tensor.name: self._request.get_tensor(tensor.name).data.copy() for tensor in self.spec.outputs}

    def describe(self) -> dict[str, Any]:
        return {"backend": self.backend, "version": self._library.__version__.split("-")[0], "device": "cpu", "arithmetic": self._arithmetic}

    def close(self) -> None:
        self._compiled = self._request = None


def _compile(path: Path, precision: str, threads: int | None) -> tuple[Any, str]:
    """The compiled model, and what it computes in: half precision where the CPU has instructions for it, else fp32 on half-precision weights."""
    core = _library().Core()
    wanted = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[precision]
    arithmetic = wanted if precision.upper() in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": arithmetic, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    return core.compile_model(core.read_model(path), "CPU", settings), arithmetic


def _library() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise InputError("openvino: the package is not installed; pip install openvino") from error
    return openvino
