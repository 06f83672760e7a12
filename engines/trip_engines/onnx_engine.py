"""An ONNX file as an engine: checked, described, and proven to open and run."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx

from trip_rt.backends import engine_class
from trip_rt.bundle import EngineSpec, TensorSpec, file_sha256


def finish_onnx_engine(graph: Path, destination: Path, key: str, precision: str) -> EngineSpec:
    """Check the exported `graph`, run it once on zeros, and move it to `destination`; the move is the last act and atomic.

    Raises onnx.checker.ValidationError or ValueError where the graph is not a valid one of static shapes.
    """
    onnx.checker.check_model(graph, full_check=True)
    model = onnx.load(graph, load_external_data=False).graph
    spec = EngineSpec(
        file=destination.name,
        sha256=file_sha256(graph),
        bytes=graph.stat().st_size,
        key=key,
        precision=precision,
        inputs=tuple(_tensor_spec(value) for value in model.input),
        outputs=tuple(_tensor_spec(value) for value in model.output),
    )
    engine = engine_class("onnxruntime").open(graph, spec, None)
    outputs = engine.run({tensor.name: np.zeros(tensor.shape, tensor.dtype) for tensor in spec.inputs})
    engine.close()
    for tensor in spec.outputs:
        array = outputs[tensor.name]
        if (str(array.dtype), array.shape) != (tensor.dtype, tensor.shape):
            raise ValueError(f"{graph.name}: output {tensor.name}: found {array.dtype} {list(array.shape)}, declared {tensor}")
    os.replace(graph, destination)
    return spec


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if any(not dim.HasField("dim_value") for dim in tensor.shape.dim):
        raise ValueError(f"{value.name}: found a dynamic shape, expected a static one; the exporter lost a constant")
    return TensorSpec(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, tuple(dim.dim_value for dim in tensor.shape.dim))
