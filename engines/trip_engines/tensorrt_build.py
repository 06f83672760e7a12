"""A TensorRT plan from an ONNX file, built by Polygraphy on the machine and GPU that it is for.

The graph's own types are the plan's precision. The network is strongly typed, which TensorRT 11's always are; its
BuilderFlag lost FP16 and BF16, and Polygraphy's CreateConfig reads those only where it is asked for them, which is
never here. So one path serves 10.13 and 11.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from trip_engines.tensorrt_operators import contraction_precisions
from trip_rt.backends.tensorrt import OUT_OF_MEMORY, this_machine, version_numbers
from trip_rt.errors import InputError
from trip_rt.files import whole_file

OLDEST = (10, 13)
_CONTRACTION = re.compile(r"conv|fprop|gemm|matmul|matrixmultiply|einsum|mha", re.IGNORECASE)
_PRECISIONS = {
    "FP16": re.compile(r"\bhalf\b|fp16"),
    "BF16": re.compile(r"bfloat16|bf16"),
    "FP32": re.compile(r"\bfloat\b|fp32|\bfloat32"),
}


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build, besides the graph itself; InputError where a number is out of range.

    `workspace_gb` (GiB) caps one layer's scratch memory: uncapped, a UNet with temporal layers can run the builder out
    of memory. `optimization_level` is 0 (quick) to 5 (thorough). `timing_cache` is a file of measured kernels, read and
    extended by builds, good for one TensorRT version and GPU. `version_compatible` plans open with later versions of
    the same major and with the lean runtime, `hardware_compatibility` frees them from the exact GPU, both at some cost
    in speed; `refittable` plans can take new weights.
    """

    workspace_gb: float = 8.0
    optimization_level: int = 3
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    refittable: bool = False

    def __post_init__(self) -> None:
        if not self.workspace_gb > 0:
            raise InputError(f"workspace: found {self.workspace_gb} GiB, expected more than 0; leave it out for 8")
        if not 0 <= self.optimization_level <= 5:
            raise InputError(
                f"optimization level: found {self.optimization_level}, expected 0 to 5; leave it out for 3"
            )


def build_engine(
    graph: Path, plan: Path, options: BuildOptions, note: Callable[[str], None] = lambda line: None
) -> dict[str, str]:
    """Build `plan` from the ONNX file `graph` (weights may lie in files beside it) and return what the manifest's
    EngineSpec.target says of it.

    `note` is told, in one line, in which precisions it computes. InputError where TensorRT or this machine cannot, or
    where the engine lost a half precision that the graph declares; KeyboardInterrupt after Ctrl-C, once the builder has
    stopped at its next step. Then no plan is left behind.
    """
    trt = _builder()
    built_for = target(options)
    if options.timing_cache:
        options.timing_cache.parent.mkdir(parents=True, exist_ok=True)
    cancelled = threading.Event()
    with (
        tqdm(desc=f"build {plan.name}", unit="step", disable=None, leave=False) as bar,
        _polygraphy_errors() as errors,
        # Ctrl-C reaches only the main thread. It waits here, and tells the builder's thread through `cancelled`.
        ThreadPoolExecutor(1) as pool,
    ):
        try:
            data, precisions = pool.submit(_build, trt, graph, options, _monitor(trt, bar, cancelled)).result()
        except KeyboardInterrupt:  # even while the thread is being started
            cancelled.set()
            raise
        except InputError:
            raise
        except Exception as error:  # Polygraphy's own, and pybind11's TypeError and MemoryError
            raise explain([*errors, str(error)], graph) from error
    note(check_precisions(contraction_precisions(graph), precisions, graph.name))
    with whole_file(plan) as part:
        part.write_bytes(data)
    return built_for


def target(options: BuildOptions) -> dict[str, str]:
    """The target of a plan built here and now, without building it; InputError without a GPU or a builder."""
    here = this_machine(_builder())
    return {
        "tensorrt": here.tensorrt,
        "gpu": here.gpu,
        "compute_capability": here.compute_capability,
        "platform": here.platform,
        "version_compatible": "yes" if options.version_compatible else "no",
        "hardware_compatibility": options.hardware_compatibility,
    }


def cache_key(options: BuildOptions) -> dict[str, str]:
    """All that a plan depends on besides its graph and the timing cache, to be hashed with the graph."""
    build = {
        "workspace_gb": options.workspace_gb,
        "optimization_level": options.optimization_level,
        "refittable": options.refittable,
    }
    return target(options) | {name: str(value) for name, value in build.items()}


