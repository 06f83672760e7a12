"""ONNX Runtime, on the CPU or, with onnxruntime-gpu, on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt.backends.base import Device, Engine, EngineOptions
from trip_rt.errors import InputError
from trip_rt.manifest import EngineSpec

_LONG_CALL = 100  # GFLOP, some tenths of a second on a CPU


class OnnxRuntimeEngine(Engine):
    """One ONNX file in one session, its inputs and outputs bound to buffers of fixed address, as CUDA graphs need."""

    backend = "onnxruntime"

    def __init__(self, spec: EngineSpec, library: Any, session: Any, device: Device):
        super().__init__(spec)
        self._library, self._session, self._device = library, session, device
        self._inputs = {tensor.name: self._buffer(tensor.dtype, tensor.shape) for tensor in spec.inputs}
        self._outputs = {tensor.name: self._buffer(tensor.dtype, tensor.shape) for tensor in spec.outputs}
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    @classmethod
    def probe(cls, spec: EngineSpec, options: EngineOptions) -> Device:
        onnxruntime = _library()
        # The package may know CUDA on a machine that has none; whether a session takes it shows when it opens.
        if options.device != "cpu" and "CUDAExecutionProvider" in onnxruntime.get_available_providers() and _has_gpu(onnxruntime):
            return "cuda"
        if options.device == "cuda":
            found = ", ".join(onnxruntime.get_available_providers())
            raise InputError(
                f"onnxruntime: found the providers {found} and no usable GPU, expected CUDA; install onnxruntime-gpu and a driver for it"
            )
        if spec.precision == "bf16":
            raise InputError("onnxruntime: has no bf16 on a CPU; use openvino or a GPU, or export in another precision")
        return "cpu"

    @classmethod
    def open(cls, path: Path, spec: EngineSpec, options: EngineOptions) -> OnnxRuntimeEngine:
        onnxruntime = _library()
        device = cls.probe(spec, options)
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3  # errors only: warnings are about graphs that the user cannot change
        settings.intra_op_num_threads = options.threads or 0
        # The arena never gives memory back: gigabytes for each large engine, where a call is long enough to ask the system anew.
        settings.enable_cpu_mem_arena = spec.gflop < _LONG_CALL
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda":
            providers = [("CUDAExecutionProvider", {"enable_cuda_graph": "1" if options.cuda_graph else "0"}), *providers]
        try:
            session = onnxruntime.InferenceSession(path, settings, providers=providers)
            if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
                raise InputError(f"{path}: ONNX Runtime could not start CUDA; check the driver and its CUDA and cuDNN libraries, or use the CPU")
            return cls(spec, onnxruntime, session, device)
        except InputError:
            raise
        except Exception as error:  # each failure has its own type, under no common one
            raise InputError(f"{path}: ONNX Runtime cannot open it ({' '.join(str(error).split())[:200]}); export the bundle again") from error

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self._session is None:
            raise self._closed()
        for name, value in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(inputs[name]))
        self._session.run_with_iobinding(self._binding)
        return {name: np.array(value.numpy()) for name, value in self._outputs.items()}  # copied: the buffer is the next call's too

    def describe(self) -> dict[str, Any]:
        return {"backend": self.backend, "version": self._library.__version__, "device": self._device}

    def close(self) -> None:
        self._session = self._binding = None
        self._inputs, self._outputs = {}, {}

    def _buffer(self, dtype: str, shape: tuple[int, ...]) -> Any:
        return self._library.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, self._device, 0)


def _has_gpu(onnxruntime: Any) -> bool:
    try:
        onnxruntime.OrtValue.ortvalue_from_shape_and_type([1], np.float32, "cuda", 0)
    except Exception:  # as above
        return False
    return True


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("onnxruntime: the package is not installed; pip install onnxruntime") from error
    return onnxruntime
