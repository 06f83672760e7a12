"""Building plans without a builder: Polygraphy's own classes on TensorRT's own enums, and our logic around a build that
is a stand-in, named so."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
from onnx import helper
from plan_target import TARGET
from small_graphs import BF16, FP16, saved

from trip_engines import tensorrt_build as build
from trip_engines.tensorrt_build import BuildOptions, build_engine, check_precisions, explain, layer_precisions
from trip_rt.backends.tensorrt import Machine
from trip_rt.errors import InputError


def test_polygraphy_takes_what_it_is_given(tmp_path: Path) -> None:
    lean = pytest.importorskip("tensorrt_lean_bindings")
    pytest.importorskip("polygraphy")
    cache = tmp_path / "timing.cache"
    options = BuildOptions(4, 5, cache, version_compatible=True, hardware_compatibility="ampere_plus", refittable=True)
    loader = build._loader(
        lean, tmp_path / "unet.onnx", options, None
    )  # Polygraphy's own constructors bind the arguments
    config, network = loader._config, loader._network
    assert network.path == str(tmp_path / "unet.onnx") and network.strongly_typed
    assert loader.timing_cache_path == str(cache) and config.timing_cache_path is None  # not there yet
    assert (
        config.memory_pool_limits == {lean.MemoryPoolType.WORKSPACE: 4 << 30} and config.builder_optimization_level == 5
    )
    assert config.version_compatible and config.exclude_lean_runtime and config.refittable
    assert config.hardware_compatibility_level == lean.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config.profiling_verbosity == lean.ProfilingVerbosity.DETAILED
    assert not (config.fp16 or config.bf16 or config.int8 or config.fp8 or config.tf32)
    cache.touch()
    assert build._loader(lean, tmp_path / "unet.onnx", options, None)._config.timing_cache_path == str(cache)
    assert (
        build._loader(lean, tmp_path / "unet.onnx", BuildOptions(), None)._config.hardware_compatibility_level is None
    )


class RecordingBuilder:
    """A recording stand-in for TensorRT's builder, its config and a network without dynamic shapes: notes flags and
    properties."""

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
    monkeypatch.setattr(
        pytest.importorskip("polygraphy.backend.trt.config"), "trt", lean
    )  # Polygraphy's code on TensorRT 11's own enums
    plain, compatible = RecordingBuilder(), RecordingBuilder()
    build._loader(lean, tmp_path / "unet.onnx", BuildOptions(), "monitor")._config(plain, plain)
    assert plain.flags == set() and plain.cleared == {lean.BuilderFlag.TF32}
    assert (
        plain.workspace == (lean.MemoryPoolType.WORKSPACE, 8 << 30)
        and plain.progress_monitor == "monitor"
        and plain.builder_optimization_level == 3
    )
    build._loader(lean, tmp_path / "unet.onnx", BuildOptions(version_compatible=True, refittable=True), None)._config(
        compatible, compatible
    )
    assert {flag.name for flag in compatible.flags} == {"REFIT", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}
    assert not hasattr(lean.BuilderFlag, "FP16")  # as the release notes of 11.0 say


def test_every_compatibility_that_can_be_asked_for_is_tensorrts(tmp_path: Path) -> None:
    lean = pytest.importorskip("tensorrt_lean_bindings")
    pytest.importorskip("polygraphy")
    for name in get_args(get_type_hints(BuildOptions)["hardware_compatibility"]):
        config = build._loader(lean, tmp_path / "a.onnx", BuildOptions(hardware_compatibility=name), None)._config
        level = lean.HardwareCompatibilityLevel.__members__[name.upper()]
        assert config.hardware_compatibility_level == (None if name == "none" else level)


def test_a_plan_is_opened_again_and_its_layers_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By stand-ins of these names, which are TensorRT's; the inspector's own is in the full package alone."""
    lean = pytest.importorskip("tensorrt_lean_bindings")
    assert hasattr(lean.Runtime, "deserialize_cuda_engine") and hasattr(lean.ICudaEngine, "create_engine_inspector")
    told: list[Any] = []
    inspector = SimpleNamespace(get_engine_information=lambda form: told.append(form) or MIXED)
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    plans = {b"a plan": engine, b"another's": None}
    trt = SimpleNamespace(
        LayerInformationFormat=lean.LayerInformationFormat,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=plans.__getitem__),
    )
    monkeypatch.setattr(build, "_polygraphy", lambda: SimpleNamespace(get_trt_logger=lambda: "logger"))
    monkeypatch.setattr(build, "_loader", lambda *_: lambda: b"a plan")
    assert build._build(trt, tmp_path / "a.onnx", BuildOptions(), None) == (b"a plan", {"FP16": 2, "FP32": 1})
    assert told == [lean.LayerInformationFormat.JSON]
    monkeypatch.setattr(build, "_loader", lambda *_: lambda: b"another's")
    with pytest.raises(RuntimeError, match="does not open again"):
        build._build(trt, tmp_path / "a.onnx", BuildOptions(), None)


