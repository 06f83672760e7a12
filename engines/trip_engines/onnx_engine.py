"""An ONNX graph as an engine of the bundle: checked, in its precision, its weights in a file of their own that other graphs may share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from trip_engines.precision import choose_precision, fold_weights, typed_graph
from trip_engines.reference import Sample
from trip_rt.bundle import file_sha256

EXTERNAL_FROM = 1024  # bytes: tensors of that size go into the weights file


def to_precision(graph: Path, precision: str, samples: Sequence[Sample], note: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The fp32 `graph` in `precision`, in a folder beside it, and the policy that was chosen on `samples`; fp32 is the graph itself."""
    if precision == "fp32":
        return graph, {}
    policy = choose_precision(graph, precision, samples, note)
    model = typed_graph(ir.load(graph), precision, policy.fp32)
    fold_weights(model)
    typed = graph.parent / precision / graph.name
    typed.parent.mkdir(exist_ok=True)
    ir.save(model, typed, external_data=typed.with_suffix(".weights").name, size_threshold_bytes=EXTERNAL_FROM)
    return typed, policy.to_json()


def finish_onnx_engine(graph: Path, destination: Path) -> tuple[str, ...]:
    """Check `graph` and move it to `destination`, its weights (`graph` ending in .weights) beside that under a name made of their hash.

    Returns the files' names, the graph first. Moving the graph is the last act and atomic. Raises onnx.checker.ValidationError, or ValueError for a
    dynamic shape.
    """
    onnx.checker.check_model(graph, full_check=True)
    model = onnx.load(graph, load_external_data=False)
    for value in [*model.graph.input, *model.graph.output]:
        if any(not dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim):
            raise ValueError(f"{value.name}: found a dynamic shape, expected a static one; the exporter lost a constant")
    names = [destination.name]
    weights = graph.with_suffix(".weights")
    if weights.exists():
        names.append(f"{graph.stem}-{file_sha256(weights)[:16]}.weights")
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = names[1]
        os.replace(weights, destination.with_name(names[1]))
    graph.write_bytes(model.SerializeToString(deterministic=True))
    os.replace(graph, destination)
    return tuple(names)
