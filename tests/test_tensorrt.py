"""TensorRT without a GPU or a builder: TensorRT's own enums and run-time classes, Polygraphy's and cuda-bindings' own signatures, and our logic.

That a plan builds, opens and runs takes a GPU and is not shown here. Where our logic needs something to call, that is a recording stand-in, named so.
"""

from __future__ import annotations

import ast
import ctypes
import inspect
import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from trip_engines import tensorrt_build as build
from trip_engines.tensorrt_build import BuildOptions, build_engine, check_precisions, explain, layer_precisions
from trip_engines.tensorrt_operators import contraction_precisions, unsupported
from trip_rt.backends import EngineOptions
from trip_rt.backends import tensorrt as backend
from trip_rt.backends.tensorrt import Machine, TensorRTEngine, check_target
from trip_rt.errors import EngineError, InputError
from trip_rt.manifest import EngineSpec, TensorSpec

API: dict[str, list[str]] = json.loads((Path(__file__).parent / "data" / "tensorrt-python-api.json").read_text())["names"]
# What variables and attributes of these names hold in both modules.
OBJECTS = {"runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext", "inspector": "EngineInspector"}
BY_POLYGRAPHY = {"BuilderFlag", "NetworkDefinitionCreationFlag"}  # set by Polygraphy as we ask it to
TARGET = {"tensorrt": "11.4.0.106", "compute_capability": "9.0", "platform": backend.PLATFORM}
HERE = Machine("11.4.0.106", False, "a GPU", "9.0")
X, T, Y = TensorSpec("x", "float32", (2, 3)), TensorSpec("t", "int64", (1,)), TensorSpec("y", "float32", (2, 3))
SPEC = EngineSpec(files=("unet-0.plan",), key="0" * 16, precision="fp16", policy={}, gflop=1.0, target=TARGET, inputs=(X, T), outputs=(Y,))
FP16, BF16, FP32 = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT


# The API, name by name


def _dotted(node: ast.AST) -> tuple[str, ...]:
    """("self", "_trt", "Runtime") of such an expression; a call in it counts as the function called."""
    if isinstance(node, ast.Attribute):
        return (*_dotted(node.value), node.attr)
    if isinstance(node, ast.Call):
        return _dotted(node.func)
    return (node.id,) if isinstance(node, ast.Name) else ("",)


def _accesses(module: Any) -> set[tuple[str, ...]]:
    return {_dotted(node) for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Attribute)}


def _tensorrt_names(module: Any) -> dict[str, set[str]]:
    """By class, the members of TensorRT's that a module's source speaks of."""
    found: dict[str, set[str]] = {}
    for names in _accesses(module):
        for index, holder in enumerate(names[:-1]):
            owner, members = OBJECTS.get(holder.lstrip("_"), ""), names[index + 1 :]
            if holder.lstrip("_") == "trt" and not members[0].startswith("__"):
                owner, members = members[0], members[1:]
            if owner:
                found.setdefault(owner, set())
            for member in members if owner else ():
                if member in API:  # a class inside a class, such as Severity
                    owner = member
                    found.setdefault(owner, set())
                else:
                    found[owner].add(member)
                    break
    return found


def test_every_tensorrt_name_in_the_source_is_in_the_documented_api() -> None:
    used = _tensorrt_names(backend)
    for owner, members in _tensorrt_names(build).items():
        used.setdefault(owner, set()).update(members)
    used["IProgressMonitor"] |= {name for name in vars(build._Progress) if not name.startswith("_")}
    used["HardwareCompatibilityLevel"] |= {level.upper() for level in get_args(get_type_hints(BuildOptions)["hardware_compatibility"])}
    assert {owner: set(members) for owner, members in API.items() if owner not in BY_POLYGRAPHY} == used


def test_every_tensorrt_name_of_the_run_time_is_in_the_real_package() -> None:
    lean = pytest.importorskip("tensorrt_lean_bindings")
    for owner, members in _tensorrt_names(backend).items():
        # Severity is inside ILogger; attributes of instances are properties of their class
        holder = lean.ILogger.Severity if owner == "Severity" else getattr(lean, owner)
        assert members <= set(dir(holder)), owner
    for owner, names in API.items():  # enums that the build speaks of are in the run-time package too
        if hasattr(getattr(lean, owner, None), "__members__"):
            assert set(names) <= set(getattr(lean, owner).__members__), owner
    assert not hasattr(lean.BuilderFlag, "FP16")  # as the release notes of 11.0 say
    assert set(backend._DTYPES) <= set(lean.DataType.__members__)


def test_every_cuda_function_exists_and_takes_what_it_is_given() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    calls = 0
    for node in ast.walk(ast.parse(inspect.getsource(backend))):
        if not isinstance(node, ast.Call):
            continue
        function, arguments = _dotted(node.func), node.args
        if function == ("_call",) and isinstance(node.args[0], ast.Constant):
            function, arguments = ("cuda", node.args[0].value), node.args[1:]
        if function[0] in ("cuda", "_cuda") and len(function) == 2:
            inspect.signature(getattr(runtime, function[1])).bind(*arguments)
            calls += 1
    assert calls >= 18
    roots = {"cuda": runtime, "_cuda": runtime, "kinds": runtime.cudaMemcpyKind}
    for root, *names in _accesses(backend):
        value = roots.get(root)
        for name in names if value is not None else ():
            assert hasattr(value, name), (root, *names)
            value = getattr(value, name)
    assert {"name", "major", "minor"} <= set(dir(runtime.cudaDeviceProp))


