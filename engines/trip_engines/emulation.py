"""A half-precision graph on a CPU without such arithmetic: sums in fp32, and every half-precision value rounded where
it is stored.

That is what tensor cores do: products of halves summed in fp32. Softmax and instance normalisation are spelled out,
each of their steps rounded, since an engine may keep their statistics in half precision too; LayerNormalization's are
fp32 by its definition in ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trip_rt.backends import EngineOptions
from trip_rt.backends.base import Engine, HostEngine
from trip_rt.backends.onnxruntime import library
from trip_rt.devices import Device, Kind, open_device
from trip_rt.manifest import EngineSpec

# Data movement has no arithmetic: it runs in the precision of its data, and rounds nothing.
MOVEMENT = frozenset(
    [
        "Reshape",
        "Transpose",
        "Concat",
        "Split",
        "Slice",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Flatten",
        "Identity",
        "Pad",
        "Tile",
        "Gather",
        "Where",
    ]
)
LARGEST = {"FLOAT16": 65504.0, "BFLOAT16": 3.39e38, "FLOAT": 3.4e38}
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOATS = (*_HALF, ir.DataType.FLOAT)
_PEAK = "largest of "
_ADDING = MOVEMENT | {"Cast", "Add"}  # what may stand between a mask and a softmax
MASKED = 1e30  # constants beyond this stand for minus infinity, and become it in half precision without harm
_LARGEST_MASK = 1 << 24  # bytes; weights are larger, and costly to search


@dataclass(frozen=True)
class Peak:
    """The largest absolute value of a node's output, before rounding; NaN where the output holds NaN or infinity."""

    node: str
    dtype: str
    value: float

    @property
    def fits(self) -> bool:
        return self.value <= LARGEST[self.dtype]


