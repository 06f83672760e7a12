"""An ONNX graph as an engine of the bundle: checked, in its precision, its weights in a file of their own that other
graphs may share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from trip_engines.normalisation import sum_in_stages
from trip_engines.precision import Group, choose_precision, fold_weights, typed_graph
from trip_engines.recording import Sample
from trip_rt.bundle import file_sha256

EXTERNAL_FROM = 1024  # bytes: tensors of that size go into the weights file


def to_precision(
    graph: Path,
    precision: str,
    samples: Sequence[Sample],
    note: Callable[[str], None],
    like: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """The fp32 `graph` in `precision`, in a folder beside it, and the policy that was chosen on `samples`; fp32 is the
    graph itself, its largest normalisations summed in stages.

    `like` is the policy of another graph of the same network, to be followed instead.
    """
    if precision == "fp32":
        model = ir.load(graph)
        if sum_in_stages(model):
            ir.save(model, graph)  # its weights stay in their file
        return graph, {}
    if like is None:
        policy = choose_precision(graph, precision, samples, note)
        fp32, policy_json = policy.fp32, policy.to_json()
    else:
        fp32, policy_json = tuple(map(Group.named, like["kept_fp32"])), dict(like)
    model = typed_graph(ir.load(graph), precision, fp32)
    fold_weights(model)
    typed = graph.parent / precision / graph.name
    typed.parent.mkdir(exist_ok=True)
    ir.save(model, typed, external_data=typed.with_suffix(".weights").name, size_threshold_bytes=EXTERNAL_FROM)
    return typed, policy_json


def finish_onnx_engine(graph: Path, destination: Path, like: Path | None = None) -> tuple[str, ...]:
    """Check `graph` and move it to `destination`, its weights (`graph` ending in .weights) beside that under a name
    made of their hash. Where the finished graph `like` has all those weights in its file, that is referred to instead.

    Returns the files' names, the graph first. Moving the graph is the last act and atomic. Raises
    onnx.checker.ValidationError, or ValueError for a dynamic shape.
    """
    onnx.checker.check_model(graph, full_check=True)
    model = onnx.load(graph, load_external_data=False)
    for value in [*model.graph.input, *model.graph.output]:
        if any(not dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim):
            raise ValueError(
                f"{value.name}: found a dynamic shape, expected a static one; the exporter lost a constant"
            )
    names = [destination.name]
    weights = graph.with_suffix(".weights")
    if weights.exists() and weights.stat().st_size:  # a writer with only small tensors leaves an empty one
        shared = _shared(model, graph.parent, like) if like else None
        names.append(shared or f"{graph.stem}-{file_sha256(weights)[:16]}.weights")
        if not shared:
            for tensor in model.graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = names[1]
            os.replace(weights, destination.with_name(names[1]))
    graph.write_bytes(model.SerializeToString(deterministic=True))
    os.replace(graph, destination)
    return tuple(names)


def _shared(model: onnx.ModelProto, folder: Path, like: Path) -> str | None:
    """Make `model` refer to the weights file of the graph `like` and return the file's name; None where that file lacks
    some of its weights."""
    theirs, own = _regions(onnx.load(like, load_external_data=False), like.parent), _regions(model, folder)
    if not own.keys() <= theirs.keys():
        return None
    for digest, tensors in own.items():
        for tensor in tensors:
            del tensor.external_data[:]
            tensor.external_data.extend(theirs[digest][0].external_data)
    (name,) = {
        entry.value for tensors in theirs.values() for entry in tensors[0].external_data if entry.key == "location"
    }
    return str(name)


def _regions(model: onnx.ModelProto, folder: Path) -> dict[str, list[onnx.TensorProto]]:
    """The initialisers that lie in a file of `folder`, by the hash of their bytes there."""
    regions: dict[str, list[onnx.TensorProto]] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            region = np.memmap(
                folder / place["location"], np.uint8, "r", int(place.get("offset", 0)), (int(place["length"]),)
            )
            regions.setdefault(hashlib.sha256(region.data).hexdigest(), []).append(tensor)
    return regions