# Opening


def _usable_gpu() -> bool:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    error, count = runtime.cudaGetDeviceCount()
    return error == runtime.cudaError_t.cudaSuccess and count > 0


def test_without_a_driver_probing_and_opening_say_so(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_lean_bindings")
    if _usable_gpu():
        pytest.skip("found a GPU")
    message = r"^tensorrt: found no usable GPU \(.+\), expected an NVIDIA GPU; .*driver[^\n]*$"
    with pytest.raises(InputError, match=message):
        TensorRTEngine.probe(SPEC, EngineOptions())
    with pytest.raises(InputError, match=message):
        TensorRTEngine.open(tmp_path / "never-read.plan", SPEC, EngineOptions(device="cuda", cuda_graph=True))
    with pytest.raises(InputError, match="GPU"):
        backend.gpu()


def test_on_a_cpu_it_does_not_run() -> None:
    with pytest.raises(InputError, match="the CPU was asked for, expected a GPU; use onnxruntime or openvino"):
        TensorRTEngine.probe(SPEC, EngineOptions(device="cpu"))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_lean_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"found no usable package .* pip install trip-rt\[tensorrt\]"):
        TensorRTEngine.probe(SPEC, EngineOptions())
    with pytest.raises(InputError, match=r"found no builder, .*pip install tensorrt$"):
        build._builder()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(InputError, match=r"found no cuda-bindings, .*pip install trip-rt\[tensorrt\]"):
        backend.gpu()
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt", None)
    with pytest.raises(InputError, match=r"found no Polygraphy, .*pip install polygraphy"):
        build._polygraphy()


@pytest.mark.parametrize(("version", "driver", "fits"), [("11.4.0.106", 12080, False), ("11.4.0.106", 13000, True), ("10.16.1.11", 12080, True)])
def test_tensorrt_11_wants_a_driver_for_cuda_13(monkeypatch: pytest.MonkeyPatch, version: str, driver: int, fits: bool) -> None:
    monkeypatch.setattr(backend, "gpu", lambda: ("a GPU", "9.0"))
    monkeypatch.setattr(backend, "_call", {"cudaDriverGetVersion": driver}.__getitem__)
    trt = SimpleNamespace(__name__="tensorrt_lean_bindings", __version__=version)
    if fits:
        assert backend.this_machine(trt) == Machine(version, True, "a GPU", "9.0")
    else:
        with pytest.raises(InputError, match=r"found a driver for CUDA 12.8, expected 13.0 for TensorRT 11.4.0.106; install driver 580 or newer"):
            backend.this_machine(trt)


COMPATIBLE = {"version_compatible": "yes"}


@pytest.mark.parametrize(
    ("target", "machine", "problem"),
    [
        ({}, {}, None),
        ({}, {"tensorrt": "11.4.0.107"}, "TensorRT 11.4.0.107, expected 11.4.0.106 exactly"),
        ({"version_compatible": "no"}, {"tensorrt": "11.5.0.1"}, "expected 11.4.0.106 exactly"),
        (COMPATIBLE, {"tensorrt": "11.5.0.1"}, None),
        (COMPATIBLE, {"tensorrt": "11.10.0.1"}, None),
        (COMPATIBLE, {"tensorrt": "11.3.9.9"}, "TensorRT 11.3.9.9, expected 11.4.0.106 or a later 11.x"),
        (COMPATIBLE, {"tensorrt": "12.0.0.1"}, "or a later 11.x"),
        (COMPATIBLE, {"tensorrt": "10.16.1.11"}, "or a later 11.x"),
        (COMPATIBLE | {"tensorrt": "from hell"}, {}, "expected from hell"),
        ({}, {"lean": True}, "lean runtime, expected the full one"),
        (COMPATIBLE, {"lean": True, "tensorrt": "11.5.0.1"}, None),
        ({}, {"compute_capability": "8.9"}, "compute capability 8.9 .a GPU., expected 9.0"),
        ({}, {"compute_capability": "10.0"}, "expected 9.0"),
        ({"hardware_compatibility": "none"}, {"compute_capability": "8.9"}, "expected 9.0"),
        ({"hardware_compatibility": "same_compute_capability"}, {}, None),
        ({"hardware_compatibility": "same_compute_capability"}, {"compute_capability": "12.0"}, "expected 9.0"),
        ({"hardware_compatibility": "ampere_plus"}, {"compute_capability": "8.0"}, None),
        ({"hardware_compatibility": "ampere_plus"}, {"compute_capability": "12.0"}, None),
        ({"hardware_compatibility": "ampere_plus"}, {"compute_capability": "7.5"}, "expected 8.0 or above"),
        ({"platform": "plan9-mips"}, {}, "expected plan9-mips"),
    ],
)
def test_a_plan_opens_only_on_a_machine_of_its_target(target: dict[str, str], machine: dict[str, Any], problem: str | None) -> None:
    found = Machine(**(vars(HERE) | machine))
    if problem is None:
        check_target("unet.plan", TARGET | target, found)
    else:
        with pytest.raises(InputError, match=rf"^unet.plan: found [^\n]*{problem}[^\n]*; [^\n]+$"):
            check_target("unet.plan", TARGET | target, found)


