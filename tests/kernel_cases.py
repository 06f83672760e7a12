"""What tests of the kernels share, with a GPU and without: fusions with no dead path, buffers between NaNs, error ratios."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from trip_reference.fusion import NoiseFusion
from trip_reference.presets import DEMO
from trip_rt.config import TNFConfig
from trip_rt.schedule import ddim_steps

# The largest RMS error by what TNF's products are taken in; bf16 rounds 8 times as coarsely as fp16.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def fusion_of(hidden_size: int = 16, num_heads: int = 4, num_layers: int = 2, **changes: object) -> NoiseFusion:
    """A NoiseFusion whose every parameter is random, zero-initialised ones too."""
    torch.manual_seed(0)
    settings = dict(num_frames=5, tnf=TNFConfig(hidden_size, num_heads, num_layers)) | changes
    fusion = NoiseFusion(dataclasses.replace(DEMO.trip, **settings))
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
    """RMS of the error over RMS of the expected; infinite where anything is not a number."""
    found, expected = found.detach(), expected.detach()
    if not found.isfinite().all():
        return float("inf")
    return float((found.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt())


def table_of(fusion: nn.Module, timesteps: list[int], guidance_scale: float = 2.5, beginning: bool = False) -> Tensor:
    """Rows of the step table through `timesteps`, fp32 [n, 10], or the row before the first of them."""
    steps = {step.timestep: step for step in ddim_steps(DEMO.trip.schedule, 1000)}
    rows = []
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        step, after = steps[timestep], steps.get(following)
        sigma = step.sqrt_one_minus_alpha_bar
        scales = [1.0, sigma] if fusion.normalize_prior else [1 / sigma, 1.0]
        landing = [after.timestep, after.sqrt_alpha_bar, after.sqrt_one_minus_alpha_bar] if after else [0, 1, 0]
        if beginning:
            return torch.tensor([[timestep, step.sqrt_alpha_bar, *scales, 1, 0, guidance_scale, timestep, step.sqrt_alpha_bar, sigma]])
        a = landing[1] / step.sqrt_alpha_bar
        rows.append([timestep, step.sqrt_alpha_bar, *scales, a, landing[2] - a * sigma, guidance_scale, *landing])
    return torch.tensor(rows)


def step_buffers(batch: int, channels: int, frames: int, height: int, width: int, fusion: nn.Module) -> dict[str, Tensor]:
    """The arguments of `fused_step` for the four steps 999, 749, 499 and 249, at the first of them; fp32 buffers lie between NaNs."""
    generator = torch.Generator().manual_seed(0)
    latents, residual = (torch.randn(n, channels, frames, height, width, generator=generator) for n in (batch, 2 * batch))
    first, first_noise = (torch.randn(batch, channels, height, width, generator=generator) for _ in range(2))
    buffers = dict(latents=torch.cat([latents, latents]), first_frame=torch.cat([first, first]), first_noise=first_noise, residual_noise=residual)
    return {name: guarded(tensor) for name, tensor in buffers.items()} | dict(
        timestep=torch.tensor([999]), table=table_of(fusion, [999, 749, 499, 249]), step=torch.zeros(1, dtype=torch.int32)
    )
