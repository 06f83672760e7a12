"""Predicts, without TensorRT, what its ONNX parser will not take: operators and types that its documented table
lacks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import onnx
from onnx import defs, inliner

_TYPES = {
    "FLOAT": "FP32",
    "FLOAT16": "FP16",
    "BFLOAT16": "BF16",
    "FLOAT8E4M3FN": "FP8",
}  # other types have the same name in ONNX and in the table
_CONTRACTIONS = {"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"}


def unsupported(graph: Path) -> list[str]:
    """A line for each operator, or type that an operator works on, that the table lacks; [] where TensorRT should parse
    the whole ONNX file.

    The table is parser 10.1's (opset 9 to 20), so a line tells of a risk: newer parsers support more. It speaks of the
    types of an operator's data: those of its first input or output that can have several, of what must have the same
    one, and of what Cast makes. Where a value's type is neither recorded nor inferred, that value passes. Limits on
    attributes and shapes are not checked. Weights in files beside the graph are not read.
    """
    model = _load(graph)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for node, types in _nodes(model.graph, {}):
        for problem in _problems(node, types, opset):
            counts[problem] += 1
            first.setdefault(problem, node.name or node.output[0])
    return [
        f"{problem} ({count} {'node' if count == 1 else 'nodes'}, first {first[problem]})"
        for problem, count in sorted(counts.items())
    ]


def contraction_precisions(graph: Path) -> set[str]:
    """The types among FP32, FP16 and BF16 in which the ONNX file declares its convolutions and matrix products."""
    declared = {
        types.get(name)
        for node, types in _nodes(_load(graph).graph, {})
        if node.op_type in _CONTRACTIONS
        for name in node.input
    }
    return {name for name in ("FP32", "FP16", "BF16") if name in declared}


def _problems(node: Any, types: Mapping[str, str], opset: int) -> set[str]:
    if node.domain not in ("", "ai.onnx"):
        return {f"{node.domain}:{node.op_type}: not an operator of ONNX"}
    allowed = _table().get(node.op_type)
    if allowed is None:
        return {f"{node.op_type}: not supported"}
    used = {types[name] for name in _data(node, opset) if name in types}
    return {f"{node.op_type} of {name}: supported for {', '.join(allowed)}" for name in used - set(allowed)}


def _data(node: Any, opset: int) -> list[str]:
    """The values of a node whose types the table restricts."""
    try:
        schema = defs.get_schema(node.op_type, opset, "")
    except defs.SchemaError:  # an operator that ONNX has dropped and the table still lists
        return [*node.input, *node.output]
    choices = {constraint.type_param_str: len(constraint.allowed_type_strs) for constraint in schema.type_constraints}
    values = [(_variable(schema.inputs, index), name) for index, name in enumerate(node.input)]
    values += [(_variable(schema.outputs, index), name) for index, name in enumerate(node.output)]
    main = next((variable for variable, _ in values if choices.get(variable, 1) > 1), None)
    cast_outputs = list(node.output) if node.op_type in ("Cast", "CastLike") else []
    return [name for variable, name in values if variable == main] + cast_outputs


def _variable(parameters: Any, index: int) -> str:
    return str(parameters[min(index, len(parameters) - 1)].type_str)  # only the last may take more than one value


def _nodes(graph: Any, outer: Mapping[str, str]) -> Iterator[tuple[Any, Mapping[str, str]]]:
    """Every node of the graph and of graphs inside its nodes, with the element type of each value known to it."""
    types = dict(outer)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.HasField("tensor_type"):
            types[value.name] = _type(value.type.tensor_type.elem_type)
    types |= {tensor.name: _type(tensor.data_type) for tensor in graph.initializer}
    for node in graph.node:
        yield node, types
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(inner, types)


def _type(number: int) -> str:
    name: str = onnx.TensorProto.DataType.Name(number)
    return _TYPES.get(name, name)


def _load(graph: Path) -> Any:
    """The model with its functions inlined and the types of its values recorded, weights in other files left there."""
    model = inliner.inline_local_functions(onnx.load(graph, load_external_data=False))
    return onnx.shape_inference.infer_shapes(model)


@cache
def _table() -> dict[str, list[str]]:
    table = json.loads(resources.files("trip_engines").joinpath("tensorrt_operators.json").read_text(encoding="utf-8"))
    return {operator: types.split() for operator, types in table["operators"].items()}
