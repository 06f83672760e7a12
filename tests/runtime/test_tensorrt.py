"""The TensorRT backend without a GPU: TensorRT's own enums and run-time classes, and our logic on a fake GPU.

That a plan opens and runs takes a GPU and is not shown here. Where our logic needs something to call, that is a
recording stand-in, named so.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from plan_target import RTX_TARGET, TARGET

from trip_rt.backends import EngineOptions
from trip_rt.backends import tensorrt as backend
from trip_rt.backends.tensorrt import ADDRESS_MULTIPLE, LEAN, Machine, TensorRTEngine, check_target
from trip_rt.components import TensorSpec
from trip_rt.devices import Device
from trip_rt.devices.cuda import CudaDevice
from trip_rt.errors import EngineError, InputError
from trip_rt.manifest import EngineSpec

HERE = Machine("tensorrt", "11.4.0.106", "a GPU", "9.0")
X, T, Y = TensorSpec("x", "float32", (2, 3)), TensorSpec("t", "int64", (1,)), TensorSpec("y", "float32", (2, 3))
SPEC = EngineSpec(
    files=("unet-0.plan",),
    key="0" * 16,
    precision="fp16",
    policy={},
    gflop=1.0,
    target=TARGET,
    inputs=(X, T),
    outputs=(Y,),
)


def test_every_name_that_the_runtime_speaks_of_is_tensorrts() -> None:
    """In the tests below it reads real enums and loggers, and calls stand-ins whose names are these."""
    lean = pytest.importorskip("tensorrt_lean_bindings")
    stand_in = {name for name in vars(RecordingRuntime) if not name.startswith("_")} | {"num_io_tensors"}
    assert stand_in <= {*dir(lean.Runtime), *dir(lean.ICudaEngine), *dir(lean.IExecutionContext)}
    assert set(backend._DTYPES) <= set(lean.DataType.__members__)


def _usable_gpu() -> bool:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    error, count = runtime.cudaGetDeviceCount()
    return error == runtime.cudaError_t.cudaSuccess and count > 0


def test_without_a_driver_probing_and_opening_say_so(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_lean_bindings")
    if _usable_gpu():
        pytest.skip("found a GPU")
    message = r"^cuda: found no usable GPU \(.+\), expected an NVIDIA GPU; .*driver[^\n]*$"
    with pytest.raises(InputError, match=message):
        TensorRTEngine.probe(SPEC, EngineOptions())
    with pytest.raises(InputError, match=message):
        TensorRTEngine.open(tmp_path / "never-read.plan", SPEC, EngineOptions(device="cuda", cuda_graph=True))


def test_on_a_cpu_it_does_not_run() -> None:
    with pytest.raises(InputError, match="the CPU was asked for, expected a GPU; use onnxruntime or openvino"):
        TensorRTEngine.probe(SPEC, EngineOptions(device="cpu"))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_lean_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"found no usable package .* pip install trip-rt\[tensorrt\]"):
        TensorRTEngine.probe(SPEC, EngineOptions())


@pytest.mark.parametrize(
    ("version", "driver", "fits"),
    [("11.4.0.106", 12080, False), ("11.4.0.106", 13000, True), ("10.16.1.11", 12080, True)],
)
def test_tensorrt_11_wants_a_driver_for_cuda_13(
    monkeypatch: pytest.MonkeyPatch, version: str, driver: int, fits: bool
) -> None:
    monkeypatch.setattr(backend, "gpu", lambda: ("a GPU", "9.0"))
    monkeypatch.setattr(backend, "call", {"cudaDriverGetVersion": driver}.__getitem__)
    trt = SimpleNamespace(__name__="tensorrt_lean_bindings", __version__=version)
    if fits:
        assert backend.this_machine(trt) == Machine(LEAN, version, "a GPU", "9.0")
    else:
        with pytest.raises(
            InputError,
            match=r"found a driver for CUDA 12.8, expected 13.0 for TensorRT 11.4.0.106; install driver 580 or newer",
        ):
            backend.this_machine(trt)


COMPATIBLE = {"version_compatible": "yes"}
ADA = {"library": "tensorrt_rtx", "version": "1.7.1.116", "compute_capability": "8.9"}


@pytest.mark.parametrize(
    ("target", "machine", "problem"),
    [
        ({}, {}, None),
        ({}, {"version": "11.4.0.107"}, "tensorrt 11.4.0.107, expected 11.4.0.106 exactly"),
        ({"version_compatible": "no"}, {"version": "11.5.0.1"}, "expected 11.4.0.106 exactly"),
        (COMPATIBLE, {"version": "11.5.0.1"}, None),
        (COMPATIBLE, {"version": "11.10.0.1"}, None),
        (COMPATIBLE, {"version": "11.3.9.9"}, "tensorrt 11.3.9.9, expected 11.4.0.106 or a later 11.x"),
        (COMPATIBLE, {"version": "12.0.0.1"}, "or a later 11.x"),
        (COMPATIBLE, {"version": "10.16.1.11"}, "or a later 11.x"),
        (COMPATIBLE | {"version": "from hell"}, {}, "expected from hell"),
        ({}, {"library": LEAN}, "lean runtime, expected the full one"),
        (COMPATIBLE, {"library": LEAN, "version": "11.5.0.1"}, None),
        ({}, {"library": "tensorrt_rtx", "version": "11.4.0.106"}, "tensorrt_rtx, expected tensorrt, which built it"),
        (RTX_TARGET, {}, "tensorrt, expected tensorrt_rtx"),
        (RTX_TARGET, {"library": LEAN}, "expected tensorrt_rtx"),
        (RTX_TARGET, ADA, None),
        (RTX_TARGET, ADA | {"compute_capability": "12.0"}, None),
        (RTX_TARGET, ADA | {"compute_capability": "12.1"}, "capability 12.1 .a GPU., expected 8.9, 12.0"),
        (RTX_TARGET, ADA | {"compute_capability": "8.6"}, "expected 8.9, 12.0"),
        (RTX_TARGET, ADA | {"version": "1.7.2.1"}, "tensorrt_rtx 1.7.2.1, expected 1.7.1.116 exactly"),
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
def test_a_plan_opens_only_on_a_machine_of_its_target(
    target: dict[str, str], machine: dict[str, Any], problem: str | None
) -> None:
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


class RecordingRuntime:
    """A recording stand-in for TensorRT's Runtime, engine and execution context in one: y = x + t, on the stand-in's
    memory."""

    def __init__(self, lean: Any, logger: Any, cuda: FakeCuda):
        self.lean, self.logger, self.cuda = lean, logger, cuda
        self.tensors = {"x": ("FLOAT", (2, 3)), "t": ("INT64", (1,)), "y": ("FLOAT", (2, 3))}
        self.outputs, self.addresses, self.runs, self.opens = {"y"}, {}, 0, True
        self.num_io_tensors = 3

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        if not self.opens:
            self.logger.log(
                self.lean.ILogger.Severity.ERROR, "Error Code 1: Serialization (Version tag does not match.)"
            )
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
        assert address % ADDRESS_MULTIPLE == 0, "TensorRT takes no other"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        x, y = (self.cuda.view(self.addresses[name], np.float32, (2, 3)) for name in ("x", "y"))
        t = self.cuda.view(self.addresses["t"], np.int64, (1,))

        def does() -> None:
            self.runs += 1
            y[:] = x + t

        self.cuda.work(does)
        return True


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeCuda, RecordingRuntime]:
    lean = pytest.importorskip("tensorrt_lean_bindings")
    cuda = FakeCuda().install(monkeypatch)
    runtime = RecordingRuntime(lean, backend._logger(lean), cuda)
    trt = SimpleNamespace(
        **{name: getattr(lean, name) for name in ("TensorIOMode", "TensorLocation", "ILogger", "__name__")},
        Runtime=lambda _: runtime,
    )
    monkeypatch.setattr(TensorRTEngine, "_library", lambda: trt)
    monkeypatch.setattr(backend, "this_machine", lambda _: HERE)
    monkeypatch.setattr(backend, "_logger", lambda _: runtime.logger)
    return cuda, runtime


def _opened(tmp_path: Path, device: Device | None = None) -> TensorRTEngine:
    path = tmp_path / "unet-0.plan"
    path.write_bytes(b"plan")
    return TensorRTEngine.open(path, SPEC, EngineOptions(), device)


X_VALUE, T_VALUE = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([10])


def test_a_run_copies_in_executes_and_copies_out(stand_ins: tuple[FakeCuda, RecordingRuntime], tmp_path: Path) -> None:
    cuda, runtime = stand_ins
    engine = _opened(tmp_path)
    first = engine.run({"x": np.asfortranarray(X_VALUE), "t": T_VALUE})["y"]
    addresses = dict(runtime.addresses)
    cuda.calls.clear()
    second = engine.run({"x": -X_VALUE, "t": T_VALUE})["y"]
    assert set(cuda.calls) == {"cudaMemcpyAsync", "cudaStreamSynchronize"}
    assert np.array_equal(first, X_VALUE + 10) and np.array_equal(second, 10 - X_VALUE)  # the first is the caller's own
    assert runtime.addresses == addresses and runtime.runs == 2
    assert engine.describe() | {"library": ""} == {
        "backend": "tensorrt",
        "version": "11.4.0.106",
        "library": "",
        "device": "cuda",
        "gpu": "a GPU",
        "compute_capability": "9.0",
    }
    engine.close()
    assert not cuda.memory and cuda.calls[-1] == "cudaStreamDestroy"
    calls = len(cuda.calls)
    engine.close()
    assert len(cuda.calls) == calls
    with pytest.raises(RuntimeError, match="closed engine"):
        engine.run({"x": X_VALUE, "t": T_VALUE})


def test_bindings_stand_beside_each_other_and_replay_as_graphs(
    stand_ins: tuple[FakeCuda, RecordingRuntime], tmp_path: Path
) -> None:
    cuda, runtime = stand_ins
    with contextlib.closing(CudaDevice()) as device:
        engine = _opened(tmp_path, device)
        sets = [{tensor.name: device.zeros(tensor.dtype, tensor.shape) for tensor in (X, T, Y)} for _ in range(2)]
        works = [engine.bind(buffers) for buffers in sets]
        for sign, buffers in zip((1, -1), sets, strict=True):
            device.write(buffers["x"], sign * X_VALUE)
            device.write(buffers["t"], T_VALUE)
        start = len(cuda.calls)
        replay = engine.capture(lambda: [work() for work in works])
        recorded = [
            "cudaStreamSynchronize",
            "cudaStreamBeginCapture",
            "cudaStreamEndCapture",
            "cudaGraphInstantiate",
            "cudaGraphDestroy",
        ]
        assert cuda.calls[start:] == recorded and runtime.runs == 2, "run once before, not while recording"
        device.write(sets[0]["x"], 3 * X_VALUE)
        replay()
        assert runtime.runs == 4
        assert np.array_equal(device.read(sets[0]["y"]), 3 * X_VALUE + 10) and np.array_equal(
            device.read(sets[1]["y"]), 10 - X_VALUE
        )
        engine.close()
        assert cuda.memory, "the buffers are the device's"
    assert not cuda.memory and not cuda.handles


def test_buffers_that_are_not_the_plans_are_refused(
    stand_ins: tuple[FakeCuda, RecordingRuntime], tmp_path: Path
) -> None:
    with contextlib.closing(CudaDevice()) as device:
        engine = _opened(tmp_path, device)
        buffers = {tensor.name: device.zeros(tensor.dtype, tensor.shape) for tensor in (X, T, Y)}
        with pytest.raises(ValueError, match=r"output y: found float32 \[3, 2\], expected float32 \[2, 3\]"):
            engine.bind(buffers | {"y": device.zeros("float32", (3, 2))})
        with pytest.raises(ValueError, match="input t: found nothing"):
            engine.bind({name: buffers[name] for name in ("x", "y")})


@pytest.mark.parametrize(
    ("function", "code", "kind", "message"),
    [
        ("cudaStreamCreateWithFlags", "cudaErrorNoDevice", EngineError, "cudaStreamCreateWithFlags failed"),
        (
            "cudaMalloc",
            "cudaErrorMemoryAllocation",
            InputError,
            r"too little memory \(cudaMalloc\).*; close what else uses the GPU",
        ),
        (
            "cudaMalloc",
            "cudaErrorIllegalAddress",
            EngineError,
            r"cudaMalloc failed \(.*illegal.*\); start the process again",
        ),
    ],
)
def test_a_failed_run_says_why_and_frees_all(
    stand_ins: tuple[FakeCuda, RecordingRuntime],
    tmp_path: Path,
    function: str,
    code: str,
    kind: type[Exception],
    message: str,
) -> None:
    cuda, _ = stand_ins
    cuda.failing[function] = getattr(cuda.runtime.cudaError_t, code)
    with pytest.raises(kind, match=message):
        engine = _opened(tmp_path)
        try:
            engine.run({"x": X_VALUE, "t": T_VALUE})
        finally:
            engine.close()
    assert not cuda.memory and not cuda.handles


def test_a_plan_that_does_not_open_is_refused_in_tensorrts_words(
    stand_ins: tuple[FakeCuda, RecordingRuntime], tmp_path: Path
) -> None:
    stand_ins[1].opens = False
    with pytest.raises(
        InputError,
        match=(
            r"^unet-0.plan: TensorRT cannot open the plan \(Error Code 1: .*tag does not match.\)\); export the bundle"
            r" again"
        ),
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
    stand_ins: tuple[FakeCuda, RecordingRuntime], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    runtime = stand_ins[1]
    runtime.tensors |= change
    runtime.num_io_tensors = len(runtime.tensors)
    with pytest.raises(InputError, match=message):
        _opened(tmp_path)
