"""The process in which NVIDIA's builder turns one ONNX file into one plan: `python -m trip_engines.tensorrt_process`.

A process of its own gives the builder's memory back when it ends, can be stopped at any moment, and takes nothing else
with it should the builder crash. It reads one JSON request from stdin and ends when stdin does. To stdout it writes a
JSON object a line: {"progress": [steps done, steps in all, phase]} and, last, {"built": …} or {"error": one line}.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trip_engines.tensorrt_layers import check_precisions, declared_precisions, layer_precisions
from trip_rt.backends.tensorrt import OUT_OF_MEMORY
from trip_rt.errors import InputError
from trip_rt.files import whole_file
from trip_rt.process_memory import peak_memory_mb

Tell = Callable[[Mapping[str, Any]], None]


def main() -> None:
    """Build what stdin asks for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to both; the parent stops this process
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def tell(message: Mapping[str, Any]) -> None:
        print(json.dumps(message), file=answers)

    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        tell({"built": build(request, tell)})
    except InputError as error:
        tell({"error": str(error)})
    except (MemoryError, OSError) as error:
        tell(
            {"error": f"{request['plan']}: cannot be built ({_words(str(error)) or 'out of memory'}); make room for it"}
        )


def build(request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """Build the plan and write it to the file `plan`; what was built, for people: `layers` of the network, `precisions`
    in one line, and the process's `peak_memory_gb`.

    The request's `library` is the module's name, `graph` the ONNX file, `capabilities` the compute capabilities to
    build for (empty: the GPU here), `options` a BuildOptions' fields. InputError where the builder cannot.
    """
    trt = importlib.import_module(request["library"])
    logger = _logger(trt)
    builder = trt.Builder(logger)
    if builder is None:
        raise explain(logger.errors, request["graph"])
    # Strongly typed: the graph's own types are the plan's precision. It is the only kind from 11.0 on.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["graph"]):
        raise unsupported([parser.get_error(index) for index in range(parser.num_errors)], request["graph"])
    layers, declared = network.num_layers, declared_precisions(trt, network)
    config = _config(trt, builder, request, tell)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise explain(logger.errors, request["graph"])
    found = declared if request["capabilities"] else _inspected(trt, logger, data)
    precisions = check_precisions(declared, found, Path(request["graph"]).name)
    with open(request["plan"], "wb") as file:
        file.write(data)
    _save_timing_cache(config, request["options"]["timing_cache"])
    return {"layers": layers, "precisions": precisions, "peak_memory_gb": round(peak_memory_mb() / 1e3, 2)}


def unsupported(errors: Sequence[Any], graph: str) -> InputError:
    """One line for a person, from the trt.ParserErrors of a graph that the parser did not take."""
    operators = Counter(error.node_operator() for error in errors if "UNSUPPORTED_NODE" in error.code().name)
    if not operators:
        return explain([error.desc() for error in errors], graph)
    first = next(error for error in errors if error.node_operator() in operators)
    names = ", ".join(f"{name} ({count} nodes)" if count > 1 else name for name, count in sorted(operators.items()))
    return InputError(
        f"{graph}: TensorRT does not support {names}, first at {first.node_name() or 'an unnamed node'}"
        f" ({_words(first.desc())[:150]}); install a newer TensorRT, or export for another backend"
    )


def explain(errors: Sequence[str], graph: str) -> InputError:
    """One line for a person, from the messages of a failed build."""
    lines = [_words(error) for error in errors]
    text = " ".join(lines)
    if lacking := (
        re.search(r"for \w+ \(SM(\d+)(\d)\): ([^.()]+)", text)
        or re.search(r"for target\(s\) sm(\d+)(\d)\b[^.]*?(HW-specific[^.]+)", text)
    ):
        major, minor, what = lacking.groups()
        return InputError(
            f"{graph}: TensorRT cannot build it for compute capability {major}.{minor} ({what}); leave that one out of"
            " --gpus, or export in another precision"
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
    reason = next((line for line in lines if line), "it gave no reason")[:300]
    return InputError(
        f"{graph}: TensorRT cannot build it ({reason}); install another TensorRT, or export for another backend"
    )


def _config(trt: Any, builder: Any, request: Mapping[str, Any], tell: Tell) -> Any:
    """The trt.IBuilderConfig. What TensorRT and TensorRT for RTX do not share is here, and in `tensorrt_build`."""
    options, capabilities = request["options"], request["capabilities"]
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default, and fp32 means fp32
    config.progress_monitor = _monitor(trt, tell)
    if capabilities:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else no CUDA graph can record the engine
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(trt.ComputeCapability.__members__[member_of(capability)], index)
        return config
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options["workspace_gb"] * 2**30))
    config.builder_optimization_level = options["optimization_level"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it the inspector reports no types
    if options["refittable"]:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # The lean runtime is host code inside the plan, which trip_rt does not allow to run.
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if options["hardware_compatibility"] != "none":
        level = getattr(trt.HardwareCompatibilityLevel, options["hardware_compatibility"].upper(), None)
        if level is None:
            raise InputError(
                f"tensorrt: {trt.__version__} knows no hardware compatibility {options['hardware_compatibility']};"
                " install a newer TensorRT"
            )
        config.hardware_compatibility_level = level
    if cache := options["timing_cache"]:
        known = Path(cache).read_bytes() if Path(cache).exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)
    return config


