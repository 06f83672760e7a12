"""Half precision as a graph's own dtypes: which nodes compute in fp16 or bf16 and which stay fp32, chosen by measured
error.

Engines are strongly typed: TensorRT 11 has no precision flags and the other engines never had, so what the ONNX says is
what runs. A graph's inputs and outputs keep their documented fp32 dtypes; casts stand where the two precisions meet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import version_converter

from trip_engines.emulation import LARGEST, MASKED, MOVEMENT, Emulation
from trip_engines.parity import MAX_COMPONENT_RMS
from trip_engines.recording import Sample
from trip_rt.accuracy import NOT_A_NUMBER, relative_errors
from trip_rt.errors import EngineError

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
# ONNX has bf16 convolutions and instance normalisations only since opset 22.
_BF16_OPSET = 22
_KINDS = {
    "Conv": "convolution",
    "ConvTranspose": "convolution",
    "MatMul": "matrix product",
    "Gemm": "matrix product",
    "Softmax": "softmax",
}
_NORMALISATIONS = frozenset(["InstanceNormalization", "LayerNormalization", "GroupNormalization", "BatchNormalization"])
# Half precision is for tensor cores, and these are what tensor cores do: they go back to fp32 last.
_HEAVY = ("convolution", "matrix product")
_CLOSE = 0.8  # of the parity bound, since figures of a few samples must hold for others too
_SAMPLES = 3


@dataclass(frozen=True)
class Group:
    """Nodes that change precision together: of one kind and, where a whole kind would be too much, of one block of the
    network."""

    kind: str
    block: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} in {self.block}" if self.block else self.kind

    @staticmethod
    def named(name: str) -> Group:
        """The group whose `str` is `name`."""
        kind, _, block = name.partition(" in ")
        return Group(kind, block or None)


@dataclass(frozen=True)
class Policy:
    """Which groups stay fp32, and the figures behind that choice.

    `error` is the RMS error relative to the reference with all other groups in half precision, `errors_alone` the same
    with one kind in half precision alone. `largest` names the node with the largest half-precision value, and that
    value.
    """

    fp32: tuple[Group, ...]
    error: float
    errors_alone: Mapping[str, float] = field(default_factory=dict)
    largest: tuple[str, float] = ("", 0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "kept_fp32": [str(group) for group in self.fp32],
            "rms_error": _short(self.error),
            "rms_error_of_kind_alone": {kind: _short(error) for kind, error in self.errors_alone.items()},
            "largest_value": {"node": self.largest[0], "value": _short(self.largest[1])},
        }


# TRIP's own arithmetic around its networks: the noise prior and its gate (which are fp32 by contract), the scaling of
# latents.
ALWAYS_FP32 = (Group("own arithmetic"),)


def choose_precision(
    graph: Path, precision: str, samples: Sequence[Sample], note: Callable[[str], None] = lambda text: None
) -> Policy:
    """The policy with few fp32 groups that brings `graph` (fp32 ONNX) in `precision` well within its parity bound on
    `samples`.

    First all nodes are put into half precision at once. Where the error is too large or a value overflows, each kind of
    node is put into half precision alone and its error measured, and then the worst go back to fp32: light kinds whole,
    convolutions and matrix products block by block, and last of all unless they overflow. Errors are measured by
    trip_engines.emulation. EngineError naming the node where values overflow or are NaN even so.
    """
    samples = [samples[i] for i in sorted(set(np.linspace(0, len(samples) - 1, _SAMPLES).round().astype(int)))]
    target = _CLOSE * MAX_COMPONENT_RMS[precision]

    def error_of(fp32: Sequence[Group]) -> Policy:
        return _measure(graph, precision, tuple(fp32), samples)

    policy = error_of(ALWAYS_FP32)
    note(f"error of all nodes in {precision}: {_said(policy.error)}")
    if policy.error <= target:
        return policy
    kinds = sorted(
        {kind for kind, _ in _groups(ir.load(graph)).values() if kind not in ("movement", ALWAYS_FP32[0].kind)}
    )
    alone = {
        kind: error_of([*ALWAYS_FP32, *(Group(other) for other in kinds if other != kind)]).error for kind in kinds
    }
    note(
        f"error of one kind of node in {precision}: "
        + ", ".join(f"{kind} {_said(error)}" for kind, error in alone.items())
    )
    for group in _candidates(graph, kinds, alone, error_of):
        if policy.error <= target:
            break
        policy = error_of([*policy.fp32, group])
        note(f"kept in fp32: {group}; error now {_said(policy.error)}")
    if policy.error >= NOT_A_NUMBER:
        node, value = policy.largest
        raise EngineError(
            f"{graph.name}: {node} gave {value:g}, which {precision} cannot hold; check the checkpoint, or export in"
            " bf16 or fp32"
        )
    return Policy(policy.fp32, policy.error, alone, policy.largest)


def _candidates(
    graph: Path, kinds: Sequence[str], alone: Mapping[str, float], error_of: Callable[[Sequence[Group]], Policy]
) -> Iterator[Group]:
    """Groups in the order in which they go back to fp32: what overflows by itself, then light kinds, then heavy ones,
    each from the worst on."""
    worst_first = sorted(kinds, key=lambda kind: -alone[kind])
    later = []
    for kind in (kind for kind in worst_first if kind in _HEAVY and alone[kind] >= NOT_A_NUMBER):
        for group, error in _blocks(graph, kind, kinds, error_of):
            if error < NOT_A_NUMBER:
                later.append(group)
            else:
                yield group
    yield from (Group(kind) for kind in worst_first if kind not in _HEAVY)
    yield from later
    for kind in (kind for kind in worst_first if kind in _HEAVY and alone[kind] < NOT_A_NUMBER):
        yield from (group for group, _ in _blocks(graph, kind, kinds, error_of))


def _blocks(
    graph: Path, kind: str, kinds: Sequence[str], error_of: Callable[[Sequence[Group]], Policy]
) -> list[tuple[Group, float]]:
    """The blocks that have nodes of a kind, and the error of each alone in half precision, the worst first."""
    blocks = sorted({block for node_kind, block in _groups(ir.load(graph)).values() if node_kind == kind})
    others = [Group(other) for other in kinds if other != kind]
    errors = []
    for block in blocks:
        rest = [Group(kind, other) for other in blocks if other != block]
        errors.append((Group(kind, block), error_of([*ALWAYS_FP32, *others, *rest]).error))
    return sorted(errors, key=lambda row: -row[1])


def emulated(
    graph: Path, precision: str, fp32: Sequence[Group], threads: int | None = None, watch: bool = False
) -> Emulation:
    """`graph` (fp32 ONNX) opened for emulation with every node outside the groups `fp32` in half precision. A file is
    written beside it meanwhile."""
    candidate = graph.with_name(f"candidate-{graph.name}")
    try:
        # The weights stay in their file; the graph casts them.
        ir.save(typed_graph(ir.load(graph), precision, fp32), candidate)
        return Emulation(candidate, threads, watch)
    finally:
        candidate.unlink(missing_ok=True)


def _measure(graph: Path, precision: str, fp32: tuple[Group, ...], samples: Sequence[Sample]) -> Policy:
    emulation = emulated(graph, precision, fp32, watch=True)
    error, largest = 0.0, ("", 0.0)
    for sample in samples:
        (output, *_), peaks = emulation.run_watched(sample.inputs)
        if overflow := next((peak for peak in peaks if not peak.fits), None):
            return Policy(fp32, NOT_A_NUMBER, {}, (overflow.node, overflow.value))
        error = max(error, relative_errors(output, sample.output)[1])
        halves = [(peak.node, peak.value) for peak in peaks if peak.dtype == HALF[precision].name]
        largest = max([largest, *halves], key=lambda row: row[1])
    return Policy(fp32, error, {}, largest)


def typed_graph(model: ir.Model, precision: str, fp32: Sequence[Group]) -> ir.Model:
    """`model`, fp32, with every node outside the groups `fp32` in half precision; weights are cast in the graph
    (`fold_weights` makes them half)."""
    if precision == "bf16":
        version_converter.convert_version(model, _BF16_OPSET)
    graph, half = model.graph, HALF[precision]
    groups = _groups(model)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def cast(value: ir.Value, dtype: ir.DataType, before: ir.Node | None) -> ir.Value:
        if (value, dtype) not in casts:
            node = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}/to_{dtype.name.lower()}")
            node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = (
                f"{value.name}.{dtype.name.lower()}",
                dtype,
                value.shape,
            )
            if before is None:
                graph.append(node)
            else:
                graph.insert_before(before, node)
            casts[value, dtype] = node.outputs[0]
        return casts[value, dtype]

    for node in list(graph):
        kind, block = groups[node]
        floats = [
            (index, value)
            for index, value in enumerate(node.inputs)
            if value is not None and _is_float(value) and not _stays_fp32(node, index)
        ]
        if kind == "movement":
            dtype = half if any(value.dtype == half for _, value in floats) else ir.DataType.FLOAT
        else:
            dtype = ir.DataType.FLOAT if Group(kind) in fp32 or Group(kind, block) in fp32 else half
        for index, value in floats:
            if value.dtype != dtype:
                node.replace_input_with(index, cast(value, dtype, node))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and node.op_type != "Cast":
                value.dtype = dtype
    for index, output in enumerate(graph.outputs):
        if output.dtype == half:
            name, output.name = output.name, f"{output.name}.{half.name.lower()}"
            widened = cast(output, ir.DataType.FLOAT, None)
            widened.name, widened.type = name, ir.TensorType(ir.DataType.FLOAT)
            graph.outputs[index] = widened
    return model


def fold_weights(model: ir.Model) -> None:
    """Replace every cast of a weight by the cast weight, in place. EngineError naming a weight that half precision
    cannot hold."""
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Cast" else None
        if weight is None or weight.const_value is None or not weight.is_initializer():
            continue
        (cast,) = node.outputs
        assert cast.dtype and cast.shape is not None and cast.name and weight.name
        value = ir.Value(
            name=cast.name, type=cast.type, shape=cast.shape, const_value=_cast_tensor(weight.const_value, cast.dtype)
        )
        cast.replace_all_uses_with(value)
        graph.remove(node, safe=True)
        graph.register_initializer(value)
        if not weight.uses():
            del graph.initializers[weight.name]


def _cast_tensor(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.LazyTensor:
    """`tensor` in `dtype`, cast when it is written, so that no more than one weight is in memory."""
    sizes = np.abs(tensor.numpy())
    if ((sizes > LARGEST[dtype.name]) & (sizes < MASKED)).any():
        raise EngineError(f"{tensor.name}: holds weights that {dtype.name.lower()} cannot; export in bf16 or fp32")

    def cast() -> ir.TensorProtocol:
        with np.errstate(over="ignore"):  # masks become minus infinity
            return ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype, name=tensor.name)

    return ir.LazyTensor(cast, dtype, ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _groups(model: ir.Model) -> dict[ir.Node, tuple[str, str]]:
    """Kind and block of every node."""
    only_time = {value for value in model.graph.inputs if value.name == "timestep"}
    groups = {}
    for node in model.graph:
        sources = [value for value in node.inputs if value is not None and not value.is_initializer()]
        if sources and all(value in only_time for value in sources):
            only_time.update(node.outputs)
        groups[node] = (_kind(node, bool(sources) and node.outputs[0] in only_time), _block(node.name or ""))
    return groups


def _kind(node: ir.Node, is_time: bool) -> str:
    if node.op_type in MOVEMENT:
        return "movement"
    if is_time:
        return "time embedding"
    if node.op_type in _NORMALISATIONS:
        return "normalisation"
    if (node.name or "").startswith("/"):  # no module's: onnx_export names nodes after theirs
        return ALWAYS_FP32[0].kind
    if node.op_type == "Add" and not any(value is None or value.is_initializer() for value in node.inputs):
        return "sum"  # of a residual branch, mostly: where errors of all layers gather
    return _KINDS.get(node.op_type, "elementwise")


def _block(name: str) -> str:
    """The module path down to its first number, such as `decoder.up_blocks.2`."""
    module = name.rpartition("/")[0]
    numbered = re.match(r"[^0-9]*?\.\d+(?=\.|$)", module)
    return numbered.group() if numbered else module.split(".")[0]


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _stays_fp32(node: ir.Node, index: int) -> bool:
    return node.op_type == "Resize" and index in (1, 2)  # region and scales are fp32 whatever the data are


def _said(error: float) -> str:
    return f"{error:.1e}" if error < NOT_A_NUMBER else "an overflow"


def _short(number: float) -> float:
    return float(f"{number:.3g}")
