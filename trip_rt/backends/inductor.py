"""AOTInductor: native code compiled from the PyTorch model by `trip-export`, run by torch's library. The one backend
that needs torch."""

from __future__ import annotations

import contextlib
import platform
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trip_rt.backends.base import Engine, EngineOptions
from trip_rt.devices import Buffer, Device, Kind, Work, open_device
from trip_rt.errors import InputError, one_line
from trip_rt.manifest import EngineSpec
from trip_rt.signals import import_library

# All that a package may hold: the library, its kernels for a GPU, descriptions, and the marks of the format. torch's
# own loaders would also take generated C++ (and compile it by the commands written beside it) and, from Python, pickles
# (and run what is in them).
_MEMBERS = re.compile(
    r"engine/(data/aotinductor/model/\w+(\.\w+)*\.(so|json|cubin)|archive_format|archive_version|byteorder|\.data/(version|serialization_id))",
    re.ASCII,
)

_LOADS_FOLDERS = (2, 12)  # the first torch whose loader takes one


class InductorEngine(Engine):
    """One package, loaded into this process.

    What is safe: nothing is unpickled, no command is run, no file is written but under a new temporary folder, and that
    is gone once the library is loaded. What is not: the library is native code and does what it likes with the rights
    of this process, which no check here can prevent. So `auto` never takes this backend; ask for it by name, for
    bundles whose maker you trust.

    torch has one number of threads for all of a process: `options.threads` holds during a call, then the former number
    is put back.
    """

    backend = "inductor"
    capturable = True

    def __init__(
        self, spec: EngineSpec, library: Any, loader: Any, device: Device, options: EngineOptions, owns_device: bool
    ):
        super().__init__(spec, device, owns_device)
        self._torch, self._loader, self._threads = library, loader, options.threads

    @classmethod
    def probe(cls, spec: EngineSpec, options: EngineOptions) -> Kind:
        device: Kind = "cuda" if spec.target.get("device") == "cuda" else "cpu"
        if options.device not in ("auto", device):
            asked = options.device
            raise InputError(
                f"inductor: found that {asked} was asked for, the engine was compiled for {device}; export it for"
                f" {asked}"
            )
        torch = _library()
        again = "export the bundle again on a machine like this one"
        _same("torch", torch.__version__.split("+")[0], spec, f"pip install torch=={spec.target.get('torch')}")
        _same("machine", platform.machine(), spec, again)
        if device == "cpu":
            supported = torch.cpu.get_capabilities()
            if missing := [name for name in spec.target.get("cpu", "").split() if not supported.get(name)]:
                raise InputError(
                    f"inductor: found a CPU without {', '.join(missing)}, the engine was compiled for one with it;"
                    f" {again}"
                )
            return device
        if not torch.cuda.is_available():
            raise InputError(
                "inductor: found no GPU that torch can use, the engine was compiled for one; install a driver and torch"
                " with CUDA"
            )
        _same("cuda", str(torch.version.cuda).split(".")[0], spec, "install torch for that CUDA")
        _same("compute_capability", ".".join(map(str, torch.cuda.get_device_capability())), spec, again)
        return device

    @classmethod
    def open(cls, path: Path, spec: EngineSpec, options: EngineOptions, device: Device | None = None) -> InductorEngine:
        kind = cls.probe(spec, options)
        torch = _library()
        with tempfile.TemporaryDirectory(prefix="trip-") as folder:
            _unpack(path, Path(folder))
            try:
                # Of a folder where this torch can: its own unpacking of a .pt2 follows its members' names wherever they
                # lead (`_unpack` has seen them all). Single-threaded for CUDA graphs.
                place = folder if _release(torch) >= _LOADS_FOLDERS else str(path)
                loader = torch._C._aoti.AOTIModelPackageLoader(place, "model", True, 1, -1)
                return cls(spec, torch, loader, device or open_device(kind), options, owns_device=device is None)
            except RuntimeError as error:
                raise InputError(
                    f"{path}: torch cannot load it ({one_line(error)}); export the bundle again, or set TMPDIR to where"
                    " code may run"
                ) from error

    def bind(self, buffers: Mapping[str, Buffer]) -> Work:
        self.check(buffers)
        torch = self._torch
        inputs = [self._tensor(buffers[tensor.name]) for tensor in self.spec.inputs]
        outputs = [self._tensor(buffers[tensor.name]) for tensor in self.spec.outputs]

        def work() -> None:
            if self._loader is None:
                raise self.closed_error()
            try:
                with torch.no_grad(), _threads(torch, self._threads), self._on_stream():
                    for output, result in zip(outputs, self._loader.run(inputs), strict=True):
                        if output.shape != result.shape:  # which copy_ would stretch
                            raise RuntimeError(f"it gave {list(result.shape)} for an output of {list(output.shape)}")
                        output.copy_(result)
            except (RuntimeError, ValueError) as error:  # ValueError: of another number of outputs
                raise self.failed(error) from error

        return work

    def capture(self, body: Work) -> Work:
        """Through torch, whose allocator then keeps the memory of the recorded work for it alone."""
        torch = self._torch
        body()  # loads the kernels from their files
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream()):
                body()
        except RuntimeError as error:
            raise InputError(
                f"{self.spec.file}: cannot be replayed as a CUDA graph ({one_line(error)}); pass"
                " EngineOptions(cuda_graph=False) or --no-cuda-graph"
            ) from error

        def replay() -> None:
            with torch.cuda.stream(self._stream()):
                graph.replay()

        return replay

    def _tensor(self, buffer: Buffer) -> Any:
        """torch's view of a buffer."""
        if buffer.array is not None:
            return self._torch.from_numpy(buffer.array)
        description = {
            "shape": buffer.shape,
            "typestr": buffer.dtype.str,
            "data": (buffer.address, False),
            "version": 3,
        }
        return self._torch.as_tensor(SimpleNamespace(__cuda_array_interface__=description), device="cuda")

    def _stream(self) -> Any:
        return self._torch.cuda.ExternalStream(self.device.stream)

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self.device.kind == "cpu":
            yield
            return
        with self._torch.cuda.stream(self._stream()), full_fp32(self._torch):
            yield

    def describe(self) -> dict[str, Any]:
        return {"backend": self.backend, "version": self._torch.__version__, "device": self.device.kind}

    def close(self) -> None:
        self._loader = None
        super().close()


