"""How many pixels a program takes and how many warps work on them."""

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


def tile_of(shape: TileShape, dtype: torch.dtype, branches: int) -> Tile:
    rows = 64
    return Tile(max(1, rows // (branches * shape.frames)), 4, 2)
