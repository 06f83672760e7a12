"""The operators and types of graphs against the table of TensorRT's parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_graphs import BF16, FP16, FP32, initializer, saved

from trip_engines.tensorrt_operators import contraction_precisions, unsupported

NODE = helper.make_node
BRANCHES = {
    "then_branch": helper.make_graph(
        [NODE("Det", ["a"], ["d"])], "then", [], [helper.make_tensor_value_info("d", FP32, None)]
    ),
    "else_branch": helper.make_graph(
        [NODE("Add", ["a", "b"], ["s"])], "else", [], [helper.make_tensor_value_info("s", FP32, None)]
    ),
}


@pytest.mark.parametrize(
    ("nodes", "dtype", "problems"),
    [
        ([NODE("MatMul", ["a", "b"], ["m"]), NODE("Softmax", ["m"], ["y"])], FP16, []),
        (
            [NODE("Equal", ["a", "b"], ["e"]), NODE("Where", ["e", "a", "b"], ["y"])],
            BF16,
            [],
        ),  # Equal makes bool, its data is not
        ([NODE("CumSum", ["a", "axis"], ["y"])], FP32, []),  # the axis is int64, the data is not
        ([NODE("Shape", ["a"], ["s"]), NODE("Reshape", ["b", "s"], ["y"])], FP32, []),
        (
            [NODE("Add", ["a", "b"], ["y"])],
            TensorProto.DOUBLE,
            ["Add of DOUBLE: supported for FP32, FP16, BF16, INT32, INT64 (1 node, first y)"],
        ),
        (
            [NODE("Sigmoid", ["a"], ["y"])],
            TensorProto.INT32,
            ["Sigmoid of INT32: supported for FP32, FP16, BF16 (1 node, first y)"],
        ),
        (
            [NODE("Cast", ["a"], ["i"], to=TensorProto.INT16), NODE("Cast", ["i"], ["y"], to=FP32)],
            FP32,
            ["Cast of INT16: "],
        ),
        (
            [NODE("Det", ["a"], ["d"], name="n"), NODE("Det", ["b"], ["e"]), NODE("Add", ["d", "e"], ["y"])],
            FP32,
            ["Det: not supported (2 nodes, first n)"],
        ),
        ([NODE("If", ["c"], ["y"], **BRANCHES)], FP32, ["Det: not supported (1 node, first d)"]),
        ([NODE("Sin", ["a"], ["y"], domain="ours")], FP32, ["ours:Sin: not an operator of ONNX"]),
        ([NODE("MadeUp", ["a"], ["y"])], FP32, ["MadeUp: not supported"]),
    ],
)
def test_operators_and_types_are_held_against_the_table(
    tmp_path: Path, nodes: list[Any], dtype: int, problems: list[str]
) -> None:
    found = unsupported(saved(tmp_path, nodes, dtype, initializer=[initializer("axis", [0])]))
    assert len(found) == len(problems) and all(
        line.startswith(problem) for line, problem in zip(found, problems, strict=True)
    ), found


def test_operators_inside_functions_are_checked(tmp_path: Path) -> None:
    body = [
        NODE("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
        NODE("Exp", ["d"], ["e"]),
        NODE("Cast", ["e"], ["z"], to=FP32),
    ]
    function = helper.make_function("ours", "Precise", ["x"], ["z"], body, [helper.make_opsetid("", 18)])
    graph = saved(tmp_path, [NODE("Precise", ["a"], ["y"], domain="ours")], functions=[function])
    assert [line.partition(":")[0] for line in unsupported(graph)] == ["Cast of DOUBLE", "Exp of DOUBLE"]


def test_weights_beside_the_graph_are_not_read(tmp_path: Path) -> None:
    nodes = [NODE("MatMul", ["a", "w"], ["m"]), NODE("Unique", ["m"], ["y"])]
    graph = saved(tmp_path, nodes, FP16, initializer=[initializer("w", np.zeros((4, 4), np.float16))])
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    assert [line.partition(":")[0] for line in unsupported(graph)] == ["Unique"]
    assert contraction_precisions(graph) == {"FP16"}


def test_declared_precisions_are_those_of_products(tmp_path: Path) -> None:
    nodes = [
        NODE("Cast", ["a"], ["h"], to=FP16),
        NODE("MatMul", ["h", "h"], ["m"]),
        NODE("Cast", ["m"], ["f"], to=FP32),
        NODE("Exp", ["f"], ["y"]),
    ]
    assert contraction_precisions(saved(tmp_path, nodes)) == {"FP16"}
    assert contraction_precisions(saved(tmp_path, [*nodes[:3], NODE("MatMul", ["f", "b"], ["y"])])) == {"FP16", "FP32"}


def test_a_bundles_graphs_are_supported(tiny_bundle: Path) -> None:
    graphs = sorted(tiny_bundle.glob("*.onnx"))
    assert len(graphs) >= 5
    assert {graph.name: unsupported(graph) for graph in graphs} == {graph.name: [] for graph in graphs}
