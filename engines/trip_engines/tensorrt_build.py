"""TensorRT plans from an ONNX file, by either of NVIDIA's builders, each build in a process of its own.

`tensorrt` (10.13 and later) measures kernels on the GPU that the plan is for, so it builds on that machine.
`tensorrt-rtx` compiles ahead of time for the compute capabilities it is told of, on any x86-64 machine, and the GPU's
driver finishes the work at the first run. The graph's own types are the precision of both: networks are strongly typed,
which TensorRT 11's always are.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from trip_engines.tensorrt_process import member_of
from trip_rt.backends.tensorrt import PLATFORM, this_machine, version_numbers
from trip_rt.bundle import file_sha256
from trip_rt.errors import InputError
from trip_rt.files import whole_file
from trip_rt.plain_files import check_plain
from trip_rt.signals import import_library

# backend: its Python module, and the oldest version whose interface this code knows.
LIBRARIES = {"tensorrt": ("tensorrt", (10, 13)), "tensorrt-rtx": ("tensorrt_rtx", (1, 4))}
_NO_FP32_PRODUCTS = ("7.5",)  # TensorRT for RTX multiplies no fp32 matrices on Turing
_LOG_EVERY = 30  # seconds between log lines of a long build where there is no terminal


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build, besides the graph itself; InputError where a number is out of range.

    Of TensorRT for RTX: `capabilities` are the compute capabilities to build for ("8.9"; empty: all that the library
    has but 7.5), in one portable plan or, with `plan_per_gpu`, in one plan each.

    Of TensorRT: `workspace_gb` (GiB) caps one layer's scratch memory: uncapped, a UNet with temporal layers can run the
    builder out of memory. `optimization_level` is 0 (quick) to 5 (thorough). `timing_cache` is a file of measured
    kernels, read and extended by builds, good for one TensorRT version and GPU. `version_compatible` plans open with
    later versions of the same major and with the lean runtime, `hardware_compatibility` frees them from the exact GPU,
    both at some cost in speed; `refittable` plans can take new weights.
    """

    capabilities: tuple[str, ...] = ()
    plan_per_gpu: bool = False
    workspace_gb: float = 8.0
    optimization_level: int = 3
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    refittable: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.workspace_gb <= 4096:
            raise InputError(
                f"workspace: found {self.workspace_gb} GiB, expected more than 0 and at most 4096; leave it out for 8"
            )
        if self.timing_cache and os.path.lexists(self.timing_cache):
            check_plain(self.timing_cache, "a cache of measured tactics; name another file", 1 << 30)
        if not 0 <= self.optimization_level <= 5:
            raise InputError(
                f"optimization level: found {self.optimization_level}, expected 0 to 5; leave it out for 3"
            )


@dataclass(frozen=True)
class BuiltPlan:
    """One plan as it was built: the parsed network's `layers`, the plan's size, how long its build took, and how much
    memory the builder held at most. `capabilities` is empty where the plan is for the GPU here."""

    file: str
    capabilities: tuple[str, ...]
    layers: int
    bytes: int
    seconds: float
    peak_memory_gb: float


def target(backend: str, precision: str, options: BuildOptions) -> dict[str, str]:
    """The target of a plan built here and now (manifest.EngineSpec), without building it and without its graph's hash;
    InputError without a builder, without the GPU that `tensorrt` builds on, or for a capability that the library
    lacks."""
    library = _library(backend)
    if backend == "tensorrt-rtx":
        return {
            "library": library.__name__,
            "version": library.__version__,
            "compute_capabilities": " ".join(_capabilities(library, precision, options.capabilities)),
            "platform": PLATFORM,
            "plan": "per capability" if options.plan_per_gpu else "portable",
        }
    here = this_machine(library)
    return {
        "library": library.__name__,
        "version": library.__version__,
        "compute_capabilities": here.compute_capability,
        "platform": here.platform,
        "gpu": here.gpu,
        "version_compatible": "yes" if options.version_compatible else "no",
        "hardware_compatibility": options.hardware_compatibility,
    }


def cache_key(backend: str, precision: str, options: BuildOptions) -> dict[str, str]:
    """All that a plan depends on besides its graph and the timing cache, to be hashed with the graph."""
    built_for = target(backend, precision, options)
    if backend == "tensorrt-rtx":
        return built_for
    names = ("workspace_gb", "optimization_level", "refittable")
    return built_for | {name: str(getattr(options, name)) for name in names}