def layer_precisions(information: str) -> Counter[str]:
    """How many layers compute in FP32, FP16 and BF16, from the engine inspector's JSON at detailed verbosity.

    A layer's precision is the narrowest that it reads. Convolutions and matrix products are counted; where no layer is
    known as one, all but reformats and constants. Empty where the JSON says nothing of types.
    """
    try:
        # Not strict: TensorRT separates the names in Metadata by control characters.
        layers = json.loads(information, strict=False)["Layers"]
    except (ValueError, KeyError, TypeError):
        return Counter()
    detailed = [
        layer
        for layer in layers
        if isinstance(layer, dict) and layer.get("LayerType") not in ("Reformat", "NoOp", "Constant")
    ]
    contractions = [
        layer for layer in detailed if _CONTRACTION.search(f"{layer.get('LayerType')} {layer.get('TacticName')}")
    ]
    return Counter(precision for layer in contractions or detailed if (precision := _precision(layer)))


def check_precisions(declared: set[str], found: Mapping[str, int], name: str) -> str:
    """What to tell of an engine's precisions; InputError where a half precision in which the graph `name` declares
    products is in no layer."""
    if not found:
        return (
            f"{name}: TensorRT tells no layer's type, so whether it kept {', '.join(sorted(declared))} shows in speed"
            " and parity only"
        )
    if lost := sorted(declared - {"FP32"} - {precision for precision, count in found.items() if count}):
        used = ", ".join(sorted(found))
        raise InputError(
            f"{name}: found an engine silently built in {used}, expected {', '.join(lost)} as declared; use another"
            " TensorRT or export fp32"
        )
    return f"{name}: convolutions and matrix products: " + ", ".join(
        f"{count} in {precision}" for precision, count in sorted(found.items())
    )


def explain(errors: Sequence[str], graph: Path) -> InputError:
    """One line for a person, from the messages of a failed build."""
    lines = [" ".join(re.sub(r"\x1b\[[\d;]*m|^\[[A-Z!]\] ", "", error).split()) for error in errors]
    text = " ".join(lines)
    operators = sorted(set(re.findall(r"(?:operator|registered for op): ?([\w:]+(?:\.\w+)*)", text)))
    if operators and re.search(r"UNSUPPORTED_(?:NODE|GRAPH)|No importer|Plugin not found|PluginCreator", text):
        return InputError(
            f"{graph}: TensorRT does not support {', '.join(operators)}; install a newer TensorRT, or export for"
            " another backend"
        )
    if re.search(r"insufficient workspace", text):
        return InputError(
            f"{graph}: TensorRT found too little workspace for a layer; allow more, or take a smaller profile"
        )
    if OUT_OF_MEMORY.search(text):
        return InputError(
            f"{graph}: TensorRT ran out of memory; close what else uses the GPU, allow less workspace, or take a"
            " smaller profile"
        )
    if re.search(r"CUDA initialization failure|CUDA driver version|no CUDA-capable device", text):
        return InputError(
            f"{graph}: TensorRT found no usable GPU, expected one with a driver for its CUDA version; update the driver"
        )
    reason = next((line for line in lines if line and not line.startswith("File ")), "it gave no reason")[:300]
    return InputError(
        f"{graph}: TensorRT cannot build it ({reason}); install another TensorRT, or export for another backend"
    )


def _build(trt: Any, graph: Path, options: BuildOptions, monitor: Any) -> tuple[Any, Counter[str]]:
    """The plan (anything with the buffer protocol) and its layers' precisions."""
    data = _loader(trt, graph, options, monitor)()
    runtime = trt.Runtime(_polygraphy().get_trt_logger())
    engine = runtime.deserialize_cuda_engine(data)  # not by Polygraphy, which would allow the plan to bring code
    if engine is None:
        raise RuntimeError("the plan does not open again")
    inspector = engine.create_engine_inspector()
    return data, layer_precisions(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _loader(trt: Any, graph: Path, options: BuildOptions, monitor: Any) -> Any:
    polygraphy, cache = _polygraphy(), options.timing_cache
    level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper(), None)
    if level is None:
        raise InputError(
            f"tensorrt: {trt.__version__} knows no hardware compatibility {options.hardware_compatibility}; install a"
            " newer TensorRT"
        )
    config = polygraphy.CreateConfig(
        profiles=[],  # ranges of dynamic shapes: ours are static
        memory_pool_limits={trt.MemoryPoolType.WORKSPACE: int(options.workspace_gb * 2**30)},
        builder_optimization_level=options.optimization_level,
        refittable=options.refittable,
        version_compatible=options.version_compatible,
        # The lean runtime is host code inside the plan, which trip_rt does not allow to run.
        exclude_lean_runtime=options.version_compatible,
        hardware_compatibility_level=None if options.hardware_compatibility == "none" else level,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,  # without it the inspector reports no types
        load_timing_cache=str(cache) if cache and cache.exists() else None,
        progress_monitor=monitor,
    )
    network = polygraphy.NetworkFromOnnxPath(str(graph), strongly_typed=True)
    return polygraphy.EngineBytesFromNetwork(network, config=config, save_timing_cache=str(cache) if cache else None)


