"""Plans from ONNX files by NVIDIA's own builder for RTX GPUs, which needs none; and what the full TensorRT, which does,
is asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from onnx import helper
from plan_target import TARGET
from small_graphs import FP16, FP32, initializer, saved

from trip_engines import tensorrt_build as build
from trip_engines import tensorrt_process as process
from trip_engines.tensorrt_build import BuildOptions, build_engine
from trip_engines.tensorrt_process import explain
from trip_rt.backends.tensorrt import Machine
from trip_rt.bundle import file_sha256
from trip_rt.errors import InputError

FIVE = "8.0 8.6 8.9 12.0 12.1"
ADA = BuildOptions(capabilities=("8.9",))


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx")


def product(folder: Path, dtype: int = FP16) -> Path:
    return saved(folder, [helper.make_node("MatMul", ["a", "b"], ["y"])], dtype)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_plan_serves_all_gpus_and_comes_from_the_graph_it_names(rtx: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    graph = product(tmp_path)
    (plan,), target = build_engine(graph, tmp_path / "a.plan", "tensorrt-rtx", "fp16", BuildOptions(), notes.append)
    assert target == {
        "library": "tensorrt_rtx",
        "version": rtx.__version__,
        "compute_capabilities": FIVE,
        "platform": TARGET["platform"],
        "plan": "portable",
        "graph": file_sha256(graph),
    }
    assert (plan.file, plan.capabilities, plan.layers) == ("a.plan", tuple(FIVE.split()), 1)
    assert plan.bytes == (tmp_path / "a.plan").stat().st_size > 1000 and plan.seconds > 0
    assert 0.05 < plan.peak_memory_gb < 4
    assert notes == ["a.plan: convolutions and matrix products: 1 in FP16"]
    assert files(tmp_path) == ["a.plan", "graph.onnx"]


def test_on_request_every_gpu_has_its_own_plan(rtx: Any, tmp_path: Path) -> None:
    options = BuildOptions(capabilities=("8.6", "12.0"), plan_per_gpu=True)
    plans, target = build_engine(product(tmp_path), tmp_path / "a.plan", "tensorrt-rtx", "fp16", options)
    assert [(plan.file, plan.capabilities) for plan in plans] == [
        ("a-sm86.plan", ("8.6",)),
        ("a-sm120.plan", ("12.0",)),
    ]
    assert target["plan"] == "per capability" and target["compute_capabilities"] == "8.6 12.0"
    assert files(tmp_path) == ["a-sm120.plan", "a-sm86.plan", "graph.onnx"]


def test_fp32_leaves_out_the_gpu_that_cannot(rtx: Any, tmp_path: Path) -> None:
    """And the builder itself says so, should another version come to lack another."""
    assert build.target("tensorrt-rtx", "fp32", BuildOptions())["compute_capabilities"] == FIVE
    graph = product(tmp_path, FP32)
    turing = BuildOptions(capabilities=("7.5",))
    with pytest.raises(
        InputError, match=r"^gpus: found 7.5, where TensorRT for RTX multiplies no fp32 matrices; leave"
    ):
        build_engine(graph, tmp_path / "a.plan", "tensorrt-rtx", "fp32", turing)
    with pytest.raises(InputError, match=r"cannot build it for compute capability 7.5 \(.*FP32 GEMM.*leave that one"):
        build_engine(graph, tmp_path / "a.plan", "tensorrt-rtx", "fp16", turing)
    assert files(tmp_path) == ["graph.onnx"]


def test_a_capability_that_the_library_lacks_is_named(rtx: Any) -> None:
    with pytest.raises(
        InputError, match=f"^gpus: found 9.0, x, TensorRT for RTX {rtx.__version__} builds for 7.5, .*12.1; leave the"
    ):
        build.target("tensorrt-rtx", "fp16", BuildOptions(capabilities=("8.9", "9.0", "x")))


def test_an_operator_that_the_parser_lacks_is_named_and_the_former_plan_stays(
    rtx: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nodes = [
        helper.make_node("Det", ["a"], ["d"], name="net.3/Det_7"),
        helper.make_node("Add", ["a", "d"], ["y"], name="net.4/Add_8"),
    ]
    graph = saved(tmp_path, nodes)
    (tmp_path / "a.plan").write_bytes(b"former")
    with pytest.raises(
        InputError, match=rf"^{graph}: TensorRT does not support Det, first at net.3/Det_7 \([^\n]+\); "
    ):
        build_engine(graph, tmp_path / "a.plan", "tensorrt-rtx", "fp32", ADA)
    assert (tmp_path / "a.plan").read_bytes() == b"former" and files(tmp_path) == ["a.plan", "graph.onnx"]
    assert capfd.readouterr() == ("", "")


def test_a_second_plan_that_fails_takes_the_first_with_it(
    rtx: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = build._build

    def failing(graph: Path, plan: Path, *more: Any) -> Any:
        if plan.name == "a-sm89.plan":
            raise InputError("no")
        return built(graph, plan, *more)

    monkeypatch.setattr(build, "_build", failing)
    options = BuildOptions(capabilities=("8.6", "8.9"), plan_per_gpu=True)
    with pytest.raises(InputError, match=r"^no$"):
        build_engine(product(tmp_path), tmp_path / "a.plan", "tensorrt-rtx", "fp16", options)
    assert files(tmp_path) == ["graph.onnx"]


def test_ctrl_c_stops_the_builder_at_once(rtx: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Bar(build.tqdm):  # type: ignore[misc,name-defined]
        def update(self, n: float | None = 1) -> bool | None:
            os.kill(os.getpid(), signal.SIGINT)
            return None

    started = []
    popen = subprocess.Popen

    def starting(*arguments: Any, **options: Any) -> Any:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(build, "tqdm", Bar)
    monkeypatch.setattr(subprocess, "Popen", starting)
    with pytest.raises(KeyboardInterrupt):
        build_engine(product(tmp_path), tmp_path / "a.plan", "tensorrt-rtx", "fp16", ADA)
    (child,) = started
    assert child.returncode == -signal.SIGKILL
    assert files(tmp_path) == ["graph.onnx"]


def ask(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What the builder's process answers."""
    done = subprocess.run(
        [sys.executable, "-m", "trip_engines.tensorrt_process"],
        input=json.dumps(request) + "\n",
        stdout=subprocess.PIPE,
        text=True,
        timeout=100,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_without_its_parent_the_builder_ends(rtx: Any, tmp_path: Path) -> None:
    """Stdin closes as soon as the request is read, as it does when the parent dies; this graph takes a second."""
    nodes = [helper.make_node("MatMul", ["a", "b"], ["p0"])]
    for index in range(400):
        nodes += [
            helper.make_node("Softmax", [f"p{index}"], [f"s{index}"]),
            helper.make_node("MatMul", [f"s{index}", "b"], [f"p{index + 1}"]),
        ]
    nodes += [helper.make_node("Relu", ["p400"], ["y"])]
    plan = tmp_path / "a.plan"
    request = {"library": "tensorrt_rtx", "graph": str(saved(tmp_path, nodes, FP16)), "plan": str(plan)}
    request |= {"capabilities": ["8.9"], "options": {"timing_cache": None}}
    assert not any("built" in answer for answer in ask(request)) and not plan.exists()


def test_a_full_disk_is_one_line(rtx: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    request = {"library": "tensorrt_rtx", "graph": str(product(tmp_path)), "plan": "/dev/full"}
    monkeypatch.setattr(process, "_end_with_the_parent", lambda: None)
    answers: list[Any] = []
    with pytest.raises(OSError, match="No space left"):
        process.build(request | {"capabilities": ["8.9"], "options": {"timing_cache": None}}, answers.append)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -9 $$", "builder was killed, most likely for memory; close other programs, or take a smaller profile"),
        ("echo one >&2; echo the last word >&2; exit 3", r"builder ended with code 3 \(the last word\); install"),
        ("exit 0", r"builder ended with code 0 \(it gave no reason\)"),
        (
            """read line; echo '{"error": "'"$(echo "$line" | grep -o '[^"]*[.]part')"': full (disk); make room"}'""",
            r"^a.plan: full \(disk\); make room$",
        ),
    ],
)
def test_a_builder_that_dies_is_explained(
    rtx: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str
) -> None:
    shell = tmp_path / "python"
    shell.write_text(f"#!/bin/sh\n{script}\n")
    shell.chmod(0o755)
    graph = product(tmp_path)
    monkeypatch.setattr(sys, "executable", str(shell))
    with pytest.raises(InputError, match=message):
        build_engine(graph, tmp_path / "a.plan", "tensorrt-rtx", "fp16", ADA)
    assert files(tmp_path) == ["graph.onnx", "python"]