def build_engine(
    graph: Path,
    plan: Path,
    backend: str,
    precision: str,
    options: BuildOptions,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[list[BuiltPlan], dict[str, str]]:
    """Build `plan` from the ONNX file `graph` (weights may lie in files beside it), or one plan for each capability,
    named after it; returns them and the target that the manifest tells.

    `note` is told in one line of each plan and its precisions. InputError where the library or this machine cannot, or
    where the engine lost a half precision that the graph declares; KeyboardInterrupt at once after Ctrl-C. Then no plan
    is left behind.
    """
    built_for = target(backend, precision, options)
    if backend == "tensorrt":
        plans: dict[Path, list[str]] = {plan: []}
    else:
        capabilities = built_for["compute_capabilities"].split()
        plans = {plan: capabilities}
        if options.plan_per_gpu:
            plans = {plan.with_name(f"{plan.stem}-sm{one.replace('.', '')}.plan"): [one] for one in capabilities}
    built = []
    try:
        for path, some in plans.items():
            built.append(_build(graph, path, built_for["library"], some, options, note))
    except BaseException:
        for one in built:
            (plan.parent / one.file).unlink()
        raise
    return built, built_for | {"graph": file_sha256(graph)}


def _build(
    graph: Path,
    plan: Path,
    library: str,
    capabilities: Sequence[str],
    options: BuildOptions,
    note: Callable[[str], None],
) -> BuiltPlan:
    with whole_file(plan) as part, tempfile.TemporaryFile() as stderr:
        request = {
            "library": library,
            "graph": str(graph),
            "plan": str(part),
            "capabilities": capabilities,
            "options": asdict(options) | {"timing_cache": options.timing_cache and str(options.timing_cache)},
        }
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "trip_engines.tensorrt_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        try:
            built = _answer(process, request, plan.name, note)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe
                with contextlib.suppress(BrokenPipeError):  # what it did not read is still to be written
                    pipe.close()
        if built is None:
            stderr.seek(0)
            raise _crashed(graph, process.returncode, stderr.read().decode(errors="replace"))
        seconds, size = time.monotonic() - began, part.stat().st_size
    note(f"{plan.name}: {built['precisions']}")
    return BuiltPlan(plan.name, tuple(capabilities), built["layers"], size, round(seconds, 1), built["peak_memory_gb"])


def _answer(
    process: subprocess.Popen[str], request: dict[str, Any], name: str, note: Callable[[str], None]
) -> dict[str, Any] | None:
    """What the process says it built, shown its progress meanwhile; None where it ended without an answer."""
    assert process.stdin and process.stdout
    with tqdm(desc=f"build {name}", unit="step", disable=None, leave=False) as bar:
        with contextlib.suppress(BrokenPipeError):  # it is dead already; why shows when it is waited for
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()  # and it stays open: the process ends when it closes
        logged = time.monotonic()
        for line in process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise InputError(message["error"].replace(request["plan"], name))
            if "built" in message:
                process.wait()
                built: dict[str, Any] = message["built"]
                return built
            done, bar.total, phase = message["progress"]
            bar.set_postfix_str(phase, refresh=False)
            bar.update(done - bar.n)
            if bar.disable and time.monotonic() - logged > _LOG_EVERY:
                logged = time.monotonic()
                note(f"plan {name}: step {done} of {bar.total} so far ({phase})")
    process.wait()
    return None


def _crashed(graph: Path, code: int, stderr: str) -> InputError:
    if code == -9:
        return InputError(
            f"{graph}: TensorRT's builder was killed, most likely for memory; close other programs, or take a smaller"
            " profile"
        )
    last = next((line for line in reversed(stderr.splitlines()) if line.strip()), "it gave no reason").strip()[:200]
    return InputError(
        f"{graph}: TensorRT's builder ended with code {code} ({last}); install another version, or export for another"
        " backend"
    )


def _capabilities(trt: Any, precision: str, asked: Sequence[str]) -> list[str]:
    known = [f"{name[2:-1]}.{name[-1]}" for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    if unknown := [
        capability for capability in asked if member_of(capability) not in trt.ComputeCapability.__members__
    ]:
        raise InputError(
            f"gpus: found {', '.join(unknown)}, TensorRT for RTX {trt.__version__} builds for {', '.join(known)}; leave"
            " the others out of --gpus"
        )
    # Half-precision graphs may keep products in fp32 too, so only who asks for them gets these.
    able = [capability for capability in known if capability not in _NO_FP32_PRODUCTS]
    if unable := [capability for capability in asked if precision == "fp32" and capability not in able]:
        raise InputError(
            f"gpus: found {', '.join(unable)}, where TensorRT for RTX multiplies no {precision} matrices; leave it out"
            " of --gpus, or export with --fp16"
        )
    return list(asked) or able


def _library(backend: str) -> Any:
    module, oldest = LIBRARIES[backend]
    extra = "trip-rt[rtx]" if backend == "tensorrt-rtx" else "trip-rt[tensorrt]"
    try:
        trt: Any = import_library(module)
    except (ImportError, OSError) as error:
        raise InputError(
            f"{backend}: found no builder, expected the full package {module} (a lean runtime cannot build); pip"
            f" install {extra}"
        ) from error
    if version_numbers(trt.__version__) < oldest:
        wanted = ".".join(map(str, oldest))
        raise InputError(
            f"{backend}: found {trt.__version__}, expected {wanted} or newer; pip install --upgrade {extra}"
        )
    return trt
