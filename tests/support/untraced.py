"""In place of trip_export.onnx_export.export_onnx, which takes seconds a graph: what tests of everything around the
trace need of it.

    monkeypatch.setattr("trip_export.export.export_onnx", untraced.graph_of_a_weight)
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from trip_engines.onnx_engine import EXTERNAL_FROM
from trip_export.components import Component

Operators = tuple[Counter[str], Counter[str]]
_DTYPES = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}


def graph_of_a_weight(part: Component, path: Path) -> Operators:
    """A graph with the component's inputs and outputs that knows nothing but its first large weight: the mean of that
    is every number of every output. Variants of a network have that weight in common, as traced ones have all."""
    name, weight = next((name, one) for name, one in part.module.named_parameters() if one.nbytes >= EXTERNAL_FROM)
    with torch.no_grad():
        made = part.module(*part.inputs.values())
    outputs = made if isinstance(made, tuple) else (made,)
    shapes = {output: tuple(one.shape) for output, one in zip(part.outputs, outputs, strict=True)}
    nodes = [helper.make_node("ReduceMean", [name], ["mean"], keepdims=0)]
    nodes += [helper.make_node("Expand", ["mean", f"shape of {output}"], [output]) for output in shapes]
    graph = helper.make_graph(
        nodes,
        part.name,
        [helper.make_tensor_value_info(key, _DTYPES[one.dtype], one.shape) for key, one in part.inputs.items()],
        [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in shapes.items()],
        [
            numpy_helper.from_array(weight.detach().numpy(), name),
            *(numpy_helper.from_array(np.array(shape), f"shape of {output}") for output, shape in shapes.items()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    weights = path.with_suffix(".weights").name
    onnx.save(model, path, save_as_external_data=True, location=weights, size_threshold=EXTERNAL_FROM)
    return _counted(model)


def graphs_of(bundle: Path) -> Callable[[Component, Path], Operators]:
    """The graphs of `bundle`, an fp32 one of the same checkpoint and shapes, as they were when they were traced."""

    def graph(part: Component, path: Path) -> Operators:
        (traced,) = bundle.glob(f"{part.name}-*.onnx")
        model = onnx.load(traced, load_external_data=False)
        weights = path.with_suffix(".weights")
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    if not weights.exists():
                        shutil.copy(bundle / entry.value, weights)
                    entry.value = weights.name
        onnx.save(model, path)
        return _counted(model)

    return graph


def _counted(model: onnx.ModelProto) -> Operators:
    count = Counter(node.op_type for node in model.graph.node)
    return count, count