class Emulation:
    """The ONNX file `graph`, opened for emulation; its external weights are found beside it, and stay there. Peaks are
    known where `watch` asks for them, which takes half as long again."""

    def __init__(self, graph: Path, threads: int | None = None, watch: bool = False):
        model = ir.load(graph)
        self._outputs = [value.name or "" for value in model.graph.outputs]
        self._watched = _emulate(model, watch)
        path = graph.with_name(f"emulated-{graph.name}")
        try:
            ir.save(model, path)
            onnxruntime = library()
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = threads or 0
            # Every value is freed after its last use. Reused, buffers outlive their values: 9 GB of them in the full
            # UNet, in place of 3.
            options.enable_mem_reuse = options.enable_mem_pattern = False
            # As written and in the order of the file: no fusion reaches across a rounding, and one weight is rounded at
            # a time, just before it is used. Folded, or in an order of the library's, all would be in memory at once.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        finally:
            path.unlink(missing_ok=True)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The graph's outputs."""
        return self._run(self._outputs, inputs)

    def run_watched(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[list[NDArray[Any]], list[Peak]]:
        """The graph's outputs, and the peaks of its arithmetic nodes in their order."""
        results = self._run([*self._outputs, *(f"{_PEAK}{name}" for name, _ in self._watched)], inputs)
        peaks = [
            Peak(name, dtype, float(value))
            for (name, dtype), value in zip(self._watched, results[len(self._outputs) :], strict=True)
        ]
        return results[: len(self._outputs)], peaks

    def _run(self, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        options = library().RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")  # or it kept the largest call's
        return list(self._session.run(outputs, dict(inputs), options))


class EmulatedEngine(HostEngine):
    """ONNX Runtime's engines of a bundle, emulated: what parity is measured on where no engine has the bundle's
    precision."""

    backend = "onnxruntime"

    def __init__(self, spec: EngineSpec, emulation: Emulation, device: Device):
        super().__init__(spec, device)
        self._emulation: Emulation | None = emulation

    @classmethod
    def probe(cls, spec: EngineSpec, options: EngineOptions) -> Kind:
        return "cpu"

    @classmethod
    def open(cls, path: Path, spec: EngineSpec, options: EngineOptions, device: Device | None = None) -> Engine:
        return cls(spec, Emulation(path, options.threads), device or open_device("cpu"))

    def compute(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self._emulation is None:
            raise self.closed_error()
        return {
            tensor.name: array for tensor, array in zip(self.spec.outputs, self._emulation.run(inputs), strict=True)
        }

    def describe(self) -> dict[str, Any]:
        return {"backend": "emulation", "version": library().__version__, "device": "cpu"}

    def close(self) -> None:
        self._emulation = None
        super().close()


def _emulate(model: ir.Model, watch: bool) -> list[tuple[str, str]]:
    """Turn the typed graph into one of fp32 values with roundings, in place; returns names and dtypes of the nodes
    whose values are watched, if any are.

    Every watched node gets an output of its own, its peak.
    """
    graph = model.graph
    watched: list[tuple[str, str]] = []
    nodes, masked = list(graph), _masked(graph)
    place = {node: index for index, node in enumerate(nodes)}
    for weight in [value for value in graph.initializers.values() if value.dtype in _HALF]:
        users = tuple(weight.uses())
        first = min((node for node, _ in users), key=place.__getitem__)
        _replace(users, _insert(graph, first, "Cast", weight, to=ir.DataType.FLOAT))
    for node, following in zip(nodes, [*nodes[1:], None], strict=True):
        output, dtype = node.outputs[0], node.outputs[0].dtype
        users = tuple(output.uses())
        exact: ir.Value | None = output
        if dtype in _HALF and node.op_type == "Cast":
            exact = node.inputs[0]
            _replace(users, _insert(graph, following, "Cast", output, to=ir.DataType.FLOAT))
        elif dtype in _HALF:
            for value in node.outputs:
                value.dtype = ir.DataType.FLOAT
            if node.op_type not in MOVEMENT:
                exact = _spell_out(graph, node, dtype)
                _replace(users, _rounded(graph, following, exact, dtype))
                if exact is not output:
                    graph.remove(node)
        # Not watched: weights (fold_weights checks them), integers, and numbers that are meant to be minus infinity.
        if (
            not watch
            or exact is None
            or exact.is_initializer()
            or dtype not in _FLOATS
            or node.op_type in MOVEMENT
            or node in masked
        ):
            continue
        watched.append((node.name or "", dtype.name))
        _watch(graph, following, exact, f"{_PEAK}{node.name}")
    return watched


def _watch(graph: ir.Graph, before: ir.Node | None, value: ir.Value, name: str) -> None:
    """Add the peak of `value` to the graph's outputs. ReduceMax passes over NaN, so NaN is let in through a sum."""

    def step(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return _insert(graph, before, op_type, *inputs, **attributes)

    size = step("Abs", value)
    largest, total = (step(op_type, size, keepdims=0) for op_type in ("ReduceMax", "ReduceSum"))
    peak = step("Add", largest, step("Sub", total, total))
    peak.name, peak.type, peak.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph.outputs.append(peak)


def _masked(graph: ir.Graph) -> set[ir.Node]:
    """Nodes whose numbers may stand for minus infinity: those that a mask is added to, up to the softmax."""
    constants = {
        value
        for value in graph.initializers.values()
        if any(node.op_type in _ADDING for node in value.consumers()) and _is_mask(value.const_value)
    }
    masked: set[ir.Node] = set()
    for node in graph:
        if node.op_type in _ADDING and any(
            value in constants or (value and value.producer() in masked) for value in node.inputs
        ):
            masked.add(node)
    return masked


def _is_mask(tensor: ir.TensorProtocol | None) -> bool:
    return (
        tensor is not None
        and tensor.nbytes <= _LARGEST_MASK
        and bool((np.abs(tensor.numpy().astype(np.float32)) >= MASKED).any())
    )


def _spell_out(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> ir.Value:
    """The value of `node`, not yet rounded: its own output or, of a reduction, that of nodes in its place, all but the
    last of them rounded."""

    def step(op_type: str, *inputs: ir.Value | None) -> ir.Value:
        return _insert(graph, node, op_type, *inputs)

    def rounded(op_type: str, *inputs: ir.Value | None) -> ir.Value:
        return _rounded(graph, node, step(op_type, *inputs), dtype)

    def constant(numbers: Any, kind: type) -> ir.Value:
        value = ir.Value(
            name=f"{node.name}/constant_{len(graph.initializers)}", const_value=ir.tensor(np.array(numbers, kind))
        )
        graph.register_initializer(value)
        return value

    x = node.inputs[0]
    assert x is not None
    if node.op_type == "Softmax":
        axis = constant([node.attributes["axis"].as_int() if "axis" in node.attributes else -1], np.int64)
        powers = rounded("Exp", rounded("Sub", x, step("ReduceMax", x, axis)))
        return step("Div", powers, rounded("ReduceSum", powers, axis))
    if node.op_type == "InstanceNormalization":
        shape = node.outputs[0].shape
        assert shape is not None
        rank = len(shape)
        places, channels = constant(range(2, rank), np.int64), constant(range(1, rank - 1), np.int64)
        centred = rounded("Sub", x, rounded("ReduceMean", x, places))
        variance = rounded("ReduceMean", rounded("Mul", centred, centred), places)
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        deviation = rounded("Sqrt", step("Add", variance, constant(epsilon, np.float32)))
        scale, bias = (step("Unsqueeze", value, channels) for value in node.inputs[1:])
        return step("Add", rounded("Mul", rounded("Div", centred, deviation), scale), bias)
    return node.outputs[0]


def _rounded(graph: ir.Graph, before: ir.Node | None, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    return _insert(graph, before, "Cast", _insert(graph, before, "Cast", value, to=dtype), to=ir.DataType.FLOAT)


def _insert(
    graph: ir.Graph, before: ir.Node | None, op_type: str, *inputs: ir.Value | None, **attributes: Any
) -> ir.Value:
    """The output of a new node, which is placed before another one or at the end."""
    node = ir.node(op_type, inputs, attributes)
    if before is None:
        graph.append(node)
    else:
        graph.insert_before(before, node)
    return node.outputs[0]


def _replace(users: Sequence[tuple[ir.Node, int]], value: ir.Value) -> None:
    for node, index in users:
        node.replace_input_with(index, value)