def test_a_level_that_this_tensorrt_lacks_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    old = SimpleNamespace(__version__="10.13.0.35", HardwareCompatibilityLevel=SimpleNamespace(NONE=0, AMPERE_PLUS=1))
    with pytest.raises(
        InputError, match=r"10.13.0.35 knows no hardware compatibility same_compute_capability; install a newer"
    ):
        build._loader(old, tmp_path / "a.onnx", BuildOptions(hardware_compatibility="same_compute_capability"), None)


@pytest.mark.parametrize(
    "options",
    [{"workspace_gb": 0}, {"workspace_gb": float("nan")}, {"optimization_level": 6}, {"optimization_level": -1}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        BuildOptions(**options)


def test_a_builder_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0.34"))
    with pytest.raises(InputError, match=r"found 10.9.0.34, expected 10.13 or newer; pip install --upgrade tensorrt"):
        build._builder()


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As if a builder of the run-time package's version and a GPU were here; what builds is each test's own stand-in.
    Returns the package."""
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


def test_a_build_saves_the_plan_and_tells_its_precision(
    on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graph, notes = saved(tmp_path, [helper.make_node("MatMul", ["a", "a"], ["y"])], FP16), []
    monkeypatch.setattr(build, "_build", lambda *_: (memoryview(b"a plan"), layer_precisions(MIXED)))
    options = BuildOptions(timing_cache=tmp_path / "cache" / "timing")
    assert build_engine(graph, tmp_path / "a.plan", options, notes.append) == build.target(options)
    assert (tmp_path / "a.plan").read_bytes() == b"a plan" and (tmp_path / "cache").is_dir()
    assert notes == ["graph.onnx: convolutions and matrix products: 2 in FP16, 1 in FP32"]


def test_a_half_precision_graph_silently_built_in_fp32_fails(
    on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graph = saved(tmp_path, [helper.make_node("MatMul", ["a", "a"], ["y"])], BF16)
    monkeypatch.setattr(build, "_build", lambda *_: (b"a plan", layer_precisions(SINGLE)))
    with pytest.raises(
        InputError, match=r"^graph.onnx: found an engine silently built in FP32, expected BF16 as declared; "
    ):
        build_engine(graph, tmp_path / "a.plan", BuildOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]


def test_an_error_leaves_the_former_plan_and_prints_nothing(
    on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = pytest.importorskip("polygraphy.logger").G_LOGGER
    monkeypatch.setattr("polygraphy.logger.logger.COLORED_MODULE_PRESENT", None)  # as in a new process

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
def test_ctrl_c_stops_the_build_at_its_next_step(
    on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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

    assert {name for name in vars(build._Progress) if not name.startswith("_")} <= set(dir(lean.IProgressMonitor))
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
            [
                (
                    "[E] In node 12 with name: node_x and operator: Unique (parseNode): UNSUPPORTED_NODE: Assertion"
                    " failed: creator"
                ),
                "[!] Could not parse",
            ],
            "does not support Unique; install a newer TensorRT",
        ),
        (
            [
                "[E] No importer registered for op: Det. Attempting to import as plugin.",
                "[E] getPluginCreator could not find",
            ],
            "does not support Det;",
        ),
        (
            ["[E] Error Code 2: OutOfMemory (Requested size was 123 bytes.)", "[!] Invalid Engine."],
            "ran out of memory; close what else",
        ),
        (["[E] [defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)"], "ran out of memory"),
        (["std::bad_alloc"], "ran out of memory"),
        (
            ["[E] Error Code 10: Could not find any implementation for node n due to insufficient workspace."],
            "too little workspace",
        ),
        (
            ["[E] createInferBuilder: Error Code 6: API Usage Error (CUDA initialization failure with error: 35)"],
            "found no usable GPU",
        ),
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

    return {
        "Name": kind,
        "LayerType": kind,
        "Inputs": tensors(inputs),
        "Outputs": tensors(outputs),
        "StreamId": 0,
    } | more


def _inspected(*layers: Any) -> str:
    return json.dumps({"Layers": layers, "Bindings": ["x", "y"]})


REFORMAT = _layer("Reformat", ["Float"], ["Half"], Origin="REFORMAT", TacticValue="0x00000000000003e8")
MIXED = _inspected(
    REFORMAT,
    _layer(
        "CaskConvolution",
        ["Half"],
        ["Half"],
        Weights={"Type": "Half", "Count": 9408},
        TacticName="sm80_xmma_fprop_implicit_gemm_f16f16",
    ),
    _layer("kgen", ["Half", "Float"], ["Float"], TacticName="__myl_CastMeanSub"),
    _layer("gemm", ["Half", "Half", "Float", "Float"], ["Half"], TacticName="sm90_xmma_gemm_f16f16"),
    _layer("gemm", ["Float", "Float"], ["Float"], TacticName="sm80_xmma_gemm_f32f32"),
)
SINGLE = _inspected(
    REFORMAT,
    _layer("gemm", ["Float", "Float"], ["Half"]),
    _layer("kgen", ["Half"], ["Float"], TacticName="__myl_Cast"),
    "a bare name",
)


@pytest.mark.parametrize(
    ("information", "counts"),
    [
        (MIXED, {"FP16": 2, "FP32": 1}),
        (SINGLE, {"FP32": 1}),
        (_inspected(_layer("CaskConvolution", ["BFloat16"], ["BFloat16"])), {"BF16": 1}),
        (
            _inspected(
                _layer(
                    "CaskConvolution",
                    ["Row major linear FP16 format"],
                    ["Channel major FP16 format where channel % 8 == 0"],
                )
            ),
            {"FP16": 1},
        ),
        (_inspected(_layer("CaskConvolution", ["Half(64,1:8,...)"], [])), {"FP16": 1}),
        (
            _inspected(
                _layer("CaskConvolution", ["N/A due to dynamic shapes"], [], Weights={"Type": "Half", "Count": 1})
            ),
            {"FP16": 1},
        ),
        (
            _inspected({"LayerType": "kgen", "TacticName": "_gemm_mha_v2_0x1", "Inputs": [{"Datatype": "Half"}]}),
            {"FP16": 1},
        ),
        (_inspected({"LayerType": "gemm", "Outputs": [{"Format/Datatype": "Float"}]}), {"FP32": 1}),
        (
            _inspected(_layer("kgen", ["Half"], ["Half"]), _layer("kgen", ["Int64"], ["Bool"])),
            {"FP16": 1},
        ),  # no product: all else is counted
        (
            (
                '{"Layers": [{"LayerType": "gemm", "Metadata": "[ONNX Layer: a]\x1f[ONNX Layer: b]", "Inputs":'
                ' [{"Format/Datatype": "Half"}]}]}'
            ),
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
    for declared, found in (
        ({"FP16"}, {"FP32": 9}),
        ({"BF16", "FP32"}, {"FP16": 1, "FP32": 2}),
        ({"FP16"}, {"FP16": 0, "FP32": 1}),
    ):
        with pytest.raises(InputError, match="silently built"):
            check_precisions(declared, found, "a")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(InputError, match=r"found no builder, .*pip install tensorrt$"):
        build._builder()
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt", None)
    with pytest.raises(InputError, match=r"found no Polygraphy, .*pip install polygraphy"):
        build._polygraphy()
