"""The timestep as a network takes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoids(timestep: Tensor, width: int) -> Tensor:
    """Sine and cosine features of the timestep, fp32 [B, width] (Vaswani et al. 2017, sec. 3.5)."""
    rates = torch.exp(
        -math.log(10000) / (width // 2) * torch.arange(width // 2, device=timestep.device, dtype=torch.float32)
    )
    angles = timestep.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
