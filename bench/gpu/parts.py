"""The parts of a run: in which module of this package each is a function of its name, the seconds after which it is cut
off, and the libraries without which it is skipped.

A command has ten minutes. `figures` and `engines` are a command each, and the seconds of either, with MACHINE_SECONDS
before them, leave half a minute for what is between the parts. They are estimates until a GPU has run them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    module: str
    seconds: int
    needs: tuple[str, ...] = ()


MACHINE_SECONDS = 45  # to import torch and say what the GPU is
COMMAND_SECONDS = 570
PARTS = {
    "parity": Part("kernel_checks", 95),
    "kernel": Part("kernel_checks", 160),
    "full_loop": Part("loops", 180, ("diffusers", "transformers")),
    "demo_loop": Part("loops", 85),
    "inductor": Part("loops", 150, ("diffusers", "safetensors", "transformers")),
    "libraries": Part("loops", 215, ("diffusers", "onnx", "onnx_ir", "onnxscript", "safetensors", "transformers")),
    "tests": Part("suite", 155, ("pytest",)),
}
GROUPS = {"figures": ("parity", "kernel", "full_loop", "demo_loop"), "engines": ("inductor", "libraries", "tests")}
