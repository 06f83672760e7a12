"""In which precisions a TensorRT network declares its convolutions and matrix products, and a finished plan computes
them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from trip_rt.errors import InputError

_CONTRACTION = re.compile(r"conv|fprop|gemm|matmul|matrixmultiply|einsum|mha", re.IGNORECASE)
_PRECISIONS = {
    "FP16": re.compile(r"\bhalf\b|fp16"),
    "BF16": re.compile(r"bfloat16|bf16"),
    "FP32": re.compile(r"\bfloat\b|fp32|\bfloat32"),
}
_DECLARED = {"HALF": "FP16", "BF16": "BF16", "FLOAT": "FP32"}


def declared_precisions(trt: Any, network: Any) -> Counter[str]:
    """How many convolutions and matrix products of a parsed trt.INetworkDefinition are declared in FP32, FP16 and
    BF16."""
    products = {
        kind
        for name in ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM")
        if (kind := getattr(trt.LayerType, name, None)) is not None
    }
    layers = (network.get_layer(index) for index in range(network.num_layers))
    types = (layer.get_input(0).dtype.name for layer in layers if layer.type in products)
    return Counter(_DECLARED.get(name, name) for name in types)


def layer_precisions(information: str) -> Counter[str]:
    """How many layers compute in FP32, FP16 and BF16, from the engine inspector's JSON at detailed verbosity.

    A layer's precision is the narrowest that it reads. Convolutions and matrix products are counted; where no layer is
    known as one, all but reformats and constants. Empty where the JSON says nothing of types.
    """
    try:
        # Not strict: TensorRT separates the names in Metadata by control characters.
        layers = json.loads(information, strict=False)["Layers"]
    except (ValueError, KeyError, TypeError):
        return Counter()
    detailed = [
        layer
        for layer in layers
        if isinstance(layer, dict) and layer.get("LayerType") not in ("Reformat", "NoOp", "Constant")
    ]
    contractions = [
        layer for layer in detailed if _CONTRACTION.search(f"{layer.get('LayerType')} {layer.get('TacticName')}")
    ]
    return Counter(precision for layer in contractions or detailed if (precision := _precision(layer)))


def check_precisions(declared: Mapping[str, int], found: Mapping[str, int], name: str) -> str:
    """What to tell of an engine's precisions; InputError where a half precision in which the graph `name` declares
    products is in no layer."""
    if not found:
        return (
            f"TensorRT tells no layer's type, so whether it kept {', '.join(sorted(declared))} shows in speed and"
            " parity only"
        )
    if lost := sorted(set(declared) - {"FP32"} - {precision for precision, count in found.items() if count}):
        used = ", ".join(sorted(found))
        raise InputError(
            f"{name}: found an engine silently built in {used}, expected {', '.join(lost)} as declared; use another"
            " TensorRT or export fp32"
        )
    return "convolutions and matrix products: " + ", ".join(
        f"{count} in {precision}" for precision, count in sorted(found.items())
    )


def _precision(layer: Mapping[str, Any]) -> str | None:
    tensors = [layer.get("Weights")]
    for side in ("Inputs", "Outputs"):
        tensors += layer.get(side) or []
        types = " ".join(
            str(item.get(key, ""))
            for item in tensors
            if isinstance(item, dict)
            for key in ("Format/Datatype", "Datatype", "Type")
        )
        if found := next((name for name, pattern in _PRECISIONS.items() if pattern.search(types.lower())), None):
            return found  # outputs only where the inputs tell nothing: they may already be cast
    return None
