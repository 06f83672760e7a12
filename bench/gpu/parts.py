"""The parts, in order: each a function of the context that gives its figures, and the seconds it may take. A part whose
"passed" is False was wrong."""

from __future__ import annotations

from gpu import kernel_checks, loops

PARTS = {
    "parity": (kernel_checks.parity, 120),
    "kernel": (kernel_checks.kernel, 180),
    "full_loop": (loops.full_loop, 150),
    "demo_loop": (loops.demo_loop, 60),
    "inductor": (loops.inductor, 150),
    "libraries": (loops.libraries, 180),
}
