"""`make gpu` without a GPU: it says so, and a dry run goes through all that it would do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*args, code="pass"):
    ran = (
        f"import sys; sys.argv = ['bench/gpu/run.py', *{args!r}]; sys.path.insert(0, 'bench'); {code}; from gpu.run"
        " import main; raise SystemExit(main())"
    )
    return subprocess.run([sys.executable, "-c", ran], capture_output=True, text=True, cwd=ROOT)


def test_without_a_gpu_it_says_so():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("found a GPU")
    ran = bench()
    assert (
        ran.returncode == 2 and ran.stdout == "" and "found no NVIDIA GPU" in ran.stderr and ran.stderr.count("\n") == 1
    )


def test_unknown_parts_are_named():
    ran = bench("--dry-run", "--only", "kernel,warp_drive")
    assert ran.returncode == 2 and "found warp_drive, expected some of parity,kernel" in ran.stderr


@pytest.mark.slow
def test_a_dry_run_goes_through_everything(tmp_path):
    ran = bench("--dry-run", "--json", "--output", str(tmp_path / "figures.json"))
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
            not parts["kernel"][precision]["left out"]
            and "times faster than eager torch (10 wanted)" in parts["kernel"][precision]
        )
    assert parts["demo_loop"]["fp32"]["latents, graph, dB"] >= 60
    assert "outside of the UNet, % of a step (3 wanted)" in parts["full_loop"]


@pytest.mark.slow
def test_what_is_missing_is_named_and_the_rest_runs():
    blocked = (
        "sys.modules |= dict.fromkeys(('diffusers', 'av', 'jsonschema', 'onnx', 'onnxruntime', 'openvino', 'tensorrt'))"
    )
    ran = bench("--dry-run", "--only", "parity,full_loop,demo_loop", code=blocked)
    assert ran.returncode == 0, ran.stderr
    assert (
        "parity: done" in ran.stdout and "full_loop: skipped: diffusers is not installed; carry its wheel" in ran.stdout
    )
    assert (
        "demo_loop: done" in ran.stdout
        and "a stand-in for the UNet" in ran.stdout
        and "the loop on the host" in ran.stdout
    )


def test_what_breaks_or_lasts_costs_no_other_part():
    code = """
import os, signal, sys, time
sys.path.insert(0, "bench")
from own_process import Skipped, apart

def keeping(end):
    def work(keep):
        keep({"a": 1.0, "b": float("inf")})
        return end()
    return work

def skip():
    raise Skipped("no GPU")

crash = lambda: os.kill(os.getpid(), signal.SIGSEGV)
ends = dict, skip, lambda: 1 / 0, lambda: time.sleep(9), crash, lambda: {"passed": False}
found = [apart(keeping(end), 1) for end in ends]
assert all(one["a"] == 1 and one["b"] == "inf" for one in found), found
print(*(one["state"] + ": " + one.get("reason", "") for one in found), sep="\\n")
"""
    ran = subprocess.run([sys.executable, "-c", code.replace("\\\\n", "\\n")], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.splitlines() == [
        "done: ", "skipped: no GPU", "failed: ZeroDivisionError: division by zero", "failed: cut off after its 1 s",
        "failed: its process died of SIGSEGV", "red: ",
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
