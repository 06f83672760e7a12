"""ONNX Runtime, on the CPU or, with onnxruntime-gpu, on an NVIDIA GPU."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from trip_rt.backends.base import Engine, EngineOptions, Tensor
from trip_rt.devices import Buffer, Device, Kind, Work, open_device
from trip_rt.errors import InputError, one_line
from trip_rt.manifest import EngineSpec
from trip_rt.onnx_file import check_onnx_file
from trip_rt.signals import import_library

PACKAGES = ("onnxruntime", "onnxruntime-gpu")
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}
_LONG_CALL = 100  # GFLOP, some tenths of a second on a CPU


class OnnxRuntimeEngine(Engine):
    """One ONNX file in one session, bound to its device's buffers by their addresses."""

    backend = "onnxruntime"

    def __init__(self, spec: EngineSpec, library: Any, session: Any, device: Device, owns_device: bool):
        super().__init__(spec, device, owns_device)
        self._library, self._session = library, session
        self._settings = library.RunOptions()
        if device.kind == "cuda":
            # It only queues: whoever reads the outputs waits for the stream.
            self._settings.add_run_config_entry("disable_synchronize_execution_providers", "1")

    @classmethod
    def probe(cls, spec: EngineSpec, options: EngineOptions) -> Kind:
        onnxruntime = library()
        _refuse_both()
        # The package may know CUDA on a machine that has none; whether a session takes it shows when it opens.
        if (
            options.device != "cpu"
            and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
            and _has_gpu(onnxruntime)
        ):
            return "cuda"
        if options.device == "cuda":
            found = ", ".join(onnxruntime.get_available_providers())
            raise InputError(
                f"onnxruntime: found the providers {found} and no usable GPU, expected CUDA; install onnxruntime-gpu"
                " and a driver for it"
            )
        if spec.precision == "bf16":
            raise InputError("onnxruntime: has no bf16 on a CPU; use openvino or a GPU, or export in another precision")
        return "cpu"

    @classmethod
    def open(
        cls, path: Path, spec: EngineSpec, options: EngineOptions, device: Device | None = None
    ) -> OnnxRuntimeEngine:
        onnxruntime = library()
        kind = cls.probe(spec, options)
        check_onnx_file(path, spec.files[1:])
        owns_device, device = device is None, device or open_device(kind)
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3  # errors only: warnings are about graphs that the user cannot change
        settings.intra_op_num_threads = options.threads or 0
        # The arena never gives memory back: gigabytes for each large engine, where a call is long enough to ask the
        # system anew.
        settings.enable_cpu_mem_arena = spec.gflop < _LONG_CALL
        # Else its threads go on spinning after a call, on the cores that the next engine's call needs: 97 ms a step of
        # the demo's in place of 72.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.kind == "cuda":
            providers = [
                # TF32 is on by default, and fp32 means fp32.
                ("CUDAExecutionProvider", {"user_compute_stream": str(device.stream), "use_tf32": "0"}),
                *providers,
            ]
        try:
            session = onnxruntime.InferenceSession(path, settings, providers=providers)
            if device.kind == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
                raise InputError(
                    f"{path}: ONNX Runtime could not start CUDA; check the driver and its CUDA and cuDNN libraries, or"
                    " use the CPU"
                )
            engine = cls(spec, onnxruntime, session, device, owns_device)
            engine.check_opened(_tensors(session.get_inputs()), _tensors(session.get_outputs()))
            return engine
        except InputError:
            raise
        except Exception as error:  # each failure has its own type, under no common one
            raise InputError(
                f"{path}: ONNX Runtime cannot open it ({one_line(error)}); export the bundle again"
            ) from error

    def bind(self, buffers: Mapping[str, Buffer]) -> Work:
        self.check(buffers)
        binding = self._opened().io_binding()
        for tensors, bind in (self.spec.inputs, binding.bind_input), (self.spec.outputs, binding.bind_output):
            for tensor in tensors:
                buffer = buffers[tensor.name]
                bind(tensor.name, self.device.kind, 0, buffer.dtype.type, list(buffer.shape), buffer.address)

        def work() -> None:
            assert buffers  # and so the memory lives as long as this
            session = self._opened()
            try:
                session.run_with_iobinding(binding, self._settings)
            except Exception as error:  # as in open
                raise self.failed(error) from error

        return work

    def _opened(self) -> Any:
        if self._session is None:
            raise self.closed_error()
        return self._session

    def describe(self) -> dict[str, Any]:
        return {"backend": self.backend, "version": self._library.__version__, "device": self.device.kind}

    def close(self) -> None:
        self._session = None
        super().close()


def _tensors(arguments: Any) -> dict[str, Tensor]:
    """A session's inputs or outputs; their types are such as "tensor(float16)"."""
    return {argument.name: (_DTYPES.get(argument.type, argument.type), tuple(argument.shape)) for argument in arguments}


@cache
def _has_gpu(onnxruntime: Any) -> bool:
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's and cuDNN's libraries out of their packages, where no torch has loaded them
    try:
        onnxruntime.OrtValue.ortvalue_from_shape_and_type([1], np.float32, "cuda", 0)
    except Exception:  # as above
        return False
    return True


def _refuse_both() -> None:
    """The packages for CPUs and for GPUs hold files of the same names: the later one overwrites part of the other."""
    installed = [name for name in PACKAGES if _is_installed(name)]
    if len(installed) > 1:
        names = " ".join(installed)
        raise InputError(
            f"onnxruntime: found {' and '.join(installed)} installed together, expected one of them, as each overwrites"
            f" the other's files; pip uninstall {names}, then pip install trip-rt[onnxruntime] or trip-rt[gpu]"
        )


@cache
def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def library() -> Any:
    """The package, which sends nothing to its maker unless the environment says so."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read as it is imported
    try:
        return import_library("onnxruntime")
    except ImportError as error:
        raise InputError(
            "onnxruntime: the package is not installed; pip install trip-rt[onnxruntime], or trip-rt[gpu] for a GPU"
        ) from error
