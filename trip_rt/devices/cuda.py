"""An NVIDIA GPU through cuda-bindings: one stream, buffers of fixed address, CUDA graphs, compiled kernels. Nothing
else here speaks to CUDA."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt.devices.base import Buffer, Device, ReadBack, Work
from trip_rt.errors import EngineError, InputError
from trip_rt.signals import import_library


class CudaDevice(Device):
    """The GPU in use. All work goes to `stream` (a handle, as an int), which the host waits for only in `read`, `take`
    and `pace`."""

    kind = "cuda"

    def __init__(self) -> None:
        self.name, self.compute_capability = gpu()
        self._index = call("cudaGetDevice")
        # This makes the primary context current, for the driver's functions too.
        call("cudaSetDevice", self._index)
        self._stream = call("cudaStreamCreateWithFlags", cuda().cudaStreamNonBlocking)
        self.stream = int(self._stream)
        self._device: list[int] = []
        self._pinned: list[int] = []
        self._events: deque[Any] = deque()
        self._graphs: list[Any] = []
        self._modules: list[Any] = []

    def use(self) -> None:
        if self._stream is None:
            raise RuntimeError("found a closed GPU device, expected an open one; open the bundle again")
        call("cudaSetDevice", self._index)

    def zeros(self, dtype: str, shape: Sequence[int]) -> Buffer:
        buffer = Buffer(np.dtype(dtype), tuple(shape), 0)
        address = call("cudaMalloc", max(1, buffer.nbytes))
        self._device.append(address)
        call("cudaMemsetAsync", address, 0, buffer.nbytes, self._stream)
        return Buffer(buffer.dtype, buffer.shape, address)

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        source = np.ascontiguousarray(array, buffer.dtype)
        assert source.shape == buffer.shape, (source.shape, buffer.shape)
        call(
            "cudaMemcpyAsync",
            buffer.address,
            source.ctypes.data,
            buffer.nbytes,
            cuda().cudaMemcpyKind.cudaMemcpyHostToDevice,
            self._stream,
        )
        self.synchronize()  # `source` may be gone, or changed, once this returns

    def read(self, buffer: Buffer) -> NDArray[Any]:
        array = np.empty(buffer.shape, buffer.dtype)
        call(
            "cudaMemcpyAsync",
            array.ctypes.data,
            buffer.address,
            buffer.nbytes,
            cuda().cudaMemcpyKind.cudaMemcpyDeviceToHost,
            self._stream,
        )
        self.synchronize()
        return array

    def copy(self, source: Buffer, target: Buffer) -> None:
        assert source.nbytes == target.nbytes, (source, target)
        kind = cuda().cudaMemcpyKind.cudaMemcpyDeviceToDevice
        call("cudaMemcpyAsync", target.address, source.address, source.nbytes, kind, self._stream)

    def gather_frames(self, clip: Buffer, frames: Sequence[int], target: Buffer) -> None:
        channels, total = clip.shape[:2]
        size = clip.nbytes // channels // total  # bytes of a channel of a frame
        kind = cuda().cudaMemcpyKind.cudaMemcpyDeviceToDevice
        for index, frame in enumerate(frames):
            to, origin = target.address + index * channels * size, clip.address + frame * size
            call("cudaMemcpy2DAsync", to, size, origin, total * size, size, channels, kind, self._stream)

    def read_back(self, buffer: Buffer) -> ReadBack:
        return _PinnedReadBack(self, buffer)

    def capture(self, body: Work) -> Work:
        body()  # libraries initialise themselves in their first run, which a capture could not record
        self.synchronize()
        try:
            call("cudaStreamBeginCapture", self._stream, cuda().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
            try:
                body()
            finally:
                recorded = call("cudaStreamEndCapture", self._stream)
            try:
                graph = call("cudaGraphInstantiate", recorded, 0)
            finally:
                call("cudaGraphDestroy", recorded)
        except EngineError as error:
            reason = str(error).partition(";")[0]
            raise InputError(
                f"cuda: the step cannot be replayed as a CUDA graph ({reason}); pass EngineOptions(cuda_graph=False) or"
                " --no-cuda-graph"
            ) from error
        self._graphs.append(graph)
        return lambda: call("cudaGraphLaunch", graph, self._stream)

    def pace(self) -> None:
        self._events.append(self.record())
        if len(self._events) > 2:
            oldest = self._events.popleft()
            call("cudaEventSynchronize", oldest)
            call("cudaEventDestroy", oldest)

    def record(self) -> Any:
        """An event at this point of the stream; the caller destroys it."""
        event = call("cudaEventCreateWithFlags", cuda().cudaEventDisableTiming)
        call("cudaEventRecord", event, self._stream)
        return event

    def synchronize(self) -> None:
        """Wait for all work."""
        call("cudaStreamSynchronize", self._stream)

    def pinned(self, size: int) -> int:
        """The address of `size` bytes of page-locked host memory, freed with the device."""
        address: int = call("cudaMallocHost", size)
        self._pinned.append(address)
        return address

    def kernel(self, cubin: bytes, entry: str, shared_bytes: int) -> Any:
        """The function `entry` of machine code, ready for `launch`; EngineError where the driver does not take it."""
        module = call("cuModuleLoadData", cubin)
        self._modules.append(module)
        function = call("cuModuleGetFunction", module, entry.encode())
        if shared_bytes > 48 << 10:  # what a kernel may have without asking
            call(
                "cuFuncSetAttribute",
                function,
                driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                shared_bytes,
            )
        return function

    def launch(
        self,
        function: Any,
        programs: int,
        warps: int,
        shared_bytes: int,
        arguments: Sequence[int],
        types: Sequence[Any],
    ) -> None:
        """Queue a kernel of `programs` programs in one dimension; `types` are ctypes of the arguments' exact widths."""
        call(
            "cuLaunchKernel",
            function,
            programs,
            1,
            1,
            32 * warps,
            1,
            1,
            shared_bytes,
            self.stream,
            (tuple(arguments), tuple(types)),
            0,
        )

    def close(self) -> None:
        # Results are not looked at: after a lost CUDA context nothing can be freed, and the driver does it when the
        # process ends.
        if self._stream is None:
            return
        cuda().cudaStreamSynchronize(self._stream)
        while self._graphs:
            cuda().cudaGraphExecDestroy(self._graphs.pop())
        while self._modules:
            driver().cuModuleUnload(self._modules.pop())
        while self._events:
            cuda().cudaEventDestroy(self._events.pop())
        while self._device:
            cuda().cudaFree(self._device.pop())
        while self._pinned:
            cuda().cudaFreeHost(self._pinned.pop())
        cuda().cudaStreamDestroy(self._stream)
        self._stream = None


