"""The benchmark of an export, on a small model."""

import json

import full_export
import pytest


@pytest.mark.slow
def test_it_says_what_every_stage_took(tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx")
    output = tmp_path / "figures.json"
    # Of random weights this model keeps its time embedding in fp32, products and all.
    assert full_export.main(["--preset", "demo-small", "--folder", str(tmp_path), "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    stages = figures["stages"]
    assert {"reference run", "unet (onnx)", "unet (tensorrt-rtx)", "parity of onnxruntime"} <= set(stages)
    assert max(stage["peak_memory_gb"] for stage in stages.values()) < 8 and 0.3 < figures["peak_resident_gb"] < 8
    assert figures["parity"]["tensorrt-rtx"]["passed"] and str(tmp_path) not in output.read_text()
    assert "unet (tensorrt-rtx)" in capsys.readouterr().out and list(tmp_path.iterdir()) == [output]
