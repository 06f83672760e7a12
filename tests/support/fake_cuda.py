"""A fake GPU: cuda-bindings' functions on the host's memory, so that all of trip-rt but the GPU itself runs where there
is none.

Work is done when it is queued, or, while a stream captures, when the graph is launched. Misuse that a GPU would punish
is an AssertionError: arguments that the real functions do not take, memory that is not there, waiting while capturing,
freeing twice. Machine code of another architecture is refused as the driver refuses it.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

_ALIGNMENT = 256  # bytes, as cudaMalloc's
Kernel = Callable[[int, list[int]], None]  # of so many programs, with these arguments


class FakeCuda:
    """`calls` are the functions called, `memory` and `handles` what is not freed yet; `failing` maps a function to the
    error it returns.

    `kernels` are Python functions by the name of the entry that stands for them.
    """

    def __init__(self, capability: tuple[int, int] = (9, 0)):
        self.real = {
            "cuda": pytest.importorskip("cuda.bindings.runtime"),
            "cu": pytest.importorskip("cuda.bindings.driver"),
        }
        self.capability = capability
        self.calls: list[str] = []
        self.failing: dict[str, Any] = {}
        self.memory: dict[int, Any] = {}
        self.handles: dict[int, Any] = {}
        self.kernels: dict[str, Kernel] = {}
        self.recording: list[Callable[[], None]] | None = None

    @property
    def runtime(self) -> Any:
        """In place of cuda.bindings.runtime."""
        return _Library(self, "cuda")

    @property
    def driver(self) -> Any:
        """In place of cuda.bindings.driver."""
        return _Library(self, "cu")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
        """Have trip-rt use it."""
        from trip_rt.devices import cuda

        monkeypatch.setattr(cuda, "cuda", lambda: self.runtime)
        monkeypatch.setattr(cuda, "driver", lambda: self.driver)
        return self

    def work(self, does: Callable[[], None]) -> None:
        """Queue something on the stream."""
        if self.recording is None:
            does()
        else:
            self.recording.append(does)

    def block(self, address: int, size: int = 0) -> Any:
        """The bytes from an address to the end of the memory that it lies in."""
        for start, memory in self.memory.items():
            if start <= address and address + size <= start + len(memory):
                return (ctypes.c_char * (start + len(memory) - address)).from_address(address)
        raise AssertionError(f"{size} bytes at {address} are no memory of the GPU's")

    def view(self, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """An array over the GPU's memory."""
        count = int(np.prod(shape))
        return np.frombuffer(self.block(address, count * np.dtype(dtype).itemsize), dtype, count).reshape(shape)

    def _new(self, what: Any) -> int:
        handle = max(self.handles, default=1000) + 1
        self.handles[handle] = what
        return handle

    def _not_while_capturing(self) -> None:
        assert self.recording is None, "a capturing stream cannot be waited for, nor memory be taken or freed"

    def cudaGetDeviceCount(self) -> int:
        return 1

    def cudaGetDevice(self) -> int:
        return 0

    def cudaSetDevice(self, device: int) -> None:
        assert device == 0

    def cudaGetDeviceProperties(self, device: int) -> Any:
        return SimpleNamespace(name=b"a fake GPU", major=self.capability[0], minor=self.capability[1])

    def cudaDriverGetVersion(self) -> int:
        return 13000

    def cudaGetLastError(self) -> None: ...

    def cudaStreamCreateWithFlags(self, flags: int) -> int:
        return self._new("stream")

    def cudaStreamSynchronize(self, stream: int) -> None:
        self._not_while_capturing()
        assert self.handles[int(stream)] == "stream"

    def _destroy(self, handle: int) -> None:
        del self.handles[int(handle)]

    cudaStreamDestroy = cudaEventDestroy = cudaGraphDestroy = cudaGraphExecDestroy = cuModuleUnload = _destroy

    def cudaMalloc(self, size: int) -> int:
        self._not_while_capturing()
        room = ctypes.create_string_buffer(b"\xff" * (size + _ALIGNMENT), size + _ALIGNMENT)
        start = -ctypes.addressof(room) % _ALIGNMENT
        block = (ctypes.c_char * size).from_buffer(room, start)
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address: int) -> None:
        self._not_while_capturing()
        del self.memory[address]

    cudaFreeHost = cudaFree

    def cudaMemsetAsync(self, address: int, value: int, count: int, stream: int) -> None:
        self.block(address, count)
        self.work(lambda: ctypes.memset(address, value, count) and None)

    def cudaMemcpyAsync(self, to: int, origin: int, size: int, kind: Any, stream: int) -> None:
        self.cudaMemcpy2DAsync(to, size, origin, size, size, 1, kind, stream)

    def cudaMemcpy2DAsync(
        self, to: int, to_pitch: int, origin: int, pitch: int, width: int, height: int, kind: Any, stream: int
    ) -> None:
        assert self.handles[int(stream)] == "stream" and width <= min(to_pitch, pitch)
        for address, step, on_device in (
            (to, to_pitch, kind.name.endswith("ToDevice")),
            (origin, pitch, "DeviceTo" in kind.name),
        ):
            if on_device:
                self.block(address, step * (height - 1) + width)

        def does() -> None:
            for row in range(height):
                ctypes.memmove(to + row * to_pitch, origin + row * pitch, width)

        self.work(does)

    def cudaEventCreateWithFlags(self, flags: int) -> int:
        return self._new("event")

    def cudaEventRecord(self, event: int, stream: int) -> None:
        assert self.handles[event] == "event"

    def cudaEventSynchronize(self, event: int) -> None:
        self._not_while_capturing()
        assert self.handles[event] == "event"

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> None:
        self._not_while_capturing()
        self.recording = []

    def cudaStreamEndCapture(self, stream: int) -> int:
        recorded, self.recording = self.recording, None
        return self._new(recorded)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> int:
        return self._new(self.handles[graph])

    def cudaGraphLaunch(self, graph: int, stream: int) -> None:
        for does in self.handles[graph]:
            does()

    def cuModuleLoadData(self, image: bytes) -> int:
        assert image[:4] == b"\x7fELF" and self.real["cu"]._HelperInputVoidPtr(image), "no machine code"
        (major, minor), here = architecture(image), self.capability
        older = major == here[0] < 9 and minor < here[1]
        if not ((major, minor) == here or older):
            return self.real["cu"].CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
        return self._new("module")

    def cuModuleGetFunction(self, module: int, name: bytes) -> Kernel:
        assert self.handles[module] == "module"
        return self.kernels[name.decode()]

    def cuFuncSetAttribute(self, function: Kernel, attribute: Any, value: int) -> None:
        assert value > 48 << 10

    def cuLaunchKernel(
        self,
        function: Kernel,
        x: int,
        y: int,
        z: int,
        threads: int,
        ty: int,
        tz: int,
        shared: int,
        stream: int,
        parameters: Any,
        extra: int,
    ) -> None:
        assert (y, z, ty, tz) == (1, 1, 1, 1) and threads % 32 == 0 and self.handles[int(stream)] == "stream"
        assert self.real["cu"]._HelperKernelParams(parameters), "cuda-bindings' own reading of them"
        values, types = parameters
        assert len(values) == len(types) and all(kind in (ctypes.c_void_p, ctypes.c_int32) for kind in types)
        for value, kind in zip(values, types, strict=True):
            if kind is ctypes.c_void_p and value:
                self.block(value, 1)
        self.work(lambda: function(x, list(values)))


def architecture(cubin: bytes) -> tuple[int, int]:
    """The compute capability that machine code is for, from its ELF header."""
    flags = int.from_bytes(cubin[48:52], "little")
    number = (flags >> 8) & 0xFF if cubin[8] >= 8 else flags & 0xFF  # by the version of the ABI
    return number // 10, number % 10


class _Library:
    """One of the two modules: enums and signatures are the real one's."""

    def __init__(self, fake: FakeCuda, prefix: str):
        self._fake, self._prefix = fake, prefix

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._fake.real[self._prefix], name)
        if inspect.isclass(real) or not callable(real) or name.endswith("GetErrorString"):
            return real

        def function(*arguments: Any) -> tuple[Any, ...]:
            inspect.signature(real).bind(*arguments)
            self._fake.calls.append(name)
            if name in self._fake.failing:
                self._fake.recording = None  # an error ends a capture
                return self._fake.failing[name], None
            made = getattr(self._fake, name)(*arguments)
            if isinstance(made, self._fake.real["cu"].CUresult):
                return made, None
            good = self.cudaError_t.cudaSuccess if self._prefix == "cuda" else self.CUresult.CUDA_SUCCESS
            return (good,) if made is None else (good, made)

        return function
