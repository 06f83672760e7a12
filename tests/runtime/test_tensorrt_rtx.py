"""The TensorRT for RTX backend without a GPU: the real package's names and enums, and our logic on a fake GPU.

That a plan opens and runs takes a GPU and is not shown here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from plan_target import RTX_TARGET

from trip_rt import backends
from trip_rt.backends import EngineOptions, kernel_cache
from trip_rt.backends import tensorrt as shared
from trip_rt.backends.kernel_cache import KernelCache
from trip_rt.backends.tensorrt import ADDRESS_MULTIPLE, Machine
from trip_rt.backends.tensorrt_rtx import TensorRTRTXEngine, plan_for
from trip_rt.components import TensorSpec
from trip_rt.devices import Device
from trip_rt.devices.cuda import CudaDevice
from trip_rt.errors import InputError
from trip_rt.manifest import EngineSpec

SCRATCH = 1000
X, Y = TensorSpec("x", "float32", (2, 3)), TensorSpec("y", "float32", (2, 3))
SPEC = EngineSpec(("unet-0.plan",), "0" * 16, "fp16", {}, 1.0, RTX_TARGET, (X,), (Y,))
EACH = dataclasses.replace(SPEC, files=("a.plan", "b.plan"), target=RTX_TARGET | {"plan": "per capability"})
X_VALUE = np.arange(6, dtype=np.float32).reshape(2, 3)


class RecordingRTX:
    """A recording stand-in for TensorRT for RTX's Runtime, engine, runtime config, runtime cache and execution context
    in one: y = 2 x, once its scratch memory is set. It compiles at its first run, unless its cache has that."""

    num_io_tensors = 2
    device_memory_size_v2 = SCRATCH

    def __init__(self, rtx: Any, cuda: FakeCuda):
        self.rtx, self.cuda = rtx, cuda
        self.addresses: dict[str, int] = {}
        self.opened: list[bytes] = []
        self.strategy: Any = None
        self.scratch = 0
        self.records = True
        self.cache, self.compilations = b"", 0

    # Runtime
    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        self.opened.append(plan)
        return self

    # engine
    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.rtx.DataType.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (2, 3)

    def get_tensor_mode(self, name: str) -> Any:
        return self.rtx.TensorIOMode.INPUT if name == "x" else self.rtx.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.rtx.TensorLocation.DEVICE

    def create_runtime_config(self) -> Any:
        return self

    def create_execution_context(self, config: Any) -> Any:
        assert config is self
        return self

    # config
    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        return self

    def set_runtime_cache(self, cache: Any) -> bool:
        return True

    # cache
    def deserialize(self, blob: bytes) -> bool:
        self.cache = blob if blob.startswith(b"compiled") else b""
        return bool(self.cache)

    def serialize(self) -> Any:
        return memoryview(self.cache)

    # context
    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % ADDRESS_MULTIPLE == 0 and size >= SCRATCH
        self.cuda.block(memory, size)
        self.scratch = memory

    def is_stream_capturable(self, stream: int) -> bool:
        assert self.cuda.handles[stream] == "stream" and set(self.addresses) == {"x", "y"}
        return self.records

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % ADDRESS_MULTIPLE == 0, "TensorRT takes no other"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.scratch
        self.cuda.block(self.scratch, SCRATCH)
        if not self.cache:
            assert self.cuda.recording is None, "a graph cannot record a compilation"
            self.cache, self.compilations = b"compiled by this driver", self.compilations + 1
        x, y = (self.cuda.view(self.addresses[name], np.float32, (2, 3)) for name in "xy")

        def does() -> None:
            y[:] = 2 * x

        self.cuda.work(does)
        return True


@pytest.fixture(autouse=True)
def cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trip-rt" / "kernels"


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeCuda, RecordingRTX]:
    rtx = pytest.importorskip("tensorrt_rtx")
    cuda = FakeCuda((8, 9)).install(monkeypatch)
    recording = RecordingRTX(rtx, cuda)
    names = ("TensorIOMode", "TensorLocation", "ILogger", "ExecutionContextAllocationStrategy", "__name__")
    trt = SimpleNamespace(
        **{name: getattr(rtx, name) for name in names},
        __version__=RTX_TARGET["version"],
        Runtime=lambda _: recording,
    )
    monkeypatch.setattr(TensorRTRTXEngine, "_library", lambda: trt)
    monkeypatch.setattr(shared, "_logger", lambda _: SimpleNamespace(take=lambda: ""))
    return cuda, recording


def opened(tmp_path: Path, device: Device | None = None) -> TensorRTRTXEngine:
    (tmp_path / "unet-0.plan").write_bytes(b"a plan")
    engine = TensorRTRTXEngine.open(tmp_path / "unet-0.plan", SPEC, EngineOptions(), device)
    assert isinstance(engine, TensorRTRTXEngine)
    return engine


def test_every_name_that_the_stand_in_has_is_the_packages() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    classes = (rtx.Runtime, rtx.ICudaEngine, rtx.IRuntimeConfig, rtx.IRuntimeCache, rtx.IExecutionContext)
    assert {name for name in vars(RecordingRTX) if not name.startswith("_")} <= {n for c in classes for n in dir(c)}


def test_the_package_says_that_it_takes_what_the_engine_passes() -> None:
    """No machine without a GPU opens a plan, so its own signatures have to do."""
    rtx = pytest.importorskip("tensorrt_rtx")
    assert "blob: typing_extensions.Buffer) -> bool" in rtx.IRuntimeCache.deserialize.__doc__
    assert "runtime_config: tensorrt_rtx_bindings.tensorrt_rtx.IRuntimeConfig" in (
        rtx.ICudaEngine.create_execution_context.__doc__
    )


def test_without_a_gpu_or_the_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorRTRTXEngine, "modules", ("no_such_package",))
    with pytest.raises(
        InputError, match=r"^tensorrt-rtx: found no usable package \(.*\), expected no_such_package; pip"
    ):
        TensorRTRTXEngine.probe(SPEC, EngineOptions())
    with pytest.raises(InputError, match=r"^tensorrt-rtx: found that the CPU was asked for"):
        TensorRTRTXEngine.probe(SPEC, EngineOptions(device="cpu"))


def test_the_missing_package_is_the_extra_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(InputError, match=r"expected tensorrt_rtx; pip install trip-rt\[rtx\]$"):
        TensorRTRTXEngine.probe(SPEC, EngineOptions())


def test_it_comes_first_on_a_gpu() -> None:
    assert backends.NAMES[:2] == ("tensorrt-rtx", "tensorrt")


def test_a_run_uses_memory_of_ours_and_replays_as_a_graph(
    stand_ins: tuple[FakeCuda, RecordingRTX], tmp_path: Path
) -> None:
    cuda, recording = stand_ins
    with contextlib.closing(CudaDevice()) as device:
        engine = opened(tmp_path, device)
        assert recording.strategy.name == "USER_MANAGED" and not engine.capturable
        buffers = {tensor.name: device.zeros(tensor.dtype, tensor.shape) for tensor in (X, Y)}
        work = engine.bind(buffers)
        assert engine.capturable
        device.write(buffers["x"], X_VALUE)
        replay = engine.capture(work)
        device.write(buffers["x"], 3 * X_VALUE)
        replay()
        assert np.array_equal(device.read(buffers["y"]), 6 * X_VALUE)
        recording.records = False
        engine.bind(buffers)
        assert not engine.capturable, "where the library says no, the loop launches step by step"
        assert engine.describe() == {
            "backend": "tensorrt-rtx",
            "version": RTX_TARGET["version"],
            "library": "tensorrt_rtx",
            "device": "cuda",
            "gpu": "a fake GPU",
            "compute_capability": "8.9",
        }
        engine.close()
    assert not cuda.memory and not cuda.handles


def test_halves_at_any_address_are_copied_to_one_that_it_takes(
    stand_ins: tuple[FakeCuda, RecordingRTX], tmp_path: Path
) -> None:
    with contextlib.closing(CudaDevice()) as device:
        engine = opened(tmp_path, device)
        whole = {tensor.name: device.zeros(tensor.dtype, (4, 3)) for tensor in (X, Y)}
        halves = {name: buffer[2:] for name, buffer in whole.items()}
        assert halves["x"].address % ADDRESS_MULTIPLE
        device.write(halves["x"], X_VALUE)
        engine.capture(engine.bind(halves))()
        assert np.array_equal(device.read(halves["y"]), 2 * X_VALUE)
        assert not device.read(whole["y"][:2]).any()
        engine.close()


def test_what_was_compiled_is_kept_for_the_next_time(
    stand_ins: tuple[FakeCuda, RecordingRTX], tmp_path: Path, cache_home: Path
) -> None:
    _, recording = stand_ins
    for compilations in (1, 1):
        recording.cache = b""
        engine = opened(tmp_path)
        engine.run({"x": X_VALUE})
        engine.run({"x": X_VALUE})
        engine.close()
        assert recording.compilations == compilations
    (file,) = cache_home.iterdir()
    assert file.read_bytes() == b"compiled by this driver"
    file.write_bytes(b"of another driver")  # the library refuses it
    recording.cache = b""
    with contextlib.closing(opened(tmp_path)) as engine:
        engine.run({"x": X_VALUE})
    assert recording.compilations == 2 and file.read_bytes() == b"compiled by this driver"


def test_the_plan_for_this_gpu_is_opened(stand_ins: tuple[FakeCuda, RecordingRTX], tmp_path: Path) -> None:
    cuda, recording = stand_ins
    for name in ("a.plan", "b.plan"):
        (tmp_path / name).write_bytes(name.encode())
    for cuda.capability in ((8, 9), (12, 0)):
        TensorRTRTXEngine.open(tmp_path / "a.plan", EACH, EngineOptions()).close()
    assert recording.opened == [b"a.plan", b"b.plan"]
    cuda.capability = (8, 6)
    with pytest.raises(InputError, match=r"found compute capability 8.6 \(a fake GPU\), expected 8.9, 12.0; export"):
        TensorRTRTXEngine.open(tmp_path / "a.plan", EACH, EngineOptions())
    with pytest.raises(InputError, match=r"^a.plan: found 1 plans, expected one for each of 8.9, 12.0; export"):
        plan_for(dataclasses.replace(EACH, files=("a.plan",)), "8.9")
    assert plan_for(SPEC, "12.0") == "unet-0.plan"


# The kernel cache


def test_a_cache_is_of_one_plan_gpu_and_version(cache_home: Path) -> None:
    keys = [(b"a plan", "a GPU", "8.9", "1"), (b"a plan", "a GPU", "8.9", "2"), (b"another", "a GPU", "8.9", "1")]
    for key in keys:
        assert KernelCache(*key).load() == b""
        KernelCache(*key).save(repr(key).encode())
    assert [KernelCache(*key).load() for key in keys] == [repr(key).encode() for key in keys]
    assert cache_home.stat().st_mode & 0o777 == 0o700
    assert len(list(cache_home.iterdir())) == 3


def test_the_oldest_go_when_all_are_too_many(monkeypatch: pytest.MonkeyPatch, cache_home: Path) -> None:
    monkeypatch.setattr(kernel_cache, "MAX_BYTES", 250)
    caches = [KernelCache(bytes([index])) for index in range(3)]
    for index, cache in enumerate(caches[:2]):
        cache.save(b"x" * 100)
        os.utime(cache.path, (index, index))
    assert caches[0].load(), "which makes it the latest"
    caches[2].save(b"x" * 100)
    assert [bool(cache.load()) for cache in caches] == [True, False, True]
    caches[1].save(b"x" * 251)
    assert caches[1].load() == b"" and len(list(cache_home.iterdir())) == 2


def test_a_folder_or_file_that_others_may_write_to_is_not_used(cache_home: Path, tmp_path: Path) -> None:
    cache = KernelCache(b"a plan")
    cache.save(b"kernels")
    cache.path.chmod(0o666)
    assert cache.load() == b""
    cache.path.chmod(0o644)
    assert cache.load() == b"kernels"
    cache_home.chmod(0o777)
    assert cache.load() == b""
    cache.save(b"others")
    cache_home.chmod(0o700)
    assert cache.load() == b"kernels"
    cache.path.unlink()
    (tmp_path / "elsewhere").write_bytes(b"planted")
    cache.path.symlink_to(tmp_path / "elsewhere")
    assert cache.load() == b""


@pytest.mark.parametrize("home", ["a file", "none"])
def test_without_a_place_nothing_is_kept_and_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str
) -> None:
    if home == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without an entry
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    KernelCache(b"a plan").save(b"kernels")
    assert KernelCache(b"a plan").load() == b"" and sorted(tmp_path.iterdir()) == before


def test_what_is_there_already_is_marked_as_used(cache_home: Path) -> None:
    cache = KernelCache(b"a plan")
    cache.save(b"kernels")
    os.utime(cache.path, (1, 1))
    cache.save(b"kernels")
    assert cache.path.stat().st_mtime > 1


def test_the_machine_that_a_plan_is_held_against(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "gpu", lambda: ("a GPU", "8.9"))
    monkeypatch.setattr(shared, "call", {"cudaDriverGetVersion": 12080}.__getitem__)
    trt = SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7.1.116")
    assert shared.this_machine(trt) == Machine("tensorrt_rtx", "1.7.1.116", "a GPU", "8.9")
