"""fp8 (E4M3, without infinities: Micikevicius et al. 2022) in place of int8 in a symmetrically quantised graph."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

_LARGEST_INT8, _LARGEST_FP8 = 127, 448
_STORED = "_quantized"  # what onnxruntime.quantization adds to the name of a weight


def to_fp8(model: ir.Model, whole: ir.Model) -> None:
    """Have `model`, as onnxruntime.quantization made it of `whole`, store fp8 for int8, in place.

    The largest value of a range becomes 448 where it was 127. Weights are rounded anew from those of `whole`.
    """
    scales: set[ir.Value] = set()
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        stored, scale, zero = node.inputs
        assert stored is not None and scale is not None and zero is not None
        if scale not in scales:
            scales.add(scale)
            _set(scale, (_array(scale).astype(np.float32) * _LARGEST_INT8 / _LARGEST_FP8).astype(_array(scale).dtype))
        if zero.dtype == ir.DataType.INT8:
            _set(zero, np.zeros_like(_array(zero)).astype(ml_dtypes.float8_e4m3fn))
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = ir.DataType.FLOAT8E4M3FN
        elif stored.is_initializer() and stored.dtype == ir.DataType.INT8:
            weight = _array(whole.graph.initializers[(stored.name or "").removesuffix(_STORED)]).astype(np.float32)
            along = [1] * weight.ndim
            along[node.attributes["axis"].as_int()] = -1
            scaled = weight / _array(scale).astype(np.float32).reshape(along)
            _set(stored, scaled.clip(-_LARGEST_FP8, _LARGEST_FP8).astype(ml_dtypes.float8_e4m3fn))


def _array(value: ir.Value) -> NDArray[np.generic]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _set(value: ir.Value, array: NDArray[np.generic]) -> None:
    value.const_value = ir.tensor(array, name=value.name)
    value.dtype = value.const_value.dtype