def test_long_builds_without_a_terminal_log_their_progress(
    rtx: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "_LOG_EVERY", -1)
    notes: list[str] = []
    build_engine(product(tmp_path), tmp_path / "a.plan", "tensorrt-rtx", "fp16", ADA, notes.append)
    assert notes[0].startswith("plan a.plan: step ") and len(notes) > 2


def test_polygraphy_sees_the_same_network(rtx: Any, tmp_path: Path) -> None:
    """NVIDIA's own tool, which people inspect plans and graphs with, on the same package."""
    pytest.importorskip("polygraphy")
    weights = initializer("w", np.ones((4, 4), np.float16))
    nodes = [helper.make_node("MatMul", ["a", "w"], ["p"]), helper.make_node("Softmax", ["p"], ["y"])]
    graph = saved(tmp_path, nodes, FP16, initializer=[weights])
    script = (
        "import sys; from polygraphy.backend.trt import network_from_onnx_path;"
        "print(network_from_onnx_path(sys.argv[1], strongly_typed=True)[1].num_layers)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(graph)],
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (plan,), _ = build_engine(graph, tmp_path / "a.plan", "tensorrt-rtx", "fp16", ADA)
    assert int(done.stdout.split()[-1]) == plan.layers


# The full TensorRT, which needs a GPU


@pytest.mark.parametrize("compatibility", get_args(get_type_hints(BuildOptions)["hardware_compatibility"]))
def test_the_full_tensorrt_is_asked_for_what_the_options_say(rtx: Any, compatibility: str) -> None:
    """On the config of TensorRT for RTX, which has the same names and keeps all but the compatibility."""
    options = BuildOptions(workspace_gb=1.5, optimization_level=4, refittable=True, version_compatible=True)
    request = {
        "capabilities": [],
        "options": vars(options) | {"hardware_compatibility": compatibility, "timing_cache": None},
    }
    builder = rtx.Builder(rtx.Logger(rtx.Logger.INTERNAL_ERROR))
    config = process._config(rtx, builder, request, print)
    assert config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE) == 3 << 29
    assert config.builder_optimization_level == 4 and config.profiling_verbosity == rtx.ProfilingVerbosity.DETAILED
    flags = {name for name, flag in rtx.BuilderFlag.__members__.items() if config.get_flag(flag)}
    assert flags == {"REFIT", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}
    assert compatibility == "none" or compatibility.upper() in rtx.HardwareCompatibilityLevel.__members__


