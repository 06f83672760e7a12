"""Triton compiles the fused step ahead of time, without a GPU; the runtime launches the machine code without Triton."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from trip_kernels.packing import TileShape, weight_layout
from trip_kernels.tile_choices import Tile, tile_choices

# Compute capabilities and the shared memory that one program may have there, in bytes (CUDA C++ Programming Guide,
# technical specifications).
SHARED_BYTES = {"8.0": 166912, "8.6": 101376, "8.9": 101376, "9.0": 232448, "10.0": 232448, "12.0": 101376}
CAPABILITIES = tuple(SHARED_BYTES)
# Bytes of a thread's registers that may lie in memory: a few cost less than a smaller tile does, as each program reads
# all weights.
ACCEPTED_SPILL = 32
# The kernel's parameters in Triton's words; the other buffers are fp32.
_TYPES = {
    "p_timestep": "*i64",
    "p_step": "*i32",
    "p_done": "*i32",
    "p_weights": "*u8",
    "batch": "i32",
    "pixels": "i32",
}


@dataclass(frozen=True)
class CompiledStep:
    """The fused step for one compute capability.

    `parameters` are those of the machine code, in order; "scratch" is a pointer that stays null.
    """

    capability: str
    entry: str
    parameters: tuple[str, ...]
    cubin: bytes
    tile: Tile
    shared_bytes: int
    registers: int
    spilled_bytes: int

    def describe(self) -> str:
        """One line for a person to read."""
        return (
            f"compute capability {self.capability}: {self.registers} registers, {self.spilled_bytes} bytes spilled,"
            f" {self.shared_bytes / 1024:.0f} KiB shared, {self.tile.warps} warps for {self.tile.pixels} pixels,"
            f" {len(self.cubin) / 1024:.0f} KiB"
        )


def compile_fused_step(
    shape: TileShape,
    dtype: torch.dtype,
    capabilities: Sequence[str] = CAPABILITIES,
    note: Callable[[str], None] = lambda text: None,
) -> list[CompiledStep]:
    """Compile `fused_step_kernel` for fp32 buffers, with the matrix products of TNF in `dtype`. This needs no GPU.

    ValueError for a capability that is not among CAPABILITIES; RuntimeError if every one of `tile_choices` would spill
    more than ACCEPTED_SPILL bytes of registers to memory or need more shared memory than the GPU has.
    """
    if unknown := [capability for capability in capabilities if capability not in SHARED_BYTES]:
        raise ValueError(f"compute capability: found {', '.join(unknown)}, expected some of {', '.join(CAPABILITIES)}")
    # Each in a process of its own: there are several to compile, and this process may have Triton in interpreter mode.
    with ProcessPoolExecutor(min(len(capabilities), os.cpu_count() or 1), get_context("spawn"), _prepare) as workers:
        compiled = []
        for step in workers.map(_compile, [shape] * len(capabilities), [dtype] * len(capabilities), capabilities):
            note(f"fused step: {step.describe()}")
            compiled.append(step)
    return compiled


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # a·b + c rounds once, whatever the default of a later Triton


def _compile(shape: TileShape, dtype: torch.dtype, capability: str) -> CompiledStep:
    with tempfile.TemporaryDirectory(prefix="trip-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        refused = []
        for tile in tile_choices(shape, dtype):
            step = _compile_tile(shape, dtype, capability, tile, Path(folder))
            if step.spilled_bytes <= ACCEPTED_SPILL and step.shared_bytes <= SHARED_BYTES[capability]:
                return step
            refused.append(
                f"{tile.pixels} pixels and {tile.warps} warps: {step.spilled_bytes} bytes spilled, {step.shared_bytes}"
                " bytes shared"
            )
    raise RuntimeError(
        f"fused step for compute capability {capability}: found no tile that spills at most {ACCEPTED_SPILL} bytes and"
        f" takes at most {SHARED_BYTES[capability]} bytes of shared memory ({'; '.join(refused)}); add one to"
        " trip_kernels/tile_choices.py"
    )


def _compile_tile(shape: TileShape, dtype: torch.dtype, capability: str, tile: Tile, folder: Path) -> CompiledStep:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trip_kernels.fused_step import fused_step_kernel

    names = fused_step_kernel.arg_names
    source = ASTSource(
        fused_step_kernel,
        {name: parameter_type(name) for name in names},
        {"SHAPE": shape, "LAYOUT": weight_layout(shape, dtype), "PIXELS": tile.pixels},
        {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name.startswith("p_")},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
    kernel = triton.compile(source, target=target, options=options)
    own = [name.removeprefix("p_") for name in names if not name.isupper()]
    widths = re.findall(r"\.param \.(\w+)[^,)]*?" + kernel.metadata.name + r"_param_\d+", kernel.asm["ptx"])
    scratch = ["scratch"] * (len(widths) - len(own))
    expected = ["u32" if name in ("batch", "pixels") else "u64" for name in (*own, *scratch)]
    if widths != expected or kernel.metadata.global_scratch_size or kernel.metadata.profile_scratch_size:
        raise RuntimeError(
            f"Triton {triton.__version__}: the kernel takes {widths}, expected {expected} and no scratch memory; pin an"
            " earlier Triton"
        )
    registers, spilled = _resources(kernel.asm["cubin"], folder)
    return CompiledStep(
        capability,
        kernel.metadata.name,
        (*own, *scratch),
        kernel.asm["cubin"],
        tile,
        kernel.metadata.shared,
        registers,
        spilled,
    )


def parameter_type(name: str) -> str:
    """The type of a parameter of `fused_step_kernel` in Triton's words."""
    return "constexpr" if name.isupper() else _TYPES.get(name, "*fp32")


def _resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """The registers of a thread and the bytes of its stack, where only spills lie: the kernel has no arrays."""
    from triton import knobs

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    usage = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return used["REG"], used["STACK"] + used["LOCAL"]
