"""OpenVINO on the CPU. It runs the same ONNX files as ONNX Runtime."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from trip_rt.backends.base import Engine, EngineOptions, Tensor
from trip_rt.devices import Buffer, Device, Kind, Work, open_device
from trip_rt.errors import InputError, one_line
from trip_rt.manifest import EngineSpec
from trip_rt.onnx_file import check_onnx_file
from trip_rt.process_memory import Mapped, give_back_mapping, mapping_of
from trip_rt.signals import import_library

_GIVEN_BACK_EVERY = 0.05  # seconds
_DTYPES = {"f32": "float32", "f16": "float16", "i32": "int32", "i64": "int64"}


class OpenVINOEngine(Engine):
    """One ONNX file compiled for this CPU."""

    backend = "openvino"

    def __init__(self, spec: EngineSpec, library: Any, compiled: Any, arithmetic: str, device: Device):
        super().__init__(spec, device)
        self._library, self._compiled, self._arithmetic = library, compiled, arithmetic

    @classmethod
    def probe(cls, spec: EngineSpec, options: EngineOptions) -> Kind:
        if options.device == "cuda":
            raise InputError("openvino: runs on a CPU, found that cuda was asked for; use tensorrt or onnxruntime")
        library()
        return "cpu"

    @classmethod
    def lowers(cls) -> bool:
        return "BF16" in _capabilities()

    @classmethod
    def open(cls, path: Path, spec: EngineSpec, options: EngineOptions, device: Device | None = None) -> OpenVINOEngine:
        cls.probe(spec, options)
        check_onnx_file(path, spec.files[1:])
        try:
            settings = _settings(spec.precision, options.threads)
            core = library().Core()  # it starts nothing yet
            model = core.read_model(path)
            weights = _mapped(model, [path.with_name(name) for name in spec.files[1:]])
            with _own_thread() as thread:
                compiling = thread.submit(core.compile_model, model, "CPU", settings)
                # It lays weights out anew: the memory of what it has read is given back, meanwhile and at its end. The
                # model keeps the mappings alive.
                done = False
                while not done:
                    done = not wait([compiling], _GIVEN_BACK_EVERY).not_done
                    for mapping in weights:
                        give_back_mapping(mapping)
            compiled, arithmetic = compiling.result(), settings["INFERENCE_PRECISION_HINT"]
            engine = cls(spec, library(), compiled, arithmetic, device or open_device("cpu"))
            engine.check_opened(_tensors(compiled.inputs), _tensors(compiled.outputs))
            return engine
        except InputError:
            raise
        except Exception as error:  # RuntimeError, mostly; UnicodeDecodeError where a name is no text
            raise InputError(f"{path}: OpenVINO cannot open it ({one_line(error)}); export the bundle again") from error

    def bind(self, buffers: Mapping[str, Buffer]) -> Work:
        self.check(buffers)
        request = self._opened().create_infer_request()
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            request.set_tensor(tensor.name, self._library.Tensor(buffers[tensor.name].array, shared_memory=True))

        def work() -> None:
            assert buffers  # and so the memory lives as long as this
            self._opened()
            try:
                request.infer()
            except RuntimeError as error:
                raise self.failed(error) from error

        return work

    def _opened(self) -> Any:
        if self._compiled is None:
            raise self.closed_error()
        return self._compiled

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "version": self._library.__version__.split("-")[0],
            "device": "cpu",
            "arithmetic": self._arithmetic,
        }

    def close(self) -> None:
        self._compiled = None
        super().close()


def _tensors(ports: Any) -> dict[str, Tensor]:
    """A compiled model's inputs or outputs."""
    return {
        port.any_name: (
            _DTYPES.get(port.element_type.get_type_name(), port.element_type.get_type_name()),
            tuple(dim.get_length() if dim.is_static else str(dim) for dim in port.partial_shape)
            if port.partial_shape.rank.is_static
            else ("any",),
        )
        for port in ports
    }


def _mapped(model: Any, files: Sequence[Path]) -> list[Mapped]:
    """Where the model has its files of weights in memory, as long as it lives."""
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    largest = max(constants, key=lambda constant: constant.get_byte_size(), default=None)
    if largest is None:
        return []
    address = largest.data.__array_interface__["data"][0]
    return [mapping for file in files if (mapping := mapping_of(file, address))]


def _own_thread() -> ThreadPoolExecutor:
    """For what starts OpenVINO's CPU plugin: it gives the thread that does a signal stack and frees that in whichever
    thread ends it. Were it the main thread's, Ctrl-C could crash afterwards; nothing is ever signalled to this one."""
    return ThreadPoolExecutor(1)


@functools.cache
def _capabilities() -> frozenset[str]:
    """What this CPU computes in."""
    openvino = library()

    def ask() -> frozenset[str]:
        return frozenset(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))

    with _own_thread() as thread:
        return thread.submit(ask).result()


def _settings(precision: str, threads: int | None) -> dict[str, Any]:
    """Of a compiled model. It computes in half precision where the CPU has instructions for it, else in fp32 on
    half-precision weights."""
    wanted = {"fp16": "f16", "bf16": "bf16"}.get(precision, "f32")  # int8 is the graph's own to say
    arithmetic = wanted if precision.upper() in _capabilities() else "f32"
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": arithmetic, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    return settings


def library() -> Any:
    """The package, which sends nothing to its maker: it does at every import, from a process of its own, where it finds
    the module for that."""
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # no such module: a stub is taken
    try:
        return import_library("openvino")
    except ImportError as error:
        raise InputError("openvino: the package is not installed; pip install openvino") from error
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]
