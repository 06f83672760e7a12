"""The tile sizes that a kernel may be compiled with, best first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trip_kernels.packing import TileShape


@dataclass(frozen=True)
class Tile:
    """One program's pixels and warps, and how many loads of weights it keeps in flight (Triton's num_stages)."""

    pixels: int
    warps: int
    stages: int


def tile_choices(shape: TileShape, dtype: torch.dtype) -> list[Tile]:
    """Tiles in the order to try them in, until one needs no more registers than the GPU has, or a few.

    The order is that of their times at full size on an H200 (bench/results/nvidia-h200.json). An operand of fp32 takes
    two registers where one of half precision takes one, so the tiles for fp32 are smaller.
    """

    def tile(rows: int, warps: int, stages: int) -> Tile:
        return Tile(max(1, rows // shape.frames), warps, stages)

    if dtype == torch.float32:
        return [tile(16, 4, 2), tile(16, 4, 1), tile(16, 8, 2), tile(16, 8, 1)]
    return [tile(64, 4, 2), tile(32, 4, 2), tile(64, 8, 2), tile(16, 4, 1), tile(32, 8, 2)]
