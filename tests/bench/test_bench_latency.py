"""The benchmarks run at a tiny size and say what they should; nothing here looks at a time."""

import contextlib
import io
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import untraced
from matplotlib.figure import Figure
from PIL import Image

BENCH = Path(__file__).parents[2] / "bench"


import ceiling  # noqa: E402
import latency  # noqa: E402
from peers import wrong  # noqa: E402
from plots import bars, scaling  # noqa: E402
from scaling import Point, _slopes  # noqa: E402
from timing import interleaved, percentiles, ratio  # noqa: E402

from trip_export.export import export_bundle  # noqa: E402
from trip_export.plan import ExportOptions  # noqa: E402
from trip_rt.bundle import open_bundle  # noqa: E402
from trip_rt.components import REQUIRED, VARIANTS  # noqa: E402
from trip_rt.errors import EngineError  # noqa: E402
from trip_rt.manifest import serialise  # noqa: E402


def bench(script, *arguments):
    """The script as the shell would run it, but in this process, which has everything imported."""
    command = [str(BENCH / script), *map(str, arguments)]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", command)
        runpy.run_path(command[0], run_name="__main__")
    return subprocess.CompletedProcess(command, ended.value.code, stdout.getvalue(), stderr.getvalue())


def blue_is_in(picture):
    """matplotlib's, of trip-rt's bar and of the first line."""
    with Image.open(picture) as opened:
        return (31, 119, 180) in {colour for _, colour in opened.convert("RGB").getcolors(1 << 24)}


def test_rivals_take_turns_and_the_first_rounds_only_warm_up():
    calls = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=2, warm_ups=1)
    assert "".join(calls) == "abc" + "bca" + "cab" and {name: len(values) for name, values in seconds.items()} == {
        "a": 2,
        "b": 2,
        "c": 2,
    }


def test_percentiles_and_ratios():
    assert percentiles([i / 1000 for i in range(1, 102)]) == {"p50": 51.0, "p95": 96.0, "p99": 100.0}
    assert ratio([2.0, 4.0, 12.0], [1.0, 2.0, 3.0])["median"] == 2.0


def test_slopes_are_of_pixels_not_of_sides():
    points = [Point(8, size, 1) for size in (64, 128, 256)]
    assert _slopes("sizes", points, {point: {"step_ms": 3.0 * point.size**2, "loop_mb": 7.0} for point in points}) == {
        "step_ms": 1.0,
        "loop_mb": 0.0,
    }


def test_the_ceiling_is_the_best_of_every_library_and_shape(monkeypatch):
    monkeypatch.setattr(ceiling, "PRODUCTS", ((96, 96, 96), (256, 32, 64)))
    monkeypatch.setattr(ceiling, "CONVOLUTION", (2, 32, 8))
    timed = ceiling.Ceiling(threads=1)
    for _ in range(2):
        timed.measure(0)
    peak = timed.peak()
    assert set(peak) == {"gflops", "library", "shape", "noise_percent", "libraries"}
    assert set(peak["libraries"]) == {"torch", "openvino"}
    shapes = {"96x96x96 product", "256x32x64 product", "3x3 convolution of 2x32x8x8"}
    assert all(set(rates) == shapes for rates in peak["libraries"].values())
    assert peak["gflops"] == max(max(rates.values()) for rates in peak["libraries"].values())
    assert peak["gflops"] == peak["libraries"][peak["library"]][peak["shape"]] > 0


def test_the_passes_difference_is_the_ceilings_noise():
    passes = [{("a", "small"): 100.0, ("b", "large"): 90.0}, {("a", "small"): 80.0, ("b", "large"): 110.0}]
    peak = ceiling.peak_of(passes)
    assert (peak["gflops"], peak["library"], peak["shape"], peak["noise_percent"]) == (110.0, "b", "large", 22.2)
    assert ceiling.peak_of(passes[:1])["noise_percent"] == ceiling.SPREAD_PERCENT


def test_a_share_above_the_ceiling_is_refused_with_its_component():
    peak = {"gflops": 200.0, "library": "torch", "shape": "8x8x8 product", "noise_percent": 3.0}
    assert ceiling.beyond({"unet": 205.9, "tnf": 20.0}, peak) == ""
    reason = ceiling.beyond({"unet": 348.0, "tnf": 20.0, "vae_decoder": 216.0}, peak)
    assert reason.startswith(
        "found unet at 174 %, vae_decoder at 108 % of the machine's ceiling (200.0 GFLOP/s, torch, 8x8x8 product),"
        " expected at most 103 %"
    )


def test_what_computes_in_less_than_fp32_is_no_ceiling_of_fp32():
    left, right = np.random.default_rng(0).standard_normal((2, 64, 64), np.float32)
    expected = left.astype(np.float64) @ right
    ceiling.check("fp32", left @ right, expected)
    with pytest.raises(EngineError, match=r"^bf16: found an RMS error of .*e-03, expected fp32's, at most 1e-05"):
        bf16 = torch.from_numpy(left).bfloat16().float() @ torch.from_numpy(right).bfloat16().float()
        ceiling.check("bf16", bf16.numpy(), expected)


