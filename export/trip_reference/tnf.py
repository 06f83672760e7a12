"""Temporal Noise Fusion: a small transformer over the frames of each pixel that merges the prior with the residual
noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trip_rt.config import TNFConfig


def sinusoids(timestep: Tensor, width: int) -> Tensor:
    """Sine and cosine features of the timestep [B], fp32 [B, width] (Vaswani et al. 2017, sec. 3.5)."""
    rates = torch.exp(
        -math.log(10000) / (width // 2) * torch.arange(width // 2, device=timestep.device, dtype=torch.float32)
    )
    angles = timestep.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class AdaLayerNorm(nn.Module):
    """LayerNorm whose scale and shift come from the time embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.modulation(time)[:, None].chunk(2, dim=-1)  # [B or 1, 1, C]
        return self.norm(x) * (1 + scale) + shift


class FrameAttention(nn.Module):
    """Multi-head attention from `x` [P, F, C] to `context` [P, F, C'] over the frames; no projection is shared."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        attended = F.scaled_dot_product_attention(q, k, v)  # [P, heads, F, C / heads]
        return self.to_out(attended.transpose(1, 2).flatten(2))


class TNFLayer(nn.Module):
    """adaLN → self-attention over frames → adaLN → cross-attention to [prior, residual]."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.norm1 = AdaLayerNorm(width)
        self.self_attention = FrameAttention(width, width, heads)
        self.norm2 = AdaLayerNorm(width)
        self.cross_attention = FrameAttention(width, context_width, heads)

    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        normed = self.norm1(x, time)
        x = x + self.self_attention(normed, normed)
        return x + self.cross_attention(self.norm2(x, time), context)


class TemporalNoiseFusion(nn.Module):
    """What TNF adds to the linear fusion of prior and residual noise.

    The output projection starts at zero, so an untrained TNF adds nothing.
    """

    def __init__(self, config: TNFConfig, channels: int, num_frames: int):
        super().__init__()
        width = config.hidden_size
        self.time_width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.in_proj = nn.Linear(channels, width)
        self.frame_embedding = nn.Parameter(torch.randn(num_frames, width) * 0.02)
        self.layers = nn.ModuleList(TNFLayer(width, 2 * channels, config.num_heads) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, channels)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def time_features(self, timestep: Tensor) -> Tensor:
        """The input of the time network `time`, fp32 [B, hidden size]; timestep: [B]."""
        return sinusoids(timestep, self.time_width)

    def forward(self, prior: Tensor, residual: Tensor, timestep: Tensor) -> Tensor:
        """prior, residual: [B, C, F, H, W]; timestep: [B] or [1]. Returns [B, C, F, H, W]."""
        b, _, _, h, w = residual.shape
        time = self.time(self.time_features(timestep).to(residual.dtype))  # [B or 1, C]
        if len(time) > 1:
            time = time.repeat_interleave(h * w, 0)
        tokens = residual.permute(0, 3, 4, 2, 1).flatten(0, 2)  # [B·H·W, F, C]
        context = torch.cat([prior.permute(0, 3, 4, 2, 1).flatten(0, 2), tokens], dim=-1)
        x = self.in_proj(tokens) + self.frame_embedding
        for layer in self.layers:
            x = layer(x, context, time)
        return self.out_proj(self.norm_out(x)).unflatten(0, (b, h, w)).permute(0, 4, 3, 1, 2)
