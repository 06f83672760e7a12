"""Triton's JIT as it compiles for a GPU that is not here."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from trip_kernels.packing import TileShape, weight_layout
from trip_kernels.tile_choices import Tile

_TYPES = {"*fp32": torch.float32, "*u8": torch.uint8, "*i32": torch.int32, "*i64": torch.int64}


def jit_cubins(
    shape: TileShape, dtype: torch.dtype, tile: Tile, capability: str, sizes: list[tuple[int, int]], cache: Path
) -> list[bytes]:
    """The machine code that the JIT launches for each (batch, pixels) of `sizes`; `cache` is an empty folder."""
    # In a process of its own, which imports Triton without its interpreter.
    with ProcessPoolExecutor(1, get_context("spawn")) as worker:
        return worker.submit(_compile, shape, dtype, tile, capability, sizes, cache).result()


def _compile(
    shape: TileShape, dtype: torch.dtype, tile: Tile, capability: str, sizes: list[tuple[int, int]], cache: Path
) -> list[bytes]:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ |= {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(cache)}
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import MockTensor

    from trip_kernels.compile import parameter_type
    from trip_kernels.fused_step import fused_step_kernel

    class Driver:
        """All that the JIT asks of a GPU's driver before it launches."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", int(capability.replace(".", "")), 32)

    triton.runtime.driver.set_active(Driver())
    pointers = {
        name: MockTensor(_TYPES[parameter_type(name)]) for name in fused_step_kernel.arg_names if name.startswith("p_")
    }
    constants = dict(SHAPE=shape, LAYOUT=weight_layout(shape, dtype), PIXELS=tile.pixels)
    options = dict(num_warps=tile.warps, num_stages=tile.stages)
    return [
        fused_step_kernel.warmup(grid=(1,), **pointers, batch=batch, pixels=pixels, **constants, **options).asm["cubin"]
        for batch, pixels in sizes
    ]