@pytest.mark.parametrize("name", TARGET)
def test_a_target_that_says_too_little_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"found no {name} in its target"):
        check_target("unet.plan", {key: value for key, value in TARGET.items() if key != name}, HERE)


def test_the_logger_keeps_errors_to_quote_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    lean = pytest.importorskip("tensorrt_lean_bindings")
    logger = backend._logger(lean)
    assert backend._logger(lean) is logger
    severity = lean.ILogger.Severity
    for level, text in (
        (severity.ERROR, "the root\nof it"),
        (severity.WARNING, "spam"),
        (severity.INTERNAL_ERROR, "and then"),
        (severity.INFO, "spam"),
    ):
        logger.log(level, text)
    assert logger.take() == "the root of it; and then"
    assert logger.take() == ""
    assert capfd.readouterr() == ("", "")


class RecordingCuda:
    """A recording stand-in for cuda.bindings.runtime: memory is the host's, functions only note that they were called; enums are the real ones."""

    def __init__(self, runtime: Any):
        self.real, self.calls, self.failing = runtime, [], {}
        self.memory: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda") or inspect.isclass(getattr(self.real, name)) or name in ("cudaStreamNonBlocking", "cudaGetErrorString"):
            return getattr(self.real, name)

        def function(*arguments: Any) -> tuple[Any, ...]:
            inspect.signature(getattr(self.real, name)).bind(*arguments)
            self.calls.append(name)
            if name in self.failing:
                return (self.failing[name], None)
            return (self.real.cudaError_t.cudaSuccess, getattr(self, f"_{name}", lambda *_: len(self.calls))(*arguments))

        return function

    def _cudaMalloc(self, size: int) -> int:
        block = ctypes.create_string_buffer(b"\xff" * size, size)
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    _cudaMallocHost = _cudaMalloc

    def _cudaMemcpyAsync(self, to: int, origin: int, size: int, kind: Any, stream: Any) -> None:
        ctypes.memmove(to, origin, size)

    def _cudaFree(self, address: int) -> None:
        del self.memory[address]

    _cudaFreeHost = _cudaFree


class RecordingRuntime:
    """A recording stand-in for TensorRT's Runtime, engine and execution context in one: y = x + t, on the stand-in's memory."""

    def __init__(self, lean: Any, logger: Any):
        self.lean, self.logger = lean, logger
        self.tensors = {"x": ("FLOAT", (2, 3)), "t": ("INT64", (1,)), "y": ("FLOAT", (2, 3))}
        self.outputs, self.addresses, self.runs, self.opens = {"y"}, {}, 0, True
        self.num_io_tensors = 3

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        if not self.opens:
            self.logger.log(self.lean.ILogger.Severity.ERROR, "Error Code 1: Serialization (Version tag does not match.)")
        return self if self.opens else None

    def create_execution_context(self) -> Any:
        return self

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.lean.DataType, self.tensors[name][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1]

    def get_tensor_mode(self, name: str) -> Any:
        return self.lean.TensorIOMode.OUTPUT if name in self.outputs else self.lean.TensorIOMode.INPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.lean.TensorLocation.DEVICE

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.runs += 1
        x, y = (np.ctypeslib.as_array((ctypes.c_float * 6).from_address(self.addresses[name])) for name in ("x", "y"))
        y[:] = x + (ctypes.c_int64 * 1).from_address(self.addresses["t"])[0]
        return True


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> tuple[RecordingCuda, RecordingRuntime]:
    lean = pytest.importorskip("tensorrt_lean_bindings")
    cuda = RecordingCuda(pytest.importorskip("cuda.bindings.runtime"))
    runtime = RecordingRuntime(lean, backend._logger(lean))
    trt = SimpleNamespace(
        **{name: getattr(lean, name) for name in ("TensorIOMode", "TensorLocation", "ILogger", "__name__")}, Runtime=lambda _: runtime
    )
    monkeypatch.setattr(backend, "_cuda", lambda: cuda)
    monkeypatch.setattr(backend, "_library", lambda: trt)
    monkeypatch.setattr(backend, "this_machine", lambda _: HERE)
    monkeypatch.setattr(backend, "_logger", lambda _: runtime.logger)
    return cuda, runtime


def _opened(tmp_path: Path, cuda_graph: bool = False) -> TensorRTEngine:
    path = tmp_path / "unet-0.plan"
    path.write_bytes(b"plan")
    return TensorRTEngine.open(path, SPEC, EngineOptions(cuda_graph=cuda_graph))


