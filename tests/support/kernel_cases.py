"""What tests of the kernels share, with a GPU and without: fusions with no dead path, buffers between NaNs, error
ratios."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from trip_reference.fusion import NoiseFusion
from trip_reference.presets import DEMO
from trip_rt.accuracy import relative_errors
from trip_rt.config import TNFConfig
from trip_rt.sampling.step_table import step_table
from trip_rt.settings import Settings, Speed

# The largest RMS error by what TNF's products are taken in; bf16 rounds 8 times as coarsely as fp16.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# Of a solver that uses all of the history; its third step is unguided.
STEPS = [
    dataclasses.replace(step, guidance_scale=1.0 if i == 2 else 2.5)
    for i, step in enumerate(Settings(Speed("unipc", 4)).steps(DEMO.trip))
]


def fusion_of(hidden_size: int = 16, num_heads: int = 4, num_layers: int = 2, **changes: object) -> NoiseFusion:
    """A NoiseFusion whose every parameter is random, zero-initialised ones too."""
    torch.manual_seed(0)
    settings = dict(num_frames=5, tnf=TNFConfig(hidden_size, num_heads, num_layers)) | changes
    fusion = NoiseFusion(dataclasses.replace(DEMO.trip, **({"latent_channels": 8} | settings)))
    with torch.no_grad():
        for parameter in fusion.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return fusion.eval()


def guarded(tensor: Tensor) -> Tensor:
    """A copy that lies in memory between NaNs, so that what reads past its ends shows."""
    margin = 64
    whole = torch.full((tensor.numel() + 2 * margin,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    whole[margin:-margin] = tensor.flatten()
    return whole[margin:-margin].view(tensor.shape)


def rms_ratio(found: Tensor, expected: Tensor) -> float:
    """RMS of the error over RMS of the expected; NOT_A_NUMBER where anything is not a number."""
    return relative_errors(*(tensor.detach().double().cpu().numpy() for tensor in (found, expected)))[1]


def step_buffers(batch: int, channels: int, frames: int, height: int, width: int) -> dict[str, Tensor]:
    """The arguments of `fused_step` for STEPS, at the first of them; fp32 buffers lie between NaNs."""
    generator = torch.Generator().manual_seed(0)
    latents, residual = (
        torch.randn(n, channels, frames, height, width, generator=generator) for n in (batch, 2 * batch)
    )
    first, first_noise = (torch.randn(batch, channels, height, width, generator=generator) for _ in range(2))
    buffers = dict(
        latents=torch.cat([latents, latents]),
        first_frame=torch.cat([first, first]),
        first_noise=first_noise,
        residual_noise=residual,
    )
    buffers["history"] = torch.randn(3, batch, channels, frames, height, width, generator=generator)
    return {name: guarded(tensor) for name, tensor in buffers.items()} | dict(
        timestep=torch.tensor([999]), table=torch.from_numpy(step_table(STEPS)), step=torch.ones(1, dtype=torch.int32)
    )