def _release(torch: Any) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])


def _same(name: str, found: str, spec: EngineSpec, remedy: str) -> None:
    if found != (expected := spec.target.get(name)):
        raise InputError(
            f"inductor: found {name.replace('_', ' ')} {found}, the engine was compiled for {expected}; {remedy}"
        )


def _unpack(path: Path, folder: Path) -> None:
    """The package's members into `folder`; InputError where one is not of a name that `trip-export` writes."""
    try:
        with zipfile.ZipFile(path) as package:
            names = package.namelist()
            if strange := next((name for name in names if not _MEMBERS.fullmatch(name)), None):
                raise InputError(
                    f"{path}: found {strange[:100]!r} inside, which no engine holds; do not use this bundle, export it"
                    " again"
                )
            if sum(name.endswith(".so") for name in names) != 1:
                raise InputError(
                    f"{path}: found {len(names)} members and not one library among them; export the bundle again"
                )
            package.extractall(folder)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        RuntimeError,
    ) as error:  # RuntimeError: encrypted, or compressed in an unknown way
        raise InputError(f"{path}: damaged, it is not a package of AOTInductor; export the bundle again") from error


@contextlib.contextmanager
def full_fp32(torch: Any) -> Iterator[None]:
    """fp32 means fp32 on a GPU: no TF32, which cuDNN would otherwise use. A setting of the process, put back
    afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextlib.contextmanager
def _threads(torch: Any, count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)


def _library() -> Any:
    try:
        return import_library("torch")
    except ImportError as error:
        raise InputError("inductor: the package torch is not installed; pip install torch") from error