def test_no_plan_computes_in_tf32_and_all_take_the_loops_memory(rtx: Any) -> None:
    builder = rtx.Builder(rtx.Logger(rtx.Logger.INTERNAL_ERROR))
    assert builder.create_builder_config().get_flag(rtx.BuilderFlag.TF32), "on by default"
    config = process._config(rtx, builder, {"capabilities": ["8.9", "12.0"], "options": {}}, print)
    flags = {name for name, flag in rtx.BuilderFlag.__members__.items() if config.get_flag(flag)}
    assert flags == {"REQUIRE_USER_ALLOCATION"}
    assert config.num_compute_capabilities == 2
    assert [config.get_compute_capability(index).name for index in range(2)] == ["SM89", "SM120"]


def test_a_level_that_this_tensorrt_lacks_is_refused(rtx: Any) -> None:
    old = SimpleNamespace(**{name: getattr(rtx, name) for name in dir(rtx) if not name.startswith("__")})
    old.HardwareCompatibilityLevel, old.__version__ = SimpleNamespace(NONE=0, AMPERE_PLUS=1), "10.13.0.35"
    options = vars(BuildOptions(hardware_compatibility="same_compute_capability"))
    builder = rtx.Builder(rtx.Logger(rtx.Logger.INTERNAL_ERROR))
    with pytest.raises(
        InputError, match=r"10.13.0.35 knows no hardware compatibility same_compute_capability; install a newer"
    ):
        process._config(old, builder, {"capabilities": [], "options": options}, print)


def test_a_finished_plan_of_tensorrts_is_opened_again_and_its_layers_are_read() -> None:
    """By stand-ins of these names, which are TensorRT's; the inspector's own is in the full package alone."""
    lean = pytest.importorskip("tensorrt_lean_bindings")
    assert hasattr(lean.Runtime, "deserialize_cuda_engine") and hasattr(lean.ICudaEngine, "create_engine_inspector")
    told: list[Any] = []
    inspected = '{"Layers": [{"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Half"}]}]}'
    inspector = SimpleNamespace(get_engine_information=lambda form: told.append(form) or inspected)
    plans = {b"a plan": SimpleNamespace(create_engine_inspector=lambda: inspector), b"another's": None}
    trt = SimpleNamespace(
        LayerInformationFormat=lean.LayerInformationFormat,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=plans.__getitem__),
    )
    logger = SimpleNamespace(errors=["the version\ntag"])
    assert process._inspected(trt, logger, b"a plan") == {"FP16": 1}
    assert told == [lean.LayerInformationFormat.JSON]
    with pytest.raises(InputError, match=r"cannot open its own plan \(the version"):
        process._inspected(trt, logger, b"another's")


