"""Every graph that we export, in every precision, goes through NVIDIA's own parser and builder.

The demo's graphs do so in every test run, those of `bench` and one component of the full size in the slow one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from ml_dtypes import float8_e4m3fn
from onnx import TensorProto, helper, numpy_helper

from trip_engines.precision import ALWAYS_FP32, fold_weights, typed_graph
from trip_engines.tensorrt_build import BuildOptions, BuiltPlan, build_engine
from trip_rt.components import ALL, REQUIRED, VARIANTS
from trip_rt.config import ControlConfig
from trip_rt.errors import InputError

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
WITHOUT_CONTROL = (*REQUIRED, *VARIANTS)
PRECISIONS = ("fp32", "fp16", "bf16")
OPTIONS = BuildOptions(capabilities=("8.9",))


def graph_of(checkpoint: Path, name: str, folder: Path, control: ControlConfig | None = None) -> Path:
    """The fp32 graph of a checkpoint's component, with a fresh control if one is asked for."""
    from trip_export.components import component, default_decode_frames
    from trip_export.onnx_export import export_onnx
    from trip_reference.checkpoint import from_pretrained

    model = from_pretrained(checkpoint, only=ALL[name].part)
    if control:
        model.add_control(control)
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


@pytest.mark.parametrize("name", WITHOUT_CONTROL)
def test_the_demos_graphs_are_parsed_and_built(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = graph_of(DEMO, name, tmp_path)
    for precision in PRECISIONS:
        plan = built(graph, precision, tmp_path / precision)
        assert plan.layers > 20 and plan.bytes > 1e5 and plan.capabilities == ("8.9",)


@pytest.mark.parametrize("name", ["control_encoder", "unet", "unet_unguided_shallow"])
def test_the_graphs_of_a_steered_demo_are_parsed_and_built(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = graph_of(DEMO, name, tmp_path, ControlConfig("motion", 96, 4))
    for precision in PRECISIONS if name == "control_encoder" else ("fp16",):
        assert built(graph, precision, tmp_path / precision).layers > 5


@pytest.mark.slow
def test_the_benchs_graphs_are_parsed_and_built(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from trip_reference.presets import PRESETS
    from trip_reference.random_checkpoint import save_random

    save_random(PRESETS["bench"], tmp_path / "bench")
    for name in WITHOUT_CONTROL:
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


# 8 bits: what the builder takes of quantised graphs, made by hand


def in_8_bits(graph: Path, kind: str, destination: Path) -> int:
    """The demo's graph in fp16 with its convolutions and matrix products on 8-bit values: inputs quantised and widened
    again by one scale, weights stored in 8 bits with a scale for each output channel. Returns how many those are."""
    typed = typed_graph(ir.load(graph), "fp16", ALWAYS_FP32)
    fold_weights(typed)
    model = ir.to_proto(typed)
    dtype, largest = (TensorProto.INT8, 127) if kind == "int8" else (TensorProto.FLOAT8E4M3FN, 448)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 19))  # the first whose QuantizeLinear knows fp8
    zero = helper.make_tensor("zero", dtype, [], b"\0", raw=True)
    model.graph.initializer.extend([zero, numpy_helper.from_array(np.array(0.02, np.float16), "scale")])
    nodes, changed = [], 0
    for node in model.graph.node:
        weight = weights.get(node.input[1]) if node.op_type in ("Conv", "MatMul") else None
        if weight is not None and weight.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(weight).astype(np.float32)
            axis = 0 if node.op_type == "Conv" else values.ndim - 1
            others = tuple(side for side in range(values.ndim) if side != axis)
            scales = np.maximum(np.abs(values).max(others) / largest, 1e-4).astype(np.float16)
            shape = [-1 if side == axis else 1 for side in range(values.ndim)]
            scaled = values / scales.astype(np.float32).reshape(shape)
            stored = (
                np.round(scaled).clip(-127, 127).astype(np.int8) if kind == "int8" else scaled.astype(float8_e4m3fn)
            )
            name, x = f"{node.name}.8", node.input[0]
            raw = stored.view(np.uint8).tobytes()
            zeros = helper.make_tensor(f"{name}.zeros", dtype, scales.shape, bytes(scales.size), raw=True)
            narrow = helper.make_tensor(f"{name}.w", dtype, values.shape, raw, raw=True)
            model.graph.initializer.extend([narrow, zeros, numpy_helper.from_array(scales, f"{name}.scales")])
            nodes += [
                helper.make_node("QuantizeLinear", [x, "scale", "zero"], [f"{name}.q"], name=f"{name}/Quantize"),
                helper.make_node("DequantizeLinear", [f"{name}.q", "scale", "zero"], [f"{name}.x"], name=f"{name}/De"),
                helper.make_node(
                    "DequantizeLinear",
                    [f"{name}.w", f"{name}.scales", f"{name}.zeros"],
                    [f"{name}.wide"],
                    axis=axis,
                    name=f"{name}/Weight",
                ),
            ]
            node.input[0], node.input[1] = f"{name}.x", f"{name}.wide"
            changed += 1
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, destination)
    return changed


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["vae_encoder", "tnf"])
def test_8_bit_convolutions_and_products_are_built_where_the_gpu_has_them(name: str, kind: str, tmp_path: Path) -> None:
    """Every GPU has int8; fp8 begins at 8.9, and the builder says so of the others."""
    pytest.importorskip("tensorrt_rtx")
    eight = tmp_path / "eight.onnx"
    assert in_8_bits(graph_of(DEMO, name, tmp_path), kind, eight) > 10
    new, all_of_them = BuildOptions(capabilities=("8.9", "12.0")), BuildOptions(capabilities=("8.6", "8.9", "12.0"))
    (plan,), _ = build_engine(eight, tmp_path / "new.plan", "tensorrt-rtx", "fp16", new)
    assert plan.layers > 200
    if kind == "int8":
        build_engine(eight, tmp_path / "all.plan", "tensorrt-rtx", "fp16", all_of_them)
    else:
        with pytest.raises(InputError, match=r"for compute capability 8.6 \(HW-specific datatypes: fp8_e4m3\); leave"):
            build_engine(eight, tmp_path / "all.plan", "tensorrt-rtx", "fp16", all_of_them)