X_VALUE, T_VALUE = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([10])


def test_a_run_copies_in_executes_and_copies_out(stand_ins: tuple[RecordingCuda, RecordingRuntime], tmp_path: Path) -> None:
    cuda, runtime = stand_ins
    engine = _opened(tmp_path)
    addresses = dict(runtime.addresses)
    cuda.calls.clear()
    first = engine.run({"x": np.asfortranarray(X_VALUE), "t": T_VALUE})["y"]
    assert cuda.calls == ["cudaMemcpyAsync"] * 3 + ["cudaStreamSynchronize"]
    second = engine.run({"x": -X_VALUE, "t": T_VALUE})["y"]
    assert np.array_equal(first, X_VALUE + 10) and np.array_equal(second, 10 - X_VALUE)  # the first is the caller's own
    assert runtime.addresses == addresses and runtime.runs == 2
    assert engine.describe() | {"library": ""} == {
        "backend": "tensorrt", "version": "11.4.0.106", "library": "", "device": "cuda", "gpu": "a GPU", "compute_capability": "9.0"
    }  # fmt: skip
    engine.close()
    assert not cuda.memory and cuda.calls[-1] == "cudaStreamDestroy"
    calls = len(cuda.calls)
    engine.close()
    assert len(cuda.calls) == calls
    with pytest.raises(RuntimeError, match="closed engine"):
        engine.run({"x": X_VALUE, "t": T_VALUE})


def test_a_cuda_graph_is_captured_after_one_run_and_then_replayed(stand_ins: tuple[RecordingCuda, RecordingRuntime], tmp_path: Path) -> None:
    cuda, runtime = stand_ins
    engine = _opened(tmp_path, cuda_graph=True)
    start = cuda.calls.index("cudaStreamBeginCapture")
    assert cuda.calls[start - 4 : start] == ["cudaMemcpyAsync"] * 3 + ["cudaStreamSynchronize"] and runtime.runs == 2
    copies = ["cudaMemcpyAsync"] * 3
    assert cuda.calls[start:] == ["cudaStreamBeginCapture", *copies, "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy"]
    cuda.calls.clear()
    engine.run({"x": X_VALUE, "t": T_VALUE})
    assert cuda.calls == ["cudaGraphLaunch", "cudaStreamSynchronize"] and runtime.runs == 2
    engine.close()
    assert "cudaGraphExecDestroy" in cuda.calls and not cuda.memory


@pytest.mark.parametrize(
    ("function", "code", "kind", "message"),
    [
        ("cudaMalloc", "cudaErrorMemoryAllocation", InputError, r"too little memory \(cudaMalloc\).*; close what else uses the GPU"),
        ("cudaMallocHost", "cudaErrorMemoryAllocation", InputError, "too little memory"),
        ("cudaMalloc", "cudaErrorIllegalAddress", EngineError, r"cudaMalloc failed \(.*illegal.*\); start the process again"),
        ("cudaStreamCreateWithFlags", "cudaErrorNoDevice", EngineError, "cudaStreamCreateWithFlags failed"),
        ("cudaStreamEndCapture", "cudaErrorStreamCaptureInvalidated", InputError, "cannot be replayed as a CUDA graph .*; open the bundle without"),
        ("cudaGraphInstantiate", "cudaErrorMemoryAllocation", InputError, "too little memory"),
    ],
)
def test_a_failed_open_says_why_and_frees_all(
    stand_ins: tuple[RecordingCuda, RecordingRuntime], tmp_path: Path, function: str, code: str, kind: type[Exception], message: str
) -> None:
    cuda, _ = stand_ins
    cuda.failing[function] = getattr(cuda.real.cudaError_t, code)
    with pytest.raises(kind, match=message):
        _opened(tmp_path, cuda_graph=True)
    assert not cuda.memory
    assert cuda.calls.count("cudaStreamDestroy") == (function != "cudaStreamCreateWithFlags")


