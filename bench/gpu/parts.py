"""The parts of a run: in which module of this package each is a function of its name, the seconds after which it is cut
off, and the libraries without which it is skipped.

A command has ten minutes. `figures` and `engines` are a command each, and the seconds of either, with MACHINE_SECONDS
before them, leave half a minute for what is between the parts. On an H200 with 16 cores parity took 51 s,
full_loop 52, demo_loop 21 and tests 46; kernel was cut off at 160 while torch tuned its last rival, inductor at 150
while it compiled.
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
    "parity": Part("kernel_checks", 85),
    "kernel": Part("kernel_checks", 270),
    "full_loop": Part("loops", 105, ("diffusers", "transformers")),
    "demo_loop": Part("loops", 55),
    "inductor": Part("loops", 225, ("diffusers", "safetensors", "transformers")),
    "libraries": Part("loops", 215, ("diffusers", "onnx", "onnx_ir", "onnxscript", "safetensors", "transformers")),
    "tests": Part("suite", 80, ("pytest",)),
}
GROUPS = {"figures": ("parity", "kernel", "full_loop", "demo_loop"), "engines": ("inductor", "libraries", "tests")}