class _PinnedReadBack(ReadBack):
    """Two page-locked slots: while the host has one, the GPU fills the other."""

    depth = 2

    def __init__(self, device: CudaDevice, buffer: Buffer):
        self._device, self._buffer = device, buffer
        self._slots = [self._slot() for _ in range(self.depth)]
        self._next = 0
        self._waiting: deque[tuple[Any, NDArray[Any]]] = deque()

    def _slot(self) -> NDArray[Any]:
        memory: Any = (ctypes.c_char * self._buffer.nbytes).from_address(self._device.pinned(self._buffer.nbytes))
        return np.frombuffer(memory, self._buffer.dtype).reshape(self._buffer.shape)

    def put(self) -> None:
        assert len(self._waiting) < self.depth, "both slots are taken"
        slot, self._next = self._slots[self._next], (self._next + 1) % self.depth
        kind = cuda().cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("cudaMemcpyAsync", slot.ctypes.data, self._buffer.address, self._buffer.nbytes, kind, self._device.stream)
        self._waiting.append((self._device.record(), slot))

    def take(self) -> NDArray[Any]:
        event, slot = self._waiting.popleft()
        call("cudaEventSynchronize", event)
        call("cudaEventDestroy", event)
        return slot.copy()

    def drop(self) -> None:
        while self._waiting:
            self.take()


def gpu() -> tuple[str, str]:
    """Name and compute capability ("9.0") of the GPU in use; InputError where there is none, or no driver recent
    enough."""
    runtime = cuda()
    error, count = runtime.cudaGetDeviceCount()
    if error != runtime.cudaError_t.cudaSuccess or not count:
        found = _message(error) if error != runtime.cudaError_t.cudaSuccess else "no device"
        raise InputError(
            f"cuda: found no usable GPU ({found}), expected an NVIDIA GPU; install or update its driver, or use another"
            " backend"
        )
    properties = call("cudaGetDeviceProperties", call("cudaGetDevice"))
    return properties.name.decode(errors="replace"), f"{properties.major}.{properties.minor}"


def cuda() -> Any:
    """cuda-bindings' runtime functions; InputError where the package is not installed."""
    return _module("cuda.bindings.runtime")


def driver() -> Any:
    """cuda-bindings' driver functions."""
    return _module("cuda.bindings.driver")


def _module(name: str) -> Any:
    try:
        return import_library(name)
    except ImportError as error:
        raise InputError(
            "cuda: found no cuda-bindings, expected them for work on a GPU; pip install trip-rt[gpu]"
        ) from error


def call(name: str, *arguments: Any) -> Any:
    """The value of a CUDA function, the runtime's (cuda…) or the driver's (cu…); InputError where memory ran out,
    EngineError for other failures."""
    of_driver = not name.startswith("cuda")
    library = driver() if of_driver else cuda()
    error, *values = getattr(library, name)(*arguments)
    good, no_memory = (
        (library.CUresult.CUDA_SUCCESS, library.CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        if of_driver
        else (library.cudaError_t.cudaSuccess, library.cudaError_t.cudaErrorMemoryAllocation)
    )
    if error == no_memory:
        cuda().cudaGetLastError()  # forgotten, or the next library's call reports it as its own
        raise memory_error(name)
    if error != good:
        raise EngineError(
            f"{name} failed ({_message(error)}); start the process again, as the GPU's context may be lost"
        )
    return values[0] if values else None


def _message(error: Any) -> str:
    if type(error).__name__ == "CUresult":  # the driver's, whose own words say no more
        return str(error.name)
    text: bytes = cuda().cudaGetErrorString(error)[1]
    return text.decode(errors="replace")


def memory_error(where: str) -> InputError:
    """What to say where the GPU's memory ran out."""
    return InputError(
        f"cuda: found too little memory ({where}), expected room for the engine; close what else uses the GPU or take a"
        " smaller profile"
    )
