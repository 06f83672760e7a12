"""How the kernels are cut into programs: the choices, best first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trip_kernels.packing import TileShape


@dataclass(frozen=True)
class Tile:
    """Pixels and warps a program, and how many loads of weights are under way at a time (Triton's num_stages)."""

    pixels: int
    warps: int
    stages: int


def tiles(shape: TileShape, dtype: torch.dtype) -> list[Tile]:
    """Tiles to try in this order until one needs no more registers than there are: which that is depends on the GPU.

    64 rows are what Hopper's and Blackwell's tensor cores want at least. An operand of fp32 takes two registers where
    one of half precision takes one, so its tiles are smaller.
    """

    def tile(rows: int, warps: int, stages: int) -> Tile:
        return Tile(max(1, rows // shape.frames), warps, stages)

    if dtype == torch.float32:
        return [tile(16, 4, 2), tile(16, 8, 2), tile(16, 4, 1), tile(16, 8, 1)]
    return [tile(64, 4, 2), tile(64, 8, 2), tile(32, 4, 2), tile(32, 8, 2), tile(16, 4, 1)]
