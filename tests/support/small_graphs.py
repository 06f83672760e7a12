"""ONNX graphs of a few nodes, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

FP16, BF16, FP32 = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT


def saved(
    folder: Path, nodes: list[Any], dtype: int = FP32, opset: int = 18, out: int | None = None, **model: Any
) -> Path:
    """An ONNX file of these nodes: inputs a and b [4, 4] of `dtype` and c, a bool; output y."""
    inputs = [helper.make_tensor_value_info(name, dtype, [4, 4]) for name in "ab"] + [
        helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    ]
    initializers = model.pop("initializer", [])
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", out or dtype, None)], initializers
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("ours", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, **model), folder / "graph.onnx")
    return folder / "graph.onnx"


def initializer(name: str, value: Any) -> Any:
    return onnx.numpy_helper.from_array(np.asarray(value), name)
