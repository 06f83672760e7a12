"""TensorRT on an NVIDIA GPU: the full package or its lean runtime executes the plan, cuda-bindings hold its memory.

What TensorRT for RTX does differently is in `tensorrt_rtx`.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from trip_rt.backends.base import Engine, EngineOptions, Tensor
from trip_rt.devices import Buffer, Device, Kind, Work, open_device
from trip_rt.devices.cuda import call, gpu, memory_error
from trip_rt.errors import EngineError, InputError, one_line
from trip_rt.manifest import EngineSpec
from trip_rt.signals import import_library

ADDRESS_MULTIPLE = 256  # bytes: what TensorRT asks of every tensor's address
LEAN = "tensorrt_lean_bindings"
PLATFORM = f"{platform.system()}-{platform.machine()}".lower()  # such as linux-x86_64
OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|MEM_ALLOC_FAILED", re.IGNORECASE)
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Machine:
    """What a plan's target is held against: the library's module and version, the GPU with its compute capability
    ("9.0"), and the platform."""

    library: str
    version: str
    gpu: str
    compute_capability: str
    platform: str = PLATFORM


class TensorRTEngine(Engine):
    """One plan in one execution context, on the device's stream."""

    backend: ClassVar[str] = "tensorrt"
    modules: ClassVar[tuple[str, ...]] = ("tensorrt", LEAN)
    capturable = True

    def __init__(self, spec: EngineSpec, trt: Any, machine: Machine, device: Device, owns_device: bool):
        super().__init__(spec, device, owns_device)
        self._trt, self._machine, self._logger = trt, machine, _logger(trt)
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None

    @classmethod
    def probe(cls, spec: EngineSpec, options: EngineOptions) -> Kind:
        if options.device == "cpu":
            raise InputError(
                f"{cls.backend}: found that the CPU was asked for, expected a GPU; use onnxruntime or openvino, or"
                " leave the device out"
            )
        check_target(spec.file, spec.target, this_machine(cls._library()))
        return "cuda"

    @classmethod
    def open(cls, path: Path, spec: EngineSpec, options: EngineOptions, device: Device | None = None) -> TensorRTEngine:
        # Before all else: a Runtime made without a usable driver crashes the process when it is freed.
        cls.probe(spec, options)
        trt = cls._library()
        opened = cls(spec, trt, this_machine(trt), device or open_device("cuda"), owns_device=device is None)
        try:
            opened._load(path)
        except BaseException:
            opened.close()
            raise
        return opened

    @classmethod
    def _library(cls) -> Any:
        """The first of `modules` that can be imported."""
        reasons = []
        for name in cls.modules:
            try:
                return import_library(name)
            except (ImportError, OSError) as error:  # OSError: the package is there, its native library is not
                reasons.append(one_line(error, 100))
        raise InputError(
            f"{cls.backend}: found no usable package ({'; '.join(reasons)}), expected {' or '.join(cls.modules)}; pip"
            f" install trip-rt[{cls.modules[0].removeprefix('tensorrt_')}]"
        )

    def _load(self, path: Path) -> None:
        self._logger.take()
        self._runtime = self._trt.Runtime(self._logger)
        # Code inside a plan stays forbidden, as is the runtime's default: version-compatible plans are built without
        # it.
        plan = path.read_bytes()
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._failed("cannot open the plan")
        self._check_tensors()
        self._context = self._new_context(plan)
        if self._context is None:
            raise self._failed("has no execution context for the plan")

    def _new_context(self, plan: bytes) -> Any:
        """An execution context of the opened engine, or None where the library has none."""
        return self._engine.create_execution_context()

    def _check_tensors(self) -> None:
        trt, engine = self._trt, self._engine
        tensors: dict[Any, dict[str, Tensor]] = {trt.TensorIOMode.INPUT: {}, trt.TensorIOMode.OUTPUT: {}}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dtype = engine.get_tensor_dtype(name).name
            on_device = engine.get_tensor_location(name) == trt.TensorLocation.DEVICE
            shown = _DTYPES.get(dtype, dtype) + ("" if on_device else " in host memory")
            tensors[engine.get_tensor_mode(name)][name] = shown, tuple(engine.get_tensor_shape(name))
        self.check_opened(tensors[trt.TensorIOMode.INPUT], tensors[trt.TensorIOMode.OUTPUT])

    def bind(self, buffers: Mapping[str, Buffer]) -> Work:
        self.check(buffers)
        # A slice of a buffer may lie at any address: one that TensorRT would refuse gets a copy at one that it takes.
        aligned = {
            name: self.device.zeros(buffer.dtype.name, buffer.shape) if buffer.address % ADDRESS_MULTIPLE else buffer
            for name, buffer in buffers.items()
        }
        copied = {name for name, buffer in buffers.items() if aligned[name] is not buffer}
        copied_in = [tensor.name for tensor in self.spec.inputs if tensor.name in copied]
        copied_out = [tensor.name for tensor in self.spec.outputs if tensor.name in copied]
        self._set_addresses(aligned)

        def work() -> None:
            self._set_addresses(aligned)  # another binding may have been at work
            for name in copied_in:
                self.device.copy(buffers[name], aligned[name])
            if not self._context.execute_async_v3(self.device.stream):
                raise self._failed("cannot run the plan", EngineError)
            for name in copied_out:
                self.device.copy(aligned[name], buffers[name])

        return work

    def _set_addresses(self, buffers: Mapping[str, Buffer]) -> None:
        if self._context is None:
            raise self.closed_error()
        for name, buffer in buffers.items():
            if not self._context.set_tensor_address(name, buffer.address):
                raise self._failed(f"takes no address for {name}")

    def _failed(self, what: str, kind: type[Exception] = InputError) -> Exception:
        reason = self._logger.take() or "it gave no reason"
        if OUT_OF_MEMORY.search(reason):
            return memory_error(f"TensorRT {what}")
        return kind(f"{self.spec.file}: TensorRT {what} ({reason}); export the bundle again on this machine")

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "version": self._machine.version,
            "library": self._machine.library,
            "device": "cuda",
            "gpu": self._machine.gpu,
            "compute_capability": self._machine.compute_capability,
        }

    def close(self) -> None:
        self._context = self._engine = self._runtime = None  # in this order: each lives in the next
        super().close()