def test_a_plan_that_does_not_open_is_refused_in_tensorrts_words(stand_ins: tuple[RecordingCuda, RecordingRuntime], tmp_path: Path) -> None:
    stand_ins[1].opens = False
    with pytest.raises(
        InputError, match=r"^unet-0.plan: TensorRT cannot open the plan \(Error Code 1: .*tag does not match.\)\); export the bundle again"
    ):
        _opened(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ("HALF", (2, 3))}, r"found input x float16 \[2, 3\], expected input x float32 \[2, 3\]"),
        ({"t": ("INT64", (2,))}, r"found input t int64 \[2\], expected input t int64 \[1\]"),
        ({"y": ("BF16", (2, 3))}, r"found output y BF16 \[2, 3\], expected output y float32"),
        ({"z": ("FLOAT", (1,))}, r"found input z float32 \[1\], expected no z"),
    ],
)
def test_a_plan_of_other_tensors_is_refused(
    stand_ins: tuple[RecordingCuda, RecordingRuntime], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    runtime = stand_ins[1]
    runtime.tensors |= change
    runtime.num_io_tensors = len(runtime.tensors)
    with pytest.raises(InputError, match=message):
        _opened(tmp_path)


# Building


def test_polygraphy_takes_what_it_is_given(tmp_path: Path) -> None:
    lean = pytest.importorskip("tensorrt_lean_bindings")
    pytest.importorskip("polygraphy")
    cache = tmp_path / "timing.cache"
    options = BuildOptions(4, 5, cache, version_compatible=True, hardware_compatibility="ampere_plus", refittable=True)
    loader = build._loader(lean, tmp_path / "unet.onnx", options, None)  # Polygraphy's own constructors bind the arguments
    config, network = loader._config, loader._network
    assert network.path == str(tmp_path / "unet.onnx") and network.strongly_typed
    assert loader.timing_cache_path == str(cache) and config.timing_cache_path is None  # not there yet
    assert config.memory_pool_limits == {lean.MemoryPoolType.WORKSPACE: 4 << 30} and config.builder_optimization_level == 5
    assert config.version_compatible and config.exclude_lean_runtime and config.refittable
    assert config.hardware_compatibility_level == lean.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config.profiling_verbosity == lean.ProfilingVerbosity.DETAILED
    assert not (config.fp16 or config.bf16 or config.int8 or config.fp8 or config.tf32)
    cache.touch()
    assert build._loader(lean, tmp_path / "unet.onnx", options, None)._config.timing_cache_path == str(cache)
    assert build._loader(lean, tmp_path / "unet.onnx", BuildOptions(), None)._config.hardware_compatibility_level is None


class RecordingBuilder:
    """A recording stand-in for TensorRT's builder, its config and a network without dynamic shapes: notes flags and properties."""

    num_inputs = 0

    def __init__(self) -> None:
        self.flags: set[Any] = set()
        self.cleared: set[Any] = set()
        self.set_flag, self.clear_flag = self.flags.add, self.cleared.add

    def create_builder_config(self) -> Any:
        return self

    def set_memory_pool_limit(self, pool: Any, limit: int) -> None:
        self.workspace = (pool, limit)

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> None:
        self.timing_cache = cache

    def __iter__(self) -> Any:
        return iter(())


def test_the_config_touches_no_flag_that_tensorrt_11_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lean = pytest.importorskip("tensorrt_lean_bindings")
    monkeypatch.setattr(pytest.importorskip("polygraphy.backend.trt.config"), "trt", lean)  # Polygraphy's code on TensorRT 11's own enums
    plain, compatible = RecordingBuilder(), RecordingBuilder()
    build._loader(lean, tmp_path / "unet.onnx", BuildOptions(), "monitor")._config(plain, plain)
    assert plain.flags == set() and plain.cleared == {lean.BuilderFlag.TF32}
    assert (
        plain.workspace == (lean.MemoryPoolType.WORKSPACE, 8 << 30) and plain.progress_monitor == "monitor" and plain.builder_optimization_level == 3
    )
    build._loader(lean, tmp_path / "unet.onnx", BuildOptions(version_compatible=True, refittable=True), None)._config(compatible, compatible)
    assert {flag.name for flag in compatible.flags} == {"REFIT", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"} <= set(API["BuilderFlag"])


def test_a_level_that_this_tensorrt_lacks_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    old = SimpleNamespace(__version__="10.13.0.35", HardwareCompatibilityLevel=SimpleNamespace(NONE=0, AMPERE_PLUS=1))
    with pytest.raises(InputError, match=r"10.13.0.35 knows no hardware compatibility same_compute_capability; install a newer"):
        build._loader(old, tmp_path / "a.onnx", BuildOptions(hardware_compatibility="same_compute_capability"), None)


@pytest.mark.parametrize("options", [{"workspace_gb": 0}, {"workspace_gb": float("nan")}, {"optimization_level": 6}, {"optimization_level": -1}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        BuildOptions(**options)


def test_a_builder_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0.34"))
    with pytest.raises(InputError, match=r"found 10.9.0.34, expected 10.13 or newer; pip install --upgrade tensorrt"):
        build._builder()


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As if a builder of the run-time package's version and a GPU were here; what builds is each test's own stand-in. Returns the package."""
    lean = pytest.importorskip("tensorrt_lean_bindings")
    pytest.importorskip("polygraphy")
    monkeypatch.setattr(build, "_builder", lambda: lean)
    monkeypatch.setattr(build, "this_machine", lambda trt: Machine(trt.__version__, False, "a GPU", "9.0"))
    return lean


def test_target_and_key_tell_what_a_plan_depends_on(on_a_gpu: Any) -> None:
    plain = build.cache_key(BuildOptions())
    assert build.target(BuildOptions()) == TARGET | {
        "tensorrt": on_a_gpu.__version__, "gpu": "a GPU", "version_compatible": "no", "hardware_compatibility": "none"
    }  # fmt: skip
    assert all(isinstance(value, str) for value in plain.values())
    assert build.cache_key(BuildOptions(timing_cache=Path("a.cache"))) == plain
    changes = [
        {"workspace_gb": 4.0},
        {"optimization_level": 5},
        {"refittable": True},
        {"version_compatible": True},
        {"hardware_compatibility": "ampere_plus"},
    ]
    keys = [plain, *(build.cache_key(BuildOptions(**change)) for change in changes)]
    assert len({json.dumps(key) for key in keys}) == len(keys)


def test_a_build_saves_the_plan_and_tells_its_precision(on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph, notes = _saved(tmp_path, [helper.make_node("MatMul", ["a", "a"], ["y"])], FP16), []
    monkeypatch.setattr(build, "_build", lambda *_: (memoryview(b"a plan"), layer_precisions(MIXED)))
    options = BuildOptions(timing_cache=tmp_path / "cache" / "timing")
    assert build_engine(graph, tmp_path / "a.plan", options, notes.append) == build.target(options)
    assert (tmp_path / "a.plan").read_bytes() == b"a plan" and (tmp_path / "cache").is_dir()
    assert notes == ["graph.onnx: convolutions and matrix products: 2 in FP16, 1 in FP32"]


def test_a_half_precision_graph_silently_built_in_fp32_fails(on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph = _saved(tmp_path, [helper.make_node("MatMul", ["a", "a"], ["y"])], BF16)
    monkeypatch.setattr(build, "_build", lambda *_: (b"a plan", layer_precisions(SINGLE)))
    with pytest.raises(InputError, match=r"^graph.onnx: found an engine silently built in FP32, expected BF16 as declared; "):
        build_engine(graph, tmp_path / "a.plan", BuildOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]


def test_an_error_leaves_the_former_plan_and_prints_nothing(
    on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = pytest.importorskip("polygraphy.logger").G_LOGGER

    def failing(*_: Any) -> Any:
        logger.info("spam")
        logger.error("In node 3 with name: n and operator: Unique (checkNode): UNSUPPORTED_NODE: Plugin not found")
        logger.critical("Could not parse ONNX correctly")

    monkeypatch.setattr(build, "_build", failing)
    (tmp_path / "a.plan").write_bytes(b"former")
    with pytest.raises(InputError, match=r"a.onnx: TensorRT does not support Unique; "):
        build_engine(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.plan", b"former")]
    assert capfd.readouterr() == ("", "")
    assert not logger.use_python_logging_system


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_stops_the_build_at_its_next_step(on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = []

    def recording_build(trt: Any, graph: Path, options: BuildOptions, monitor: Any) -> Any:
        """A stand-in that steps as a builder does, in whatever thread it was started, until told to stop."""
        assert threading.current_thread() is not threading.main_thread() and isinstance(monitor, trt.IProgressMonitor)
        monitor.phase_start("Building Engine", None, 100_000)
        os.kill(os.getpid(), signal.SIGINT)
        while monitor.step_complete("Building Engine", len(steps)):
            steps.append(len(steps))
            threading.Event().wait(0.01)
            assert len(steps) < 1000, "the signal never came through"
        monitor.phase_finish("Building Engine")
        raise RuntimeError("Invalid Engine")

    monkeypatch.setattr(build, "_build", recording_build)
    with pytest.raises(KeyboardInterrupt):
        build_engine(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions())
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_nested_phases_that_end_early() -> None:
    lean = pytest.importorskip("tensorrt_lean_bindings")

    class RecordingBar:
        n, total, shown = 0, 0, ""

        def update(self, count: int) -> None:
            self.n += count

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            self.shown = text

    bar, cancelled = RecordingBar(), threading.Event()
    monitor = build._monitor(lean, bar, cancelled)
    monitor.phase_start("outer", None, 4)
    assert monitor.step_complete("outer", 0)
    monitor.phase_start("inner", "outer", 10)
    assert monitor.step_complete("inner", 2) and (bar.n, bar.total, bar.shown) == (4, 14, "inner")
    monitor.phase_finish("inner")
    assert monitor.step_complete("outer", 1) and (bar.n, bar.total) == (12, 14)
    cancelled.set()
    assert not monitor.step_complete("outer", 2)
    monitor.phase_finish("never started")


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (
            ["[E] In node 12 with name: node_x and operator: Unique (parseNode): UNSUPPORTED_NODE: Assertion failed: creator", "[!] Could not parse"],
            "does not support Unique; install a newer TensorRT",
        ),
        (["[E] No importer registered for op: Det. Attempting to import as plugin.", "[E] getPluginCreator could not find"], "does not support Det;"),
        (["[E] Error Code 2: OutOfMemory (Requested size was 123 bytes.)", "[!] Invalid Engine."], "ran out of memory; close what else"),
        (["[E] [defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)"], "ran out of memory"),
        (["std::bad_alloc"], "ran out of memory"),
        (["[E] Error Code 10: Could not find any implementation for node n due to insufficient workspace."], "too little workspace"),
        (["[E] createInferBuilder: Error Code 6: API Usage Error (CUDA initialization failure with error: 35)"], "found no usable GPU"),
        (
            ["[E] Error Code 4: API Usage Error (n: shapes do not\nfit.)", "[!] Invalid Engine."],
            r"cannot build it \(Error Code 4: .*shapes do not fit",
        ),
        ([""], r"cannot build it \(it gave no reason\)"),
    ],
)
def test_a_failed_build_is_explained_in_one_line(errors: list[str], message: str) -> None:
    error = explain(errors, Path("unet.onnx"))
    assert isinstance(error, InputError) and "\n" not in str(error) and "; " in str(error)
    with pytest.raises(InputError, match=f"^unet.onnx: TensorRT [^\n]*{message}"):
        raise error


# The inspector


def _layer(kind: str, inputs: list[str], outputs: list[str], **more: Any) -> dict[str, Any]:
    def tensors(formats: list[str]) -> list[dict[str, Any]]:
        return [{"Name": "t", "Location": "Device", "Dimensions": [1, 8], "Format/Datatype": text} for text in formats]

    return {"Name": kind, "LayerType": kind, "Inputs": tensors(inputs), "Outputs": tensors(outputs), "StreamId": 0} | more


def _inspected(*layers: Any) -> str:
    return json.dumps({"Layers": layers, "Bindings": ["x", "y"]})


REFORMAT = _layer("Reformat", ["Float"], ["Half"], Origin="REFORMAT", TacticValue="0x00000000000003e8")
MIXED = _inspected(
    REFORMAT,
    _layer("CaskConvolution", ["Half"], ["Half"], Weights={"Type": "Half", "Count": 9408}, TacticName="sm80_xmma_fprop_implicit_gemm_f16f16"),
    _layer("kgen", ["Half", "Float"], ["Float"], TacticName="__myl_CastMeanSub"),
    _layer("gemm", ["Half", "Half", "Float", "Float"], ["Half"], TacticName="sm90_xmma_gemm_f16f16"),
    _layer("gemm", ["Float", "Float"], ["Float"], TacticName="sm80_xmma_gemm_f32f32"),
)
SINGLE = _inspected(
    REFORMAT, _layer("gemm", ["Float", "Float"], ["Half"]), _layer("kgen", ["Half"], ["Float"], TacticName="__myl_Cast"), "a bare name"
)


@pytest.mark.parametrize(
    ("information", "counts"),
    [
        (MIXED, {"FP16": 2, "FP32": 1}),
        (SINGLE, {"FP32": 1}),
        (_inspected(_layer("CaskConvolution", ["BFloat16"], ["BFloat16"])), {"BF16": 1}),
        (_inspected(_layer("CaskConvolution", ["Row major linear FP16 format"], ["Channel major FP16 format where channel % 8 == 0"])), {"FP16": 1}),
        (_inspected(_layer("CaskConvolution", ["Half(64,1:8,...)"], [])), {"FP16": 1}),
        (_inspected(_layer("CaskConvolution", ["N/A due to dynamic shapes"], [], Weights={"Type": "Half", "Count": 1})), {"FP16": 1}),
        (_inspected({"LayerType": "kgen", "TacticName": "_gemm_mha_v2_0x1", "Inputs": [{"Datatype": "Half"}]}), {"FP16": 1}),
        (_inspected({"LayerType": "gemm", "Outputs": [{"Format/Datatype": "Float"}]}), {"FP32": 1}),
        (_inspected(_layer("kgen", ["Half"], ["Half"]), _layer("kgen", ["Int64"], ["Bool"])), {"FP16": 1}),  # no product: all else is counted
        (
            '{"Layers": [{"LayerType": "gemm", "Metadata": "[ONNX Layer: a]\x1f[ONNX Layer: b]", "Inputs": [{"Format/Datatype": "Half"}]}]}',
            {"FP16": 1},
        ),
        (_inspected("names", "only"), {}),
        (_inspected({}), {}),
        ('{"Layers": []}', {}),
        ("{}", {}),
        ("null", {}),
        ("not json", {}),
    ],
)
def test_layers_are_counted_by_precision(information: str, counts: dict[str, int]) -> None:
    assert layer_precisions(information) == counts


def test_precisions_are_held_against_the_graphs() -> None:
    assert check_precisions({"FP32"}, {"FP32": 3}, "a") == "a: convolutions and matrix products: 3 in FP32"
    assert check_precisions({"FP32", "BF16"}, {"BF16": 3}, "a").endswith("3 in BF16")
    assert "shows in speed and parity only" in check_precisions({"FP16"}, {}, "a")
    for declared, found in (({"FP16"}, {"FP32": 9}), ({"BF16", "FP32"}, {"FP16": 1, "FP32": 2}), ({"FP16"}, {"FP16": 0, "FP32": 1})):
        with pytest.raises(InputError, match="silently built"):
            check_precisions(declared, found, "a")


# Operators


def _saved(folder: Path, nodes: list[Any], dtype: int = FP32, opset: int = 18, out: int | None = None, **model: Any) -> Path:
    """An ONNX file of these nodes: inputs a and b [4, 4] of `dtype` and c, a bool; output y."""
    inputs = [helper.make_tensor_value_info(name, dtype, [4, 4]) for name in "ab"] + [helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    initializers = model.pop("initializer", [])
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", out or dtype, None)], initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("ours", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, **model), folder / "graph.onnx")
    return folder / "graph.onnx"


def _initializer(name: str, value: Any) -> Any:
    return onnx.numpy_helper.from_array(np.asarray(value), name)


NODE = helper.make_node
BRANCHES = {
    "then_branch": helper.make_graph([NODE("Det", ["a"], ["d"])], "then", [], [helper.make_tensor_value_info("d", FP32, None)]),
    "else_branch": helper.make_graph([NODE("Add", ["a", "b"], ["s"])], "else", [], [helper.make_tensor_value_info("s", FP32, None)]),
}


@pytest.mark.parametrize(
    ("nodes", "dtype", "problems"),
    [
        ([NODE("MatMul", ["a", "b"], ["m"]), NODE("Softmax", ["m"], ["y"])], FP16, []),
        ([NODE("Equal", ["a", "b"], ["e"]), NODE("Where", ["e", "a", "b"], ["y"])], BF16, []),  # Equal makes bool, its data is not
        ([NODE("CumSum", ["a", "axis"], ["y"])], FP32, []),  # the axis is int64, the data is not
        ([NODE("Shape", ["a"], ["s"]), NODE("Reshape", ["b", "s"], ["y"])], FP32, []),
        ([NODE("Add", ["a", "b"], ["y"])], TensorProto.DOUBLE, ["Add of DOUBLE: supported for FP32, FP16, BF16, INT32, INT64 (1 node, first y)"]),
        ([NODE("Sigmoid", ["a"], ["y"])], TensorProto.INT32, ["Sigmoid of INT32: supported for FP32, FP16, BF16 (1 node, first y)"]),
        ([NODE("Cast", ["a"], ["i"], to=TensorProto.INT16), NODE("Cast", ["i"], ["y"], to=FP32)], FP32, ["Cast of INT16: "]),
        (
            [NODE("Det", ["a"], ["d"], name="n"), NODE("Det", ["b"], ["e"]), NODE("Add", ["d", "e"], ["y"])],
            FP32,
            ["Det: not supported (2 nodes, first n)"],
        ),
        ([NODE("If", ["c"], ["y"], **BRANCHES)], FP32, ["Det: not supported (1 node, first d)"]),
        ([NODE("Sin", ["a"], ["y"], domain="ours")], FP32, ["ours:Sin: not an operator of ONNX"]),
        ([NODE("MadeUp", ["a"], ["y"])], FP32, ["MadeUp: not supported"]),
    ],
)
def test_operators_and_types_are_held_against_the_table(tmp_path: Path, nodes: list[Any], dtype: int, problems: list[str]) -> None:
    found = unsupported(_saved(tmp_path, nodes, dtype, initializer=[_initializer("axis", [0])]))
    assert len(found) == len(problems) and all(line.startswith(problem) for line, problem in zip(found, problems, strict=True)), found


def test_operators_inside_functions_are_checked(tmp_path: Path) -> None:
    body = [NODE("Cast", ["x"], ["d"], to=TensorProto.DOUBLE), NODE("Exp", ["d"], ["e"]), NODE("Cast", ["e"], ["z"], to=FP32)]
    function = helper.make_function("ours", "Precise", ["x"], ["z"], body, [helper.make_opsetid("", 18)])
    graph = _saved(tmp_path, [NODE("Precise", ["a"], ["y"], domain="ours")], functions=[function])
    assert [line.partition(":")[0] for line in unsupported(graph)] == ["Cast of DOUBLE", "Exp of DOUBLE"]


def test_weights_beside_the_graph_are_not_read(tmp_path: Path) -> None:
    nodes = [NODE("MatMul", ["a", "w"], ["m"]), NODE("Unique", ["m"], ["y"])]
    graph = _saved(tmp_path, nodes, FP16, initializer=[_initializer("w", np.zeros((4, 4), np.float16))])
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    assert [line.partition(":")[0] for line in unsupported(graph)] == ["Unique"]
    assert contraction_precisions(graph) == {"FP16"}


def test_declared_precisions_are_those_of_products(tmp_path: Path) -> None:
    nodes = [
        NODE("Cast", ["a"], ["h"], to=FP16),
        NODE("MatMul", ["h", "h"], ["m"]),
        NODE("Cast", ["m"], ["f"], to=FP32),
        NODE("Exp", ["f"], ["y"]),
    ]
    assert contraction_precisions(_saved(tmp_path, nodes)) == {"FP16"}
    assert contraction_precisions(_saved(tmp_path, [*nodes[:3], NODE("MatMul", ["f", "b"], ["y"])])) == {"FP16", "FP32"}


def test_a_bundles_graphs_are_supported(tiny_bundle: Path) -> None:
    graphs = sorted(tiny_bundle.glob("*.onnx"))
    assert len(graphs) >= 5
    assert {graph.name: unsupported(graph) for graph in graphs} == {graph.name: [] for graph in graphs}