def test_latency_has_no_figures_where_an_engine_beats_the_ceiling(tiny_bundle, tmp_path, monkeypatch, capsys):
    peak = {"gflops": 1e-6, "library": "torch", "shape": "1x1x1 product", "noise_percent": 3.0}
    monkeypatch.setattr(ceiling, "cases", lambda threads: [])
    monkeypatch.setattr(ceiling, "peak_of", lambda passes: peak)
    output = tmp_path / "figures.json"
    arguments = [str(tiny_bundle), "--rounds", "1", "--clips", "0", "--ceiling-seconds", "0", "--output", str(output)]
    assert latency.main(arguments) == 1 and not output.exists()
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert last.startswith("bench/latency.py: found text_encoder at ") and last.endswith("there are no figures")
    assert printed.out == ""


def test_latency_at_a_tiny_size(tiny_bundle, tiny_checkpoint, tmp_path):
    ran = bench(
        "latency.py", tiny_bundle, "--checkpoint", tiny_checkpoint, "--compare", "eager,onnxruntime",
        "--speeds", "exact,fast", "--rounds", 1, "--clips", 1, "--ceiling-seconds", 0,
        "--output", tmp_path / "figures.json", "--plot", tmp_path / "bars.png",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "figures.json").read_text()) and blue_is_in(tmp_path / "bars.png")
    assert set(figures["components"]) == {*REQUIRED, *VARIANTS} and figures["parity"]["passed"]
    assert set(figures["guided_step"]["milliseconds"]) == {"trip-rt", "eager", "onnxruntime"}
    assert set(figures["guided_step"]["times_as_long_as_trip_rt"]) == {"eager", "onnxruntime"}
    assert figures["guided_step"]["left_out"] == {}
    assert list(figures["cold_start"]["fast"]["seconds"]) == ["import", "open", "first step", "first frame", "clip"]
    assert figures["clips"]["exact"]["psnr"] == 200 and figures["pytorch_peak_memory_mb"] > 100
    assert all(row["gflops"] <= figures["peak"]["gflops"] * 1.03 for row in figures["components"].values())
    assert "a guided step" in ran.stdout and "a fresh process" in ran.stdout
    assert figures["machine"]["threads"] >= 1 and "FP32" in figures["machine"]["openvino_arithmetic"]


def test_red_parity_has_no_figures(tiny_bundle, tmp_path):
    """An engine of another component's weights: a fault that only parity sees."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = open_bundle(bundle).manifest
    (profile,) = manifest.profiles
    engines = dict(profile.engines)
    (weights,) = (name for name in engines["vae_decoder"]["onnxruntime"].files if name.endswith(".weights"))
    data = np.frombuffer((bundle / weights).read_bytes(), np.float32) * 1.01
    (bundle / weights).write_bytes(data.astype(np.float32).tobytes())
    from trip_rt.bundle import file_sha256
    from trip_rt.manifest import FileSpec

    manifest.files[weights] = FileSpec(file_sha256(bundle / weights), (bundle / weights).stat().st_size)
    (bundle / "manifest.json").write_bytes(serialise(manifest))
    ran = bench("latency.py", bundle, "--rounds", 1, "--clips", 0)
    assert ran.returncode == 1 and "parity: FAILED" in ran.stdout and "GFLOP" not in ran.stdout
    assert (
        ran.stderr.splitlines()[-1]
        == "bench/latency.py: parity is red, so there are no figures; export the bundle again"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--compare", "eager"], "found --compare without --checkpoint"),
        (["--compare", "abacus"], "found 'abacus', expected some of eager,compile"),
        (["--speeds", "ludicrous"], "found 'ludicrous', expected some of exact,balanced,fast"),
        (["--rounds", "0"], "found 0 and 3"),
        (["--profile", "1x1-1f-b1"], "profile: found '1x1-1f-b1'"),
    ],
)
def test_latency_refuses_in_one_line(tiny_bundle, arguments, says):
    ran = bench("latency.py", tiny_bundle, *arguments)
    assert ran.returncode == 2 and says in ran.stderr.splitlines()[-1] and ran.stdout == ""


def test_with_json_there_is_one_line(tiny_bundle):
    ran = bench("latency.py", tiny_bundle, "--rounds", 1, "--clips", 0, "--ceiling-seconds", 0, "--json")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("\n") == 1 and json.loads(ran.stdout)["profile"] == "48x32-5f-b1"


def test_a_wrong_rival_is_told():
    expected = np.ones((2, 3), np.float32)
    assert wrong(expected * 1.0009, expected, "fp32") == wrong(expected * 1.04, expected, "bf16") == ""
    found = wrong(expected * 1.01, expected, "fp32")
    assert "found an error of 1.0e-02 to trip-rt's latents, expected at most 0.001" in found
    assert wrong(expected * 1.06, expected, "bf16") and wrong(expected * np.nan, expected, "bf16")


@pytest.mark.slow
def test_scaling_with_two_points(tmp_path):
    # It forks, which a process that has run engines cannot do: their threads do not come along.
    command = [
        sys.executable, BENCH / "scaling.py", "demo", "--frames", "2,16", "--sizes", "64", "--batches", "1",
        "--rounds", "1", "--output", tmp_path / "figures.json", "--plot", tmp_path / "lines.png",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "figures.json").read_text()) and figures["left_out"] == []
    assert [point["frames"] for point in figures["frames"]["points"]] == [2, 16]
    assert (
        set(figures["frames"]["slopes"]) == {"step_ms", "loop_mb", "decode_ms", "decode_growth_mb"}
        and figures["sizes"]["slopes"] == {}
    )
    assert blue_is_in(tmp_path / "lines.png")


def test_a_point_that_fails_or_lasts_is_left_out():
    code = """
