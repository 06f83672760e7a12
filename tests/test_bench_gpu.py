"""`make gpu` without a GPU: it says so, and a dry run goes through all that it would do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def bench(*args, code="pass"):
    ran = f"import sys; sys.argv = ['bench/gpu.py', *{args!r}]; sys.path.insert(0, 'bench'); {code}; import gpu; raise SystemExit(gpu.main())"
    return subprocess.run([sys.executable, "-c", ran], capture_output=True, text=True, cwd=ROOT)


def test_without_a_gpu_it_says_so():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("found a GPU")
    ran = bench()
    assert ran.returncode == 2 and ran.stdout == "" and "found no NVIDIA GPU" in ran.stderr and ran.stderr.count("\n") == 1


def test_unknown_parts_are_named():
    ran = bench("--dry-run", "--only", "kernel,warp_drive")
    assert ran.returncode == 2 and "found warp_drive, expected some of ceilings,parity,kernel" in ran.stderr


@pytest.mark.slow
def test_a_dry_run_goes_through_everything(tmp_path):
    ran = bench("--dry-run", "--json", "--output", str(tmp_path / "figures.json"))
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    parts = figures["parts"]
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(parts, "done") | {"inductor": "skipped"}
    assert len(parts["parity"]["errors"]) == 3 and parts["parity"]["passed"]
    assert {"fp16", "bf16", "fp32"} < set(parts["kernel"]) and "times faster than eager (10 wanted)" in parts["kernel"]["fp16"]
    assert parts["demo_loop"]["fp32"]["latents, graph, dB"] >= 60
    assert "outside of the UNet, % of a step (3 wanted)" in parts["full_loop"]


@pytest.mark.slow
def test_what_is_missing_is_named_and_the_rest_runs():
    blocked = "sys.modules |= dict.fromkeys(('diffusers', 'av', 'jsonschema', 'onnx', 'onnxruntime', 'openvino', 'tensorrt'))"
    ran = bench("--dry-run", "--only", "parity,full_loop", code=blocked)
    assert ran.returncode == 0, ran.stderr
    assert "parity: done" in ran.stdout and "full_loop: skipped: import of diffusers halted" in ran.stdout
