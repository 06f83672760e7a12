"""ONNX Runtime's CUDA, by a stand-in for its package, as there may be no GPU here."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trip_rt.backends import EngineOptions
from trip_rt.backends import onnxruntime as backend
from trip_rt.components import TensorSpec
from trip_rt.manifest import EngineSpec

X = TensorSpec("x", "float32", (2, 3))
SPEC = EngineSpec(("unet-0.onnx",), "0" * 16, "fp32", {}, 1.0, {}, (X,), (X,))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the stand-in was asked, in order."""
    called: list[Any] = []

    class Session:
        def __init__(self, path: Path, settings: Any, providers: Any):
            called.append(("session", providers))

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

        def get_inputs(self) -> list[Any]:
            return [SimpleNamespace(name="x", type="tensor(float)", shape=[2, 3])]

        get_outputs = get_inputs

    package = ModuleType("onnxruntime")
    vars(package).update(
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        preload_dlls=lambda: called.append("preload"),
        OrtValue=SimpleNamespace(ortvalue_from_shape_and_type=lambda *_: called.append("a value on the GPU")),
        SessionOptions=lambda: SimpleNamespace(add_session_config_entry=lambda *_: None),
        RunOptions=lambda: SimpleNamespace(add_run_config_entry=lambda *_: None),
        InferenceSession=Session,
    )
    monkeypatch.setattr(backend, "library", lambda: package)
    monkeypatch.setattr(backend, "_refuse_both", lambda: None)
    monkeypatch.setattr(backend, "open_device", lambda kind: SimpleNamespace(kind=kind, stream=7, close=lambda: None))
    backend._has_gpu.cache_clear()
    return called


def test_fp32_is_fp32_and_the_libraries_are_loaded_first(calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "unet-0.onnx").write_bytes(b"\x3a\x00")  # an ONNX model of an empty graph
    backend.OnnxRuntimeEngine.open(tmp_path / "unet-0.onnx", SPEC, EngineOptions()).close()
    assert calls[:2] == ["preload", "a value on the GPU"]
    (session,) = calls[2:]
    (name, cuda), cpu = session[1]
    assert name == "CUDAExecutionProvider" and cpu == "CPUExecutionProvider"
    assert cuda == {"user_compute_stream": "7", "use_tf32": "0"}