@pytest.mark.parametrize(
    "options",
    [
        {"workspace_gb": 0},
        {"workspace_gb": float("nan")},
        {"workspace_gb": float("inf")},
        {"timing_cache": Path("/")},
        {"optimization_level": 6},
        {"optimization_level": -1},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        BuildOptions(**options)


@pytest.mark.parametrize(
    ("backend", "old", "message"),
    [
        ("tensorrt", "10.9.0.34", r"found 10.9.0.34, expected 10.13 or newer; pip install --upgrade trip-rt\[tensorrt"),
        ("tensorrt-rtx", "1.2.0.54", r"found 1.2.0.54, expected 1.4 or newer; pip install --upgrade trip-rt\[rtx\]"),
    ],
)
def test_a_builder_too_old_or_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, backend: str, old: str, message: str
) -> None:
    module, _ = build.LIBRARIES[backend]
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(__version__=old))
    with pytest.raises(InputError, match=message):
        build.target(backend, "fp16", BuildOptions())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"^{backend}: found no builder, .*pip install trip-rt\[\w+\]$"):
        build.target(backend, "fp16", BuildOptions())


def test_target_and_key_tell_what_a_plan_depends_on(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(__name__="tensorrt", __version__="11.4.0.106")
    libraries = {"tensorrt": full, "tensorrt-rtx": rtx}
    monkeypatch.setattr(build, "_library", libraries.__getitem__)
    monkeypatch.setattr(build, "this_machine", lambda trt: Machine(trt.__name__, trt.__version__, "a GPU", "9.0"))
    plain = build.cache_key("tensorrt", "fp16", BuildOptions())
    assert build.target("tensorrt", "fp16", BuildOptions()) == TARGET | {
        "gpu": "a GPU", "version_compatible": "no", "hardware_compatibility": "none"
    }  # fmt: skip
    assert all(isinstance(value, str) for value in plain.values())
    assert build.cache_key("tensorrt", "fp16", BuildOptions(timing_cache=Path("a.cache"))) == plain
    of_tensorrt: list[dict[str, Any]] = [
        {"workspace_gb": 4.0},
        {"optimization_level": 5},
        {"refittable": True},
        {"version_compatible": True},
        {"hardware_compatibility": "ampere_plus"},
    ]
    of_rtx: list[dict[str, Any]] = [{"capabilities": ("8.9",)}, {"plan_per_gpu": True}]
    for backend, changes in (("tensorrt", of_tensorrt), ("tensorrt-rtx", of_rtx)):
        keys = [build.cache_key(backend, "fp16", BuildOptions(**change)) for change in ({}, *changes)]
        assert len({json.dumps(key) for key in keys}) == len(keys)


def test_progress_counts_nested_phases_that_end_early(rtx: Any) -> None:
    assert {name for name in vars(process.Progress) if not name.startswith("_")} <= set(dir(rtx.IProgressMonitor))
    told: list[Any] = []
    monitor = process._monitor(rtx, lambda message: told.append(message["progress"]))
    assert isinstance(monitor, rtx.IProgressMonitor)
    monitor.phase_start("outer", None, 4)
    assert monitor.step_complete("outer", 0)
    monitor.phase_start("inner", "outer", 10)
    assert monitor.step_complete("inner", 2) and told[-1] == [4, 14, "inner"]
    monitor.phase_finish("inner")
    assert monitor.step_complete("outer", 1) and told[-1] == [12, 14, "outer"]
    monitor.phase_finish("never started")


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (
            ["Error Code 2: OutOfMemory (Requested size was 123 bytes.)", "Invalid Engine."],
            "ran out of memory; close what else",
        ),
        (["[defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)"], "ran out of memory"),
        (["std::bad_alloc"], "ran out of memory"),
        (
            ["Error Code 10: Could not find any implementation for node n due to insufficient workspace."],
            "too little workspace",
        ),
        (
            ["createInferBuilder: Error Code 6: API Usage Error (CUDA initialization failure with error: 35)"],
            "found no usable GPU",
        ),
        (
            ["Error Code 4: API Usage Error (n: shapes do not\nfit.)", "Invalid Engine."],
            r"cannot build it \(Error Code 4: .*shapes do not fit",
        ),
        ([""], r"cannot build it \(it gave no reason\)"),
    ],
)
def test_a_failed_build_is_explained_in_one_line(errors: list[str], message: str) -> None:
    error = explain(errors, "unet.onnx")
    assert isinstance(error, InputError) and "\n" not in str(error) and "; " in str(error)
    with pytest.raises(InputError, match=f"^unet.onnx: TensorRT [^\n]*{message}"):
        raise error
