"""TensorRT's documented Python names, a plan's target, and how to read which names a source speaks of."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from trip_rt.backends.tensorrt import PLATFORM

API: dict[str, list[str]] = json.loads(Path(__file__).with_name("tensorrt-python-api.json").read_text())["names"]
TARGET = {"tensorrt": "11.4.0.106", "compute_capability": "9.0", "platform": PLATFORM}


def dotted(node: ast.AST) -> tuple[str, ...]:
    """("self", "_trt", "Runtime") of such an expression; a call in it counts as the function called."""
    if isinstance(node, ast.Attribute):
        return (*dotted(node.value), node.attr)
    if isinstance(node, ast.Call):
        return dotted(node.func)
    return (node.id,) if isinstance(node, ast.Name) else ("",)
