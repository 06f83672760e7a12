"""Every graph that we export, in every precision, goes through NVIDIA's own parser and builder.

The demo's graphs do so in every test run, those of `bench` and one component of the full size in the slow one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest

from trip_engines.precision import ALWAYS_FP32, fold_weights, typed_graph
from trip_engines.tensorrt_build import BuildOptions, BuiltPlan, build_engine
from trip_rt.components import ALL

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
PRECISIONS = ("fp32", "fp16", "bf16")
OPTIONS = BuildOptions(capabilities=("8.9",))


def graph_of(checkpoint: Path, name: str, folder: Path) -> Path:
    """The fp32 graph of a checkpoint's component."""
    from trip_export.components import component, default_decode_frames
    from trip_export.onnx_export import export_onnx
    from trip_reference.checkpoint import from_pretrained

    model = from_pretrained(checkpoint, only=ALL[name].part)
    export_onnx(component(model, name, 1, default_decode_frames(model.config)), folder / f"{name}.onnx")
    return folder / f"{name}.onnx"


def built(graph: Path, precision: str, folder: Path) -> BuiltPlan:
    """The plan of a graph typed as `precision` throughout."""
    folder.mkdir()
    if precision != "fp32":
        model = typed_graph(ir.load(graph), precision, ALWAYS_FP32)
        fold_weights(model)
        graph = folder / graph.name
        ir.save(model, graph, external_data=f"{graph.stem}.weights")
    notes: list[str] = []
    (plan,), _ = build_engine(graph, folder / "a.plan", "tensorrt-rtx", precision, OPTIONS, notes.append)
    assert precision.upper() in notes[-1], "some of its products are in that precision"
    return plan


@pytest.mark.parametrize("name", ALL)
def test_the_demos_graphs_are_parsed_and_built(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = graph_of(DEMO, name, tmp_path)
    for precision in PRECISIONS:
        plan = built(graph, precision, tmp_path / precision)
        assert plan.layers > 20 and plan.bytes > 1e5 and plan.capabilities == ("8.9",)


@pytest.mark.slow
def test_the_benchs_graphs_are_parsed_and_built(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from trip_reference.presets import PRESETS
    from trip_reference.random_checkpoint import save_random

    save_random(PRESETS["bench"], tmp_path / "bench")
    for name in ALL:
        graph = graph_of(tmp_path / "bench", name, tmp_path)
        for precision in PRECISIONS:
            assert built(graph, precision, tmp_path / f"{name}-{precision}").layers > 20


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_component_of_the_full_size_is_parsed_and_built(precision: str, tmp_path: Path) -> None:
    """The VAE's decoder: convolutions over 65 536 pixels, and an attention over 1 024 places."""
    pytest.importorskip("tensorrt_rtx")
    from trip_export.components import component, default_decode_frames
    from trip_export.onnx_export import export_onnx
    from trip_reference.presets import PRESETS
    from trip_reference.random_checkpoint import random_model

    preset = PRESETS["trip-256"]
    small = dataclasses.replace(preset, unet=PRESETS["demo"].unet)  # the decoder takes nothing of it
    model, _ = random_model(small, 0)
    part = component(model, "vae_decoder", 1, default_decode_frames(preset.trip))
    export_onnx(part, tmp_path / "vae_decoder.onnx")
    assert built(tmp_path / "vae_decoder.onnx", precision, tmp_path / "out").layers > 200
