"""`make gpu` without a GPU: it says so, and a dry run goes through all that it would do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import kernel_checks, prebuilt
from gpu.cases import TINY, Context, build_kernels, random_fusion
from gpu.clock import beats_ceiling
from gpu.parts import COMMAND_SECONDS, GROUPS, MACHINE_SECONDS, PARTS
from triton.runtime.errors import OutOfResources

ROOT = Path(__file__).parents[2]


def bench(*args, code="pass"):
    ran = (
        f"import sys; sys.argv = ['bench/gpu/run.py', *{args!r}]; sys.path.insert(0, 'bench'); {code}; from gpu.run"
        " import main; raise SystemExit(main())"
    )
    return subprocess.run([sys.executable, "-c", ran], capture_output=True, text=True, cwd=ROOT)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("found a GPU")
    ran = bench()
    assert (
        ran.returncode == 2 and ran.stdout == "" and "found no NVIDIA GPU" in ran.stderr and ran.stderr.count("\n") == 1
    )


def test_unknown_parts_are_named():
    ran = bench("--dry-run", "--only", "kernel,warp_drive")
    assert ran.returncode == 2 and "found warp_drive, expected some of parity,kernel" in ran.stderr


def test_each_group_of_parts_fits_into_a_command_and_both_do_not():
    for names in GROUPS.values():
        assert MACHINE_SECONDS + sum(PARTS[name].seconds for name in names) <= COMMAND_SECONDS <= 600
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(PARTS)
    ran = bench("--only", "figures,engines")
    assert ran.returncode == 2 and f"expected at most {COMMAND_SECONDS} s in a command" in ran.stderr


def test_a_part_that_cannot_be_imported_is_red_and_the_rest_runs():
    ran = bench("--dry-run", "--only", "parity,tests", code="sys.modules['gpu.kernel_checks'] = None")
    assert ran.returncode == 1 and "parity: failed: ModuleNotFoundError: import of gpu.kernel_checks" in ran.stdout
    assert "tests: done" in ran.stdout and "skipped" in ran.stdout


@pytest.mark.parametrize(
    ("error", "key", "reason"),
    [
        (RuntimeError("capture failed"), "fused, 32 pixels 4 warps 1 stages", "RuntimeError: capture failed"),
        (OutOfResources(9, 8, "shared memory"), "fused", "found no tile that runs, expected one"),
    ],
)
def test_a_kernel_that_fails_is_red(error, key, reason, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(kernel_checks, "DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(kernel_checks, "_launches", fail)
    figures = kernel_checks.kernel(Context(dry=True, quick=True, folder=tmp_path))
    assert not figures["passed"] and figures["fp32"]["failed"][key] == reason


def test_machine_code_compiled_before_is_what_is_launched(tmp_path, monkeypatch):
    monkeypatch.setattr(prebuilt, "SHAPES", (TINY.trip,))
    monkeypatch.setattr(prebuilt, "DTYPES", {"fp16": torch.float16})
    said = []
    prebuilt.write(tmp_path / "kernels", ["9.0"], said.append)
    assert "fp16: fused step: compute capability 9.0" in said[0]
    context = Context(dry=True, quick=True, folder=tmp_path, kernels=tmp_path / "kernels")
    cases = {name: (random_fusion(TINY.trip, "cpu"), TINY.trip, name) for name in ("fp16", "fp32")}
    monkeypatch.setattr("trip_kernels.compile.ProcessPoolExecutor", None)  # nothing is compiled here
    specs = build_kernels(context, cases)
    (cubin,) = specs["fp16"].cubins.values()
    (kept,) = (tmp_path / "kernels").glob("*.cubin")
    assert (tmp_path / cubin.file).read_bytes() == kept.read_bytes()
    assert "found none in" in str(specs["fp32"]) and "--compile-for 9.0" in str(specs["fp32"])
    ran = bench("--compile-for", "9.9", "--kernels", str(tmp_path))
    assert ran.returncode == 2 and "compile-for: found 9.9, expected some of 8.0" in ran.stderr


def test_a_share_above_the_ceiling_by_more_than_its_spread_is_told():
    assert not beats_ceiling(102.9, {"spread, %": 3.0}) and beats_ceiling(103.1, {"spread, %": 3.0})


@pytest.mark.slow
def test_a_dry_run_goes_through_everything(tmp_path):
    ran = bench("--dry-run", "--only", "figures,engines", "--json", "--output", str(tmp_path / "figures.json"))
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "figures.json").read_text()) and "dry run" in figures
    parts = figures["parts"]
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(parts, "done") | dict.fromkeys(
        ("inductor", "libraries"), "skipped"
    )
    assert len(parts["parity"]["errors"]) == 3 and parts["parity"]["passed"]
    for precision in ("fp16", "bf16", "fp32"):
        assert (
            parts["kernel"][precision]["left out"] == parts["kernel"][precision]["failed"] == {}
            and "times faster than eager torch (10 wanted)" in parts["kernel"][precision]
        )
    assert parts["demo_loop"]["fp32"]["latents, graph, dB"] >= 60
    assert "outside of the UNet, % of a step (3 wanted)" in parts["full_loop"]


@pytest.mark.slow
def test_what_is_missing_is_named_and_the_rest_runs():
    blocked = "sys.modules |= dict.fromkeys(('diffusers', 'av', 'onnx', 'onnxruntime', 'openvino', 'tensorrt'))"
    ran = bench("--dry-run", "--only", "parity,full_loop,demo_loop", code=blocked)
    assert ran.returncode == 0, ran.stderr
    assert (
        "parity: done" in ran.stdout and "full_loop: skipped: found no diffusers; pip install diffusers" in ran.stdout
    )
    assert (
        "demo_loop: done" in ran.stdout
        and "a stand-in for the UNet" in ran.stdout
        and "the loop on the host" in ran.stdout
    )


def test_what_breaks_or_lasts_costs_no_other_part():
    """Only what says that this machine lacks something is skipped; an error of any other kind has failed."""
    code = """
import os, signal, sys, time
sys.path.insert(0, "bench")
from own_process import apart, require
from trip_rt.errors import InputError

def keeping(end):
    def work(keep):
        keep({"a": 1.0, "b": float("inf")})
        return end()
    return work

def refuse():
    raise InputError("cuda: out of memory")

def import_nothing():
    from trip_rt.errors import NoSuchError

crash = lambda: os.kill(os.getpid(), signal.SIGSEGV)
lack = lambda: require("sys", "warp_drive")
ends = dict, lack, refuse, import_nothing, lambda: time.sleep(9), crash, lambda: {"passed": False}
results = [apart(keeping(end), 1) for end in ends]
assert all(result["a"] == 1 and result["b"] == "inf" for result in results), results
print(*(result["state"] + ": " + result.get("reason", "") for result in results), sep="\\n")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = ran.stdout.splitlines()
    assert lines.pop(3).startswith("failed: ImportError: cannot import name 'NoSuchError'"), ran.stderr
    assert lines == [
        "done: ", "skipped: found no warp_drive; pip install warp_drive", "failed: InputError: cuda: out of memory",
        "failed: cut off after its 1 s", "failed: its process died of SIGSEGV", "red: ",
    ], ran.stderr  # fmt: skip


def test_the_references_operations_are_counted_right():
    code = """
import sys
sys.path.insert(0, "bench")
from gpu.cases import TINY, random_fusion, reference_flops, reference_step, step_tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
    reference_step(random_fusion(TINY.trip, "cpu"), **step_tensors(TINY.trip, 2, "cpu"))
print(counter.get_total_flops(), reference_flops(TINY.trip, 2))
"""
    counted, said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split()
    assert counted == said