def _monitor(trt: Any, bar: Any, cancelled: threading.Event) -> Any:
    """A trt.IProgressMonitor that moves `bar` and stops the build once `cancelled` is set."""
    return type("Monitor", (_Progress, trt.IProgressMonitor), {})(bar, cancelled)


class _Progress:
    """Counts the steps of all phases known so far: phases nest, run side by side and may end before their last step."""

    def __init__(self, bar: Any, cancelled: threading.Event):
        super().__init__()  # trt.IProgressMonitor's, which pybind11 insists on
        self._bar, self._cancelled, self._lock = bar, cancelled, threading.Lock()
        self._ended = 0
        self._phases: dict[str, tuple[int, int]] = {}  # name: steps done, steps in all

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self._move(phase_name, 0, num_steps)

    def step_complete(self, phase_name: str, step: int) -> bool:
        self._move(phase_name, step + 1)
        return not self._cancelled.is_set()

    def phase_finish(self, phase_name: str) -> None:
        with self._lock:
            self._ended += self._phases.pop(phase_name, (0, 0))[1]

    def _move(self, phase: str, done: int, total: int | None = None) -> None:
        with self._lock:
            self._phases[phase] = (done, self._phases.get(phase, (0, done))[1] if total is None else total)
            self._bar.total = self._ended + sum(total for _, total in self._phases.values())
            self._bar.set_postfix_str(phase, refresh=False)
            self._bar.update(self._ended + sum(done for done, _ in self._phases.values()) - self._bar.n)


def _precision(layer: Mapping[str, Any]) -> str | None:
    tensors = [layer.get("Weights")]
    for side in ("Inputs", "Outputs"):
        tensors += layer.get(side) or []
        types = " ".join(
            str(item.get(key, ""))
            for item in tensors
            if isinstance(item, dict)
            for key in ("Format/Datatype", "Datatype", "Type")
        )
        if found := next((name for name, pattern in _PRECISIONS.items() if pattern.search(types.lower())), None):
            return found  # outputs only where the inputs tell nothing: they may already be cast
    return None


@contextmanager
def _polygraphy_errors() -> Iterator[list[str]]:
    """The errors that Polygraphy and TensorRT report meanwhile; nothing of theirs is printed."""
    _polygraphy()
    polygraphy_log = importlib.import_module("polygraphy.logger").G_LOGGER
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("Polygraphy")
    before = (polygraphy_log.use_python_logging_system, polygraphy_log.colors, log.propagate)
    polygraphy_log.use_python_logging_system, log.propagate = True, False
    polygraphy_log.colors = False  # without the package that makes them it complains on stdout
    log.addHandler(handler)
    try:
        with polygraphy_log.verbosity(polygraphy_log.ERROR):
            yield errors
    finally:
        log.removeHandler(handler)
        polygraphy_log.use_python_logging_system, polygraphy_log.colors, log.propagate = before


def _polygraphy() -> Any:
    try:
        return importlib.import_module("polygraphy.backend.trt")
    except ImportError as error:
        raise InputError(
            "tensorrt: found no Polygraphy, expected it for building plans; pip install polygraphy"
        ) from error


def _builder() -> Any:
    try:
        trt: Any = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise InputError(
            "tensorrt: found no builder, expected the full package (the lean runtime cannot build); pip install"
            " tensorrt"
        ) from error
    if version_numbers(trt.__version__) < OLDEST:
        raise InputError(f"tensorrt: found {trt.__version__}, expected 10.13 or newer; pip install --upgrade tensorrt")
    return trt
