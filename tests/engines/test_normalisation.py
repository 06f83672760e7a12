"""Normalisation over very many numbers is exact enough on every engine, in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
from onnx import helper

from trip_engines.normalisation import LARGE, sum_in_stages
from trip_engines.onnx_engine import to_precision
from trip_rt.accuracy import relative_errors


def saved(path: Path, shape: tuple[int, ...], scale: np.ndarray, bias: np.ndarray, then: str | None = None) -> Path:
    """x → InstanceNormalization → y, or another operator after it."""
    last = "h" if then else "y"
    nodes = [
        helper.make_node("InstanceNormalization", ["x", "s", "b"], [last], epsilon=1e-6, name="net.norm/Norm_0"),
        *([helper.make_node(then, ["h"], ["y"], name="net.act/Then_1")] if then else []),
    ]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy"]
    weights = [
        onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in (("s", scale), ("b", bias))
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def run_everywhere(path: Path, x: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [session.run(None, {"x": x})[0], next(iter(compiled({"x": x}).values()))]


@pytest.mark.parametrize("then", [None, "Relu"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_group_of_a_full_size_vae_is_summed_more_exactly(tmp_path: Path, plain: bool, then: str | None) -> None:
    shape, rng = (1, 4, 512, 512), np.random.default_rng(0)
    scale = np.ones(4) if plain else rng.uniform(0.5, 2, 4)
    bias = np.zeros(4) if plain else rng.standard_normal(4)
    x = (rng.standard_normal(shape) + 5).astype(np.float32)
    exact = x.astype(np.float64)
    mean, variance = exact.mean((2, 3), keepdims=True), exact.var((2, 3), keepdims=True)
    expected = (exact - mean) / np.sqrt(variance + 1e-6) * scale.reshape(4, 1, 1) + bias.reshape(4, 1, 1)
    expected = np.maximum(expected, 0) if then else expected
    path = saved(tmp_path / "g.onnx", shape, scale, bias, then)
    before = [relative_errors(found, expected)[1] for found in run_everywhere(path, x)]
    graph, policy = to_precision(path, "fp32", [], print)
    assert (graph, policy) == (path, {})
    after = [relative_errors(found, expected)[1] for found in run_everywhere(path, x)]
    assert max(after) < 2e-6 and all(better < worse / 3 for better, worse in zip(after, before, strict=True)), before


def test_the_numbers_are_split_as_evenly_as_they_can_be_and_small_groups_stay(tmp_path: Path) -> None:
    ones, zeros = np.ones(2), np.zeros(2)
    odd = ir.load(saved(tmp_path / "odd.onnx", (1, 2, 3, LARGE // 2), ones, zeros))
    assert sum_in_stages(odd) == 1
    shapes = [node.outputs[0].shape.numpy() for node in odd.graph if node.op_type == "Sub"]
    assert shapes == [(1, 2, 256, 384)]
    small = ir.load(saved(tmp_path / "small.onnx", (1, 2, 3, LARGE // 4), ones, zeros))
    assert sum_in_stages(small) == 0 and [node.op_type for node in small.graph] == ["InstanceNormalization"]