def member_of(capability: str) -> str:
    """The name in trt.ComputeCapability of "8.9": SM89."""
    return f"SM{capability.replace('.', '')}"


def _inspected(trt: Any, logger: Any, data: Any) -> Counter[str]:
    """The precisions in which the finished plan computes; it opens only where its GPU is."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(data)
    if engine is None:
        raise InputError(
            f"TensorRT cannot open its own plan ({'; '.join(logger.errors)[:200]}); install another TensorRT"
        )
    inspector = engine.create_engine_inspector()
    return layer_precisions(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _save_timing_cache(config: Any, path: str | None) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(Path(path)) as part:
            part.write_bytes(config.get_timing_cache().serialize())


def _logger(trt: Any) -> Any:
    """A trt.ILogger that prints nothing and keeps the `errors`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def _monitor(trt: Any, tell: Tell) -> Any:
    """A trt.IProgressMonitor that tells of every percent."""
    return type("Monitor", (Progress, trt.IProgressMonitor), {})(tell)


class Progress:
    """Counts the steps of all phases known so far: phases nest, run side by side and may end before their last step."""

    def __init__(self, tell: Tell):
        super().__init__()  # trt.IProgressMonitor's, which pybind11 insists on
        self._tell, self._lock = tell, threading.Lock()
        self._ended = self._told = 0
        self._phases: dict[str, tuple[int, int]] = {}  # name: steps done, steps in all

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self._move(phase_name, 0, num_steps)

    def step_complete(self, phase_name: str, step: int) -> bool:
        self._move(phase_name, step + 1)
        return True

    def phase_finish(self, phase_name: str) -> None:
        with self._lock:
            self._ended += self._phases.pop(phase_name, (0, 0))[1]

    def _move(self, phase: str, done: int, total: int | None = None) -> None:
        with self._lock:
            self._phases[phase] = (done, self._phases.get(phase, (0, done))[1] if total is None else total)
            in_all = self._ended + sum(total for _, total in self._phases.values())
            now = self._ended + sum(done for done, _ in self._phases.values())
            if total is not None or abs(now - self._told) * 100 >= in_all:
                self._told = now
                self._tell({"progress": [now, in_all, phase]})


def _words(text: str) -> str:
    return " ".join(text.split())


def _end_with_the_parent() -> None:
    sys.stdin.read()  # ends when the parent does
    os._exit(1)


if __name__ == "__main__":
    main()
