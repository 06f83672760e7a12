"""One component to an ONNX graph beside its weights."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from trip_engines.onnx_engine import EXTERNAL_FROM
from trip_export.components import Component

OPSET = 18
# What the exporter's trace writes where a shape was computed: none may be left, since engines want shapes that stand
# still.
DYNAMIC_SHAPE_OPERATORS = frozenset(
    {"Shape", "Size", "Range", "NonZero", "Loop", "If", "Scan", "SequenceAt", "SplitToSequence", "ConstantOfShape"}
)
_LARGEST_MASK = 1 << 24  # bytes
# Component modules wrap the networks (components.Call); these prefixes are theirs and say nothing.
_WRAPPER = re.compile(r"^(function|owned\.0)(\.|$)")


def export_onnx(component: Component, path: Path) -> tuple[Counter[str], Counter[str]]:
    """Write `component` to `path` as fp32 ONNX with static shapes and its documented tensor names, its weights in
    `path` with the ending .weights.

    Nodes are called after the module they come from, such as `unet.mid_block.resnets.0.conv1/Conv_3`; the trace's own
    paths and stacks are dropped, so the same model gives the same bytes wherever it is exported. Returns how
    often each operator occurs, as traced and as written. The component's weights are gone afterwards. ValueError where
    shape arithmetic is left.
    """
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            component.module.eval(),
            tuple(component.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(component.inputs),
            output_names=list(component.outputs),
            optimize=False,
            verbose=False,
        )
        assert program is not None
        model = program.model
        before = operators(model)
        program.optimize()
        passes.CommonSubexpressionEliminationPass()(model)
        passes.DeduplicateInitializersPass()(model)
        _store_once(model)
        _store_reshaped(model)
        passes.RemoveUnusedNodesPass()(model)
        passes.ShapeInferencePass()(model)
    after = operators(model)
    if left := DYNAMIC_SHAPE_OPERATORS & set(after):
        raise ValueError(
            f"{component.name}: {', '.join(sorted(left))} left in the graph, expected static shapes; the exporter lost"
            " a constant"
        )
    for value, name in zip(model.graph.inputs, component.inputs, strict=True):
        value.name = name  # an input that is passed through as the output was given another
    _name_nodes(model)
    ir.save(model, path, external_data=path.with_suffix(".weights").name, size_threshold_bytes=EXTERNAL_FROM)
    _forget(component, model)
    return before, after


def _forget(component: Component, model: ir.Model) -> None:
    """Empty the component's weights and the graph's: torch's tracer and onnxscript's rewriting rules keep the last
    graph they saw, and with it all that it held, for as long as the process lives."""
    for tensor in (*component.module.parameters(), *component.module.buffers()):
        tensor.data = tensor.new_empty(0)
    for value in model.graph.initializers.values():
        value.const_value = None


def operators(model: ir.Model) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(node.op_type for node in model.graph.all_nodes())


def _store_once(model: ir.Model) -> None:
    """Constants repeated for every clip, as attention masks are, to one that is broadcast: the weights of all batch
    sizes are then the same bytes."""
    for value in list(model.graph.initializers.values()):
        if (
            value.const_value is None
            or value.const_value.nbytes > _LARGEST_MASK
            or not value.shape
            or value.shape[0] == 1
        ):
            continue
        array = value.const_value.numpy()
        others = [other for node, index in value.uses() for other in node.inputs[:index] + node.inputs[index + 1 :]]
        added = all(node.op_type == "Add" for node in value.consumers())
        if (
            added
            and (array == array[:1]).all()
            and all(other and other.shape and other.shape[0] == array.shape[0] for other in others)
        ):
            value.const_value = ir.tensor(array[:1].copy(), name=value.name)
            value.shape = ir.Shape(array[:1].shape)


def _store_reshaped(model: ir.Model) -> None:
    """Weights that the graph gives another shape first, as temporal convolutions' are, in that shape: the exporter
    folds none so large, and half precision would leave them in fp32."""
    for node in list(model.graph):
        weight, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type not in ("Squeeze", "Unsqueeze", "Reshape") or weight is None or weight.const_value is None:
            continue
        if not weight.is_initializer() or output.shape is None or not output.name:
            continue
        shape = output.shape.numpy()
        reshaped = ir.tensor(weight.const_value.numpy().reshape(shape), name=output.name)
        value = ir.Value(name=output.name, type=output.type, shape=ir.Shape(shape), const_value=reshaped)
        output.replace_all_uses_with(value)
        model.graph.remove(node, safe=True)
        model.graph.register_initializer(value)


def _name_nodes(model: ir.Model) -> None:
    for index, node in enumerate(model.graph.all_nodes()):
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
        module = scopes[-2] if len(scopes) > 1 else ""  # the last one is the value's own name
        node.name = f"{_WRAPPER.sub('', module)}/{node.op_type}_{index}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter narrates its passes on stdout and warns of its own deprecations; neither helps the person
    exporting."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
