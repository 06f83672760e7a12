"""Choosing a backend, and what each does on a machine without a GPU. TensorRT and Inductor have files of their own."""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from trip_rt import EngineError, InputError, backends
from trip_rt.backends import EngineOptions, choose, engine_class, onnxruntime
from trip_rt.backends.inductor import InductorEngine
from trip_rt.bundle import open_bundle
from trip_rt.devices import open_device


@pytest.fixture
def profile(tiny_bundle):
    """The tiny bundle as if every backend had been exported."""
    profile = open_bundle(tiny_bundle).manifest.profile()
    engines = {name: dict.fromkeys(backends.NAMES, engines["onnxruntime"]) for name, engines in profile.engines.items()}
    return dataclasses.replace(profile, engines=engines)


def available(monkeypatch, devices):
    """Let `devices[backend]` be where each backend would run, the others be refused."""

    def engine_class(name):
        class Stand:
            @staticmethod
            def probe(spec, options):
                if name not in devices:
                    raise InputError(f"{name}: is not here")
                return devices[name]

        return Stand

    monkeypatch.setattr(backends, "engine_class", engine_class)


@pytest.mark.parametrize(
    ("devices", "best"),
    [
        ({"onnxruntime": "cpu"}, "onnxruntime"),
        ({"onnxruntime": "cpu", "openvino": "cpu"}, "openvino"),
        ({"onnxruntime": "cuda", "openvino": "cpu"}, "onnxruntime"),
        ({"onnxruntime": "cuda", "openvino": "cpu", "tensorrt": "cuda"}, "tensorrt"),
        ({"onnxruntime": "cpu", "inductor": "cuda"}, "onnxruntime"),
    ],
)
def test_auto_prefers_a_gpu_and_says_why(monkeypatch, profile, devices, best):
    available(monkeypatch, devices)
    name, reason = choose(profile)
    assert name == best
    assert f"auto, on {devices[best]}" in reason
    for other in backends.NAMES:
        assert other == best or other in reason


def test_nothing_that_runs_is_one_line_with_every_reason(monkeypatch, profile):
    available(monkeypatch, {})
    with pytest.raises(InputError, match="no engine of the bundle can run here") as caught:
        choose(profile)
    assert all(f"{name}: " in str(caught.value) for name in backends.NAMES)


def test_a_backend_by_name_is_taken_or_refused(monkeypatch, profile):
    available(monkeypatch, {"inductor": "cpu"})
    assert choose(profile, "inductor") == ("inductor", "asked for, on cpu")
    with pytest.raises(InputError, match="openvino: is not here"):
        choose(profile, "openvino")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_of_one_file_agree_and_close(tiny_bundle, tiny_animator, name):
    bundle = open_bundle(tiny_bundle)
    spec = bundle.manifest.profile().engines["vae_decoder"]["onnxruntime"]
    engine = engine_class(name).open(bundle.engine_path(spec), spec, EngineOptions(device="cpu", threads=1))
    latents = np.random.default_rng(0).standard_normal(spec.inputs[0].shape, np.float32)
    first = engine.run({"latents": latents})["image"]
    kept = first.copy()
    engine.run({"latents": latents[::-1]})  # not contiguous, and another answer
    assert (first == kept).all()  # the first answer is the caller's own
    expected = tiny_animator.engines["vae_decoder"].run({"latents": latents})["image"]
    np.testing.assert_allclose(first, expected, atol=1e-4)
    assert engine.describe()["backend"] == name and engine.describe()["device"] == "cpu"
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed engine"):
        engine.run({"latents": latents})


@pytest.mark.parametrize(("name", "says"), [("onnxruntime", "expected CUDA"), ("openvino", "runs on a CPU")])
def test_a_gpu_that_is_not_there(profile, name, says):
    with pytest.raises(InputError, match=says):
        choose(profile, name, EngineOptions(device="cuda"))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_file_that_is_no_graph(tmp_path, profile, name):
    (tmp_path / "engine.onnx").write_bytes(b"\x08\x09 nothing")
    with pytest.raises(InputError, match="found no ONNX graph") as caught:
        engine_class(name).open(tmp_path / "engine.onnx", profile.engines["tnf"][name], EngineOptions())
    assert "\n" not in str(caught.value)


def test_ctrl_c_arrives_after_openvino_has_run(tiny_bundle):
    """OpenVINO leaves a signal stack behind; freed by another thread, it would turn Ctrl-C into a crash."""
    code = """
import gc, os, signal, sys, threading, time
from trip_rt import Animator
from trip_rt.backends import EngineOptions, engine_class
from trip_rt.bundle import open_bundle
bundle = open_bundle(sys.argv[1])
spec = bundle.manifest.profile().engines["tnf"]["onnxruntime"]
engines = [engine_class("openvino").open(bundle.engine_path(spec), spec, EngineOptions())]
ending = threading.Thread(target=lambda: (engines.clear(), gc.collect()))
ending.start()
ending.join()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted")
"""
    ran = subprocess.run([sys.executable, "-c", code, str(tiny_bundle)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "interrupted\n"), ran


@pytest.mark.parametrize("shape", [(1,), (2, 16, 1)])
def test_native_code_that_gives_other_shapes_is_told_so(profile, shape):
    """copy_ would stretch them to the output's."""
    torch = pytest.importorskip("torch")
    spec = profile.engines["text_encoder"]["onnxruntime"]
    loader = SimpleNamespace(run=lambda inputs: [torch.zeros(shape)])
    engine = InductorEngine(spec, torch, loader, open_device("cpu"), EngineOptions(), owns_device=True)
    with pytest.raises(EngineError, match=r"it gave \[.*\] for an output of \["):
        engine.run({tensor.name: np.zeros(tensor.shape, tensor.dtype) for tensor in spec.inputs})


def test_onnxruntime_keeps_and_sends_nothing(tiny_bundle, tmp_path):
    """By itself it would leave a session's id where temporary files are, and send its maker what it does."""
    code = "import sys; from trip_rt import Animator; Animator(sys.argv[1], 'onnxruntime').close()"
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "TMPDIR": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", code, tiny_bundle], check=True, env=environment)
    assert not os.listdir(tmp_path)


def test_openvino_is_loaded_without_what_reports_to_its_maker(tmp_path):
    """By itself it would send an event, from a process of its own, and keep an id in the user's folder."""
    code = "import sys; from trip_rt.backends.openvino import library; library().Core(); print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], check=True, env=environment, stdout=subprocess.PIPE, text=True)
    assert not {"openvino_telemetry", "multiprocessing.popen_fork"} & set(ran.stdout.split())
    assert not os.listdir(tmp_path)


def test_both_packages_of_onnxruntime_are_refused(monkeypatch, profile):
    monkeypatch.setattr(onnxruntime, "_is_installed", lambda package: True)
    with pytest.raises(InputError, match=r"found onnxruntime and onnxruntime-gpu installed together.*pip uninstall"):
        choose(profile, "onnxruntime")
    chosen, reason = choose(profile, "auto", EngineOptions(device="cpu"))
    assert chosen == "openvino" and "installed together" in reason
