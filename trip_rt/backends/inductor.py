"""AOTInductor: native code compiled from the PyTorch model by `trip-export`, run by torch's library. The one backend that needs torch."""

from __future__ import annotations

import contextlib
import platform
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt.backends.base import Device, Engine, EngineOptions
from trip_rt.errors import EngineError, InputError
from trip_rt.manifest import EngineSpec

# All that a package may hold: the library, its kernels for a GPU, descriptions, and the marks of the format. torch's own loaders would also take
# generated C++ (and compile it by the commands written beside it) and, from Python, pickles (and run what is in them).
_MEMBERS = re.compile(
    r"engine/(data/aotinductor/model/\w+(\.\w+)*\.(so|json|cubin)|archive_format|archive_version|byteorder|\.data/(version|serialization_id))",
    re.ASCII,
)


class InductorEngine(Engine):
    """One package, loaded into this process.

    What is safe: nothing is unpickled, no command is run, no file is written but under a new temporary folder, and that is gone once the library is
    loaded. What is not: the library is native code and does what it likes with the rights of this process, which no check here can prevent. So
    `auto` never takes this backend; ask for it by name, for bundles whose maker you trust.

    torch has one number of threads for all of a process: `options.threads` holds during a call, then the former number is put back.
    """

    backend = "inductor"

    def __init__(self, spec: EngineSpec, library: Any, loader: Any, device: Device, options: EngineOptions):
        super().__init__(spec)
        self._torch, self._loader, self._device, self._threads = library, loader, device, options.threads
        # Fixed addresses, as a CUDA graph needs. On a CPU `to` makes no copy: the engine reads where the caller's arrays are written.
        self._host = {t.name: library.zeros(t.shape, dtype=getattr(library, t.dtype), pin_memory=device == "cuda") for t in spec.inputs}
        self._inputs = [buffer.to(device) for buffer in self._host.values()]
        self._graph: Any = None
        self._outputs: list[Any] = []
        if device == "cuda":
            with library.no_grad(), full_fp32(library):
                self._warm_up(options.cuda_graph)

    @classmethod
    def probe(cls, spec: EngineSpec, options: EngineOptions) -> Device:
        device: Device = "cuda" if spec.target.get("device") == "cuda" else "cpu"
        if options.device not in ("auto", device):
            asked = options.device
            raise InputError(f"inductor: found that {asked} was asked for, the engine was compiled for {device}; export it for {asked}")
        torch = _library()
        again = "export the bundle again on a machine like this one"
        _same("torch", torch.__version__.split("+")[0], spec, f"pip install torch=={spec.target.get('torch')}")
        _same("machine", platform.machine(), spec, again)
        if device == "cpu":
            supported = torch.cpu.get_capabilities()
            if missing := [name for name in spec.target.get("cpu", "").split() if not supported.get(name)]:
                raise InputError(f"inductor: found a CPU without {', '.join(missing)}, the engine was compiled for one with it; {again}")
            return device
        if not torch.cuda.is_available():
            raise InputError("inductor: found no GPU that torch can use, the engine was compiled for one; install a driver and torch with CUDA")
        _same("cuda", str(torch.version.cuda).split(".")[0], spec, "install torch for that CUDA")
        _same("compute_capability", ".".join(map(str, torch.cuda.get_device_capability())), spec, again)
        return device

    @classmethod
    def open(cls, path: Path, spec: EngineSpec, options: EngineOptions) -> InductorEngine:
        device = cls.probe(spec, options)
        torch = _library()
        with tempfile.TemporaryDirectory(prefix="trip-") as folder:
            _unpack(path, Path(folder))
            try:
                # Of a folder; torch's own unpacking of a .pt2 follows its members' names wherever they lead. Single-threaded for CUDA graphs.
                loader = torch._C._aoti.AOTIModelPackageLoader(folder, "model", True, 1, -1)
                return cls(spec, torch, loader, device, options)
            except RuntimeError as error:
                why = " ".join(str(error).split())[:200]
                raise InputError(f"{path}: torch cannot load it ({why}); export the bundle again, or set TMPDIR to where code may run") from error

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self._loader is None:
            raise self._closed()
        for name, buffer in self._host.items():
            np.copyto(buffer.numpy(), inputs[name])
        try:
            with self._torch.no_grad(), _threads(self._torch, self._threads):
                # Copied on a CPU too: an output may be a view of an input's buffer.
                outputs = [np.array(value.cpu().numpy(), order="C") for value in self._call()]
        except RuntimeError as error:
            raise EngineError(f"{self.spec.file}: failed while it ran ({' '.join(str(error).split())[:200]}); export the bundle again") from error
        return dict(zip((tensor.name for tensor in self.spec.outputs), outputs, strict=True))

    def _call(self) -> list[Any]:
        if self._device == "cpu":
            return list(self._loader.run(self._inputs))
        for buffer, host in zip(self._inputs, self._host.values(), strict=True):
            buffer.copy_(host)
        if self._graph is not None:
            self._graph.replay()
            return self._outputs
        with full_fp32(self._torch):
            return list(self._loader.run(self._inputs))

    def _warm_up(self, cuda_graph: bool) -> None:
        """Run once, which loads the kernels from their files; then record a run as the graph that `_call` replays."""
        stream = self._torch.cuda.Stream()
        stream.wait_stream(self._torch.cuda.current_stream())
        with self._torch.cuda.stream(stream):
            self._loader.run(self._inputs)
        self._torch.cuda.synchronize()
        if cuda_graph:
            self._graph = self._torch.cuda.CUDAGraph()
            with self._torch.cuda.graph(self._graph):
                self._outputs = self._loader.run(self._inputs)

    def describe(self) -> dict[str, Any]:
        return {"backend": self.backend, "version": self._torch.__version__, "device": self._device}

    def close(self) -> None:
        self._graph = self._loader = None
        self._host, self._inputs, self._outputs = {}, [], []


def _same(name: str, found: str, spec: EngineSpec, remedy: str) -> None:
    if found != (expected := spec.target.get(name)):
        raise InputError(f"inductor: found {name.replace('_', ' ')} {found}, the engine was compiled for {expected}; {remedy}")


def _unpack(path: Path, folder: Path) -> None:
    """The package's members into `folder`; InputError where one is not of a name that `trip-export` writes."""
    try:
        with zipfile.ZipFile(path) as package:
            names = package.namelist()
            if strange := next((name for name in names if not _MEMBERS.fullmatch(name)), None):
                raise InputError(f"{path}: found {strange[:100]!r} inside, which no engine holds; do not use this bundle, export it again")
            if sum(name.endswith(".so") for name in names) != 1:
                raise InputError(f"{path}: found {len(names)} members and not one library among them; export the bundle again")
            package.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted, or compressed in an unknown way
        raise InputError(f"{path}: damaged, it is not a package of AOTInductor; export the bundle again") from error


@contextlib.contextmanager
def full_fp32(torch: Any) -> Iterator[None]:
    """fp32 means fp32 on a GPU: no TF32, which cuDNN would otherwise use. A setting of the process, put back afterwards."""
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
        import torch  # noqa: TID251  (this backend alone runs on torch, and only once it is asked for)
    except ImportError as error:
        raise InputError("inductor: the package torch is not installed; pip install torch") from error
    return torch