import os, signal, sys, time
sys.path.insert(0, "bench")
from scaling import LeftOut, _in_turn

good = lambda: {"step_ms": 1.0}
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
for bad in lambda: time.sleep(9), die, lambda: 1 / 0, lambda: {"decode_ms": 2.0}:
    try:
        print(_in_turn({"loop": good, "decoding": bad}, 1))
    except LeftOut as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCH.parent)
    cut_off, *rest = ran.stdout.splitlines()
    assert cut_off.startswith("decoding: cut off after its"), ran.stderr
    assert rest == [
        "decoding: its process died of SIGKILL",
        "decoding: ZeroDivisionError: division by zero",
        "{'step_ms': 1.0, 'decode_ms': 2.0}",
    ]


def test_scaling_that_leaves_all_out_says_so(tmp_path):
    ran = bench(
        "scaling.py",
        "demo",
        "--frames",
        "2",
        "--sizes",
        "128",
        "--batches",
        "1",
        "--max-seconds",
        "0.01",
        "--plot",
        tmp_path / "lines.png",
    )
    assert ran.returncode == 1, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert [point["frames"] for point in figures["left_out"]] == [2, 16] and figures["frames"] == {
        "points": [],
        "slopes": {},
    }
    assert "left out: 128x128, 2 frames, batch 1: export: cut off" in ran.stdout


def test_scaling_refuses_sizes_the_model_cannot_have():
    ran = bench("scaling.py", "demo", "--sizes", "64,72")
    assert (
        ran.returncode == 2
        and ran.stderr == "bench/scaling.py: sizes: found 72, expected multiples of 32\n"
        and ran.stdout == ""
    )


def test_speeds_at_a_tiny_size(tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("trip_export.export.export_onnx", untraced.graph_of_a_weight)  # clips of one colour will do
    export_bundle(tiny_checkpoint, tmp_path / "square", ExportOptions(size=(32, 32), parity_steps=0))
    ran = bench("speeds.py", tmp_path / "square", "--clips", 1, "--ways", "fast; features reused once")
    assert ran.returncode == 0, ran.stderr
    assert bench("speeds.py", tiny_bundle).stderr.startswith(
        "bench/speeds.py: found pictures of 48x32, expected square ones"
    )
    assert [line.split("|")[1].strip() for line in ran.stdout.splitlines()[2:]] == [
        "exact",
        "fast",
        "features reused once",
    ]


def test_plots(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *to, **how: (drawn.append(figure), save(figure, *to, **how)))
    bars(tmp_path / "bars.png", "times", {"one": 1.0, "another": 2.0})
    scaling(tmp_path / "lines.png", [("title", "x", [1, 2, 4], {"y": [1, 2, 4], "z": [3, 3, 3]})])
    (upright,), (panel,) = (figure.axes for figure in drawn)
    assert [bar.get_width() for bar in upright.patches] == [1, 2] and upright.get_title() == "times"
    assert [label.get_text() for label in upright.get_yticklabels()] == ["one", "another"] and upright.yaxis_inverted()
    assert [line.get_xydata().tolist() for line in panel.lines] == [[[1, 1], [2, 2], [4, 4]], [[1, 3], [2, 3], [4, 3]]]
    assert (panel.get_xscale(), panel.get_yscale(), panel.get_xlabel()) == ("log", "log", "x")
    assert [text.get_text() for text in panel.get_legend().texts] == ["y", "z"]
    assert all(blue_is_in(tmp_path / name) for name in ("bars.png", "lines.png"))


def test_training_says_what_a_step_and_its_data_cost(tmp_path):
    ran = bench(
        "training.py",
        "demo-small",
        "--batch",
        1,
        "--rounds",
        1,
        "--clips",
        4,
        "--workers",
        0,
        "--output",
        tmp_path / "figures.json",
    )
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout)
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    assert 0 < figures["memory_share"] < 0.8
    assert figures["largest_gradient_difference"] <= 1e-6
    assert figures["loader_clips_per_second"] > 0
