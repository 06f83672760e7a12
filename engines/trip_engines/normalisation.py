"""Normalisation over very many numbers, in fp32: engines sum them one after the other, and so inexactly.

Of a full-size VAE a group is 262 144 numbers. ONNX Runtime's and OpenVINO's InstanceNormalization is off by 1e-6 and
5e-7 of the result there, PyTorch's by 5e-8, and the VAE's encoder, which has several in a row, misses fp32's parity
bound.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

LARGE = 1 << 16  # numbers; below, a single sum is exact enough, and the operator is faster


def sum_in_stages(model: ir.Model) -> int:
    """Spell out each InstanceNormalization over LARGE numbers or more, in place, with its two means taken in two stages
    of √n numbers each; returns how many those are.

    The second stage is a ReduceSum and a product, since OpenVINO would join two ReduceMeans to a single one again.
    """
    large = [node for node in model.graph if node.op_type == "InstanceNormalization" and _numbers(node) >= LARGE]
    for node in large:
        _spell_out(model.graph, node)
    return len(large)


def _numbers(node: ir.Node) -> int:
    shape = node.outputs[0].shape
    return math.prod(shape.numpy()[2:]) if shape is not None else 0


def _spell_out(graph: ir.Graph, node: ir.Node) -> None:
    (x, scale, bias), output = node.inputs, node.outputs[0]
    assert x is not None and scale is not None and bias is not None and output.shape is not None
    shape, numbers = output.shape.numpy(), _numbers(node)
    rows = next(rows for rows in range(math.isqrt(numbers), 0, -1) if numbers % rows == 0)
    split = (*shape[:2], rows, numbers // rows)
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5

    def step(op_type: str, *inputs: ir.Value, shape: tuple[int, ...] = split) -> ir.Value:
        made = ir.node(op_type, inputs, name=f"{node.name}.{len(steps)}")
        made.outputs[0].name = f"{output.name}.{len(steps)}"
        made.outputs[0].type, made.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        graph.insert_before(node, made)
        steps.append(made)
        return made.outputs[0]

    def constant(numbers: Any, kind: type) -> ir.Value:
        array: NDArray[Any] = np.array(numbers, kind)
        name = f"{output.name}.constant_{len(graph.initializers)}"
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        graph.register_initializer(value)
        return value

    def mean(of: ir.Value) -> ir.Value:
        first = step("ReduceMean", of, constant([-1], np.int64), shape=(*split[:3], 1))
        total = step("ReduceSum", first, constant([-2], np.int64), shape=(*split[:2], 1, 1))
        return step("Mul", total, constant(1 / rows, np.float32), shape=(*split[:2], 1, 1))

    steps: list[ir.Node] = []
    row = (*split[:2], 1, 1)
    x = step("Reshape", x, constant(split, np.int64))
    centred = step("Sub", x, mean(x))
    variance = mean(step("Mul", centred, centred))
    deviation = step("Sqrt", step("Add", variance, constant(epsilon, np.float32), shape=row), shape=row)
    normal = step("Div", centred, deviation)
    for op_type, value, neutral in ("Mul", scale, 1.0), ("Add", bias, 0.0):
        if value.const_value is None or (value.const_value.numpy() != neutral).any():
            sides = step("Reshape", value, constant((split[1], 1, 1), np.int64), shape=(split[1], 1, 1))
            normal = step(op_type, normal, sides)
    normal = step("Reshape", normal, constant(shape, np.int64), shape=tuple(shape))
    output.replace_all_uses_with(normal, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    normal.name = output.name