def check_target(file: str, target: Mapping[str, str], machine: Machine) -> None:
    """InputError unless a plan of this `target` (manifest.EngineSpec) opens on this machine.

    A plan is tied to the library's version, to the compute capabilities it was built for and to the platform of its
    build. One of TensorRT's that was built version-compatible opens with later versions of the same major too; with
    hardware compatibility "ampere_plus", on every GPU from compute capability 8.0 on.
    """
    if missing := [name for name in ("library", "version", "compute_capabilities", "platform") if name not in target]:
        raise InputError(
            f"{file}: found no {', '.join(missing)} in its target, expected what it was built with; export the bundle"
            " again"
        )
    if machine.platform != target["platform"]:
        raise InputError(
            f"{file}: found {machine.platform}, expected {target['platform']}; export the bundle again on this machine"
        )
    library, compatible = target["library"], target.get("version_compatible") == "yes"
    if machine.library != library and not (machine.library == LEAN and library == "tensorrt"):
        raise InputError(
            f"{file}: found {machine.library}, expected {library}, which built it; export the bundle again for this one"
        )
    built, present = version_numbers(target["version"]), version_numbers(machine.version)
    if not (built[:1] == present[:1] and present >= built if compatible else present == built):
        later = f" or a later {target['version'].partition('.')[0]}.x" if compatible else " exactly"
        raise InputError(
            f"{file}: found {machine.library} {machine.version}, expected {target['version']}{later}; install that, or"
            " export the bundle again with this one"
        )
    if machine.library == LEAN and not compatible:
        raise InputError(
            f"{file}: found TensorRT's lean runtime, expected the full one, as the plan is not version-compatible; pip"
            f" install tensorrt=={target['version']}, or export the bundle as version-compatible"
        )
    actual, wanted = machine.compute_capability, target["compute_capabilities"].split()
    if target.get("hardware_compatibility") == "ampere_plus":
        fits, wanted = version_numbers(actual) >= (8, 0), ["8.0 or above"]
    else:  # "same_compute_capability" frees a plan from the GPU's model, not from this
        fits = actual in wanted
    if not fits:
        raise InputError(
            f"{file}: found compute capability {actual} ({machine.gpu}), expected {', '.join(wanted)}; export the"
            " bundle again for this GPU"
        )


def this_machine(trt: Any) -> Machine:
    """This machine with that TensorRT package; InputError without a GPU and driver that it can use."""
    machine = Machine(trt.__name__, trt.__version__, *gpu())
    # 13000 for CUDA 13.0; cuda-bindings may be content with less than TensorRT is.
    driver = call("cudaDriverGetVersion")
    if machine.library in TensorRTEngine.modules and version_numbers(machine.version) >= (11,) and driver < 13000:
        found = f"{driver // 1000}.{driver % 1000 // 10}"
        raise InputError(
            f"tensorrt: found a driver for CUDA {found}, expected 13.0 for TensorRT {machine.version}; install driver"
            " 580 or newer"
        )
    return machine


@cache  # one for the process: TensorRT keeps the first it is given and ignores the rest
def _logger(trt: Any) -> Any:
    """A TensorRT logger that prints nothing; `take()` is what went wrong since the last call, in one line, and "" where
    nothing did."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors = [*self.errors[-3:], one_line(msg, 300)]

        def take(self) -> str:
            errors, self.errors = self.errors, []
            return "; ".join(errors)[:300]

    return Logger()


def version_numbers(version: str) -> tuple[int, ...]:
    """(11, 4, 0, 106) from "11.4.0.106": at most four, for comparison."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:4])
