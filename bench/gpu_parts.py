"""The parts of bench/gpu.py, in order: each a function of the context that gives its figures, and the seconds it may
take. "passed" False means that what was run was wrong."""

from __future__ import annotations

import gpu_kernels
import gpu_loops

PARTS = {
    "parity": (gpu_kernels.parity, 120),
    "kernel": (gpu_kernels.kernel, 180),
    "full_loop": (gpu_loops.full_loop, 150),
    "demo_loop": (gpu_loops.demo_loop, 60),
    "inductor": (gpu_loops.inductor, 150),
    "libraries": (gpu_loops.libraries, 180),
}
