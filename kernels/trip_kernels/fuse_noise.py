"""One launch computes ε̃ from the UNet's residual noise: prior, TNF and λ skip. It writes nothing but ε̃ to memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trip_kernels.packing import TileShape, pack, tile_shape, weight_layout
from trip_kernels.tile_choices import Tile, tile_choices
from trip_kernels.tnf_tile import fused_noise

if TYPE_CHECKING:
    from torch import nn


# By default Triton makes a constant of an integer argument that is 1 and compiles anew for one that 16 divides.
@triton.jit(do_not_specialize=["pixels", "shared_timestep"])
def fuse_noise_kernel(
    p_latents,
    p_first_frame,
    p_residual_noise,
    p_noise,
    p_coefficients,
    p_weights,
    pixels,
    shared_timestep,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One program fuses PIXELS pixels of one clip.

    `p_coefficients` points to sqrt(ᾱ_t) and sqrt(1−ᾱ_t), [B, 2]. Where `shared_timestep` is 1 and not 0, the clips
    share one row of it and one timestep of the modulation.
    """
    blocks = tl.cdiv(pixels, PIXELS)
    clip = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.arange(0, PIXELS * SHAPE.frames)
    pixel, frame = (tl.program_id(0) % blocks) * PIXELS + row // SHAPE.frames, row % SHAPE.frames
    inside = (pixel < pixels) & (frame < SHAPE.real_frames)
    step = clip * (1 - shared_timestep)
    noise = fused_noise(
        p_latents,
        p_first_frame,
        p_residual_noise,
        p_weights,
        i_modulation=step,
        clip=clip,
        pixel=pixel,
        frame=frame,
        inside=inside,
        pixels=pixels,
        signal=tl.load(p_coefficients + step * 2),
        sigma=tl.load(p_coefficients + step * 2 + 1),
        SHAPE=SHAPE,
        LAYOUT=LAYOUT,
    )
    channel = tl.arange(0, SHAPE.channels_p)
    channel_stride = SHAPE.real_frames * pixels
    offset = clip * SHAPE.channels * channel_stride + frame * pixels + pixel
    tl.store(
        p_noise + offset[:, None] + channel[None, :] * channel_stride,
        noise,
        mask=inside[:, None] & (channel < SHAPE.channels)[None, :],
    )


def fuse_noise(
    fusion: nn.Module,
    latents: Tensor,
    first_frame: Tensor,
    residual_noise: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    timestep: Tensor,
    compute: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """One launch in place of `fusion`, a `trip_reference.fusion.NoiseFusion`, which is the reference of this operation.

    latents, residual_noise: [B, C, F, H, W]; first_frame: [B, C, H, W]; the rest [B] or [1]; fp32, fp16 or bf16 in any
    mixture. The matrix products of TNF take operands of `compute` (by default the weights' own dtype), everything else
    is fp32. Returns ε̃, [B, C, F, H, W], of the dtype of residual_noise. The gradient is that of the reference.
    ValueError for shapes that do not belong together.
    """
    inputs = latents, first_frame, residual_noise, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, timestep
    b, c, _, h, w = latents.shape
    if (
        residual_noise.shape != latents.shape
        or first_frame.shape != (b, c, h, w)
        or any(t.shape not in ((1,), (b,)) for t in inputs[3:])
    ):
        raise ValueError(
            f"found shapes {[list(t.shape) for t in inputs]}, expected [B, C, F, H, W], [B, C, H, W], [B, C, F, H, W]"
            " and [B] or [1]"
        )
    compute = compute or next(fusion.parameters(), residual_noise).dtype
    return _FuseNoise.apply(fusion, compute, tile, *inputs, *fusion.parameters())


class _FuseNoise(torch.autograd.Function):
    """The kernel forward. Backward runs the reference again and differentiates it, so no activation is kept."""

    @staticmethod
    def forward(ctx: Any, fusion: nn.Module, compute: torch.dtype, tile: Tile | None, *tensors: Tensor) -> Tensor:
        ctx.fusion = fusion
        ctx.save_for_backward(*tensors[:6])
        return _launch(fusion, compute, tile, tensors[:6])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, needed, strict=False)]
        with torch.enable_grad():
            noise = ctx.fusion(*inputs)
        sources = [tensor for tensor, need in zip((*inputs, *ctx.fusion.parameters()), needed, strict=True) if need]
        gradients = iter(torch.autograd.grad(noise, sources, gradient, allow_unused=True))
        return None, None, None, *(next(gradients) if need else None for need in needed)


def _launch(fusion: nn.Module, compute: torch.dtype, tile: Tile | None, inputs: tuple[Tensor, ...]) -> Tensor:
    latents, first_frame, residual_noise, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, timestep = inputs
    b, _, frames, h, w = latents.shape
    shape = shape_of(fusion, latents.shape[1], frames)
    steps = max(t.shape[0] for t in (sqrt_alpha_bar, sqrt_one_minus_alpha_bar, timestep))
    coefficients = torch.stack([value.float().expand(steps) for value in (sqrt_alpha_bar, sqrt_one_minus_alpha_bar)], 1)
    noise = torch.empty_like(residual_noise, memory_format=torch.contiguous_format)
    tile = tile or tile_choices(shape, compute)[0]
    fuse_noise_kernel[(b * triton.cdiv(h * w, tile.pixels),)](
        p_latents=latents.contiguous(),
        p_first_frame=first_frame.contiguous(),
        p_residual_noise=residual_noise.contiguous(),
        p_noise=noise,
        p_coefficients=coefficients,
        p_weights=pack(fusion, shape, compute, timestep.expand(steps)),
        pixels=h * w,
        shared_timestep=int(steps == 1),
        SHAPE=shape,
        LAYOUT=weight_layout(shape, compute),
        PIXELS=tile.pixels,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return noise


def shape_of(fusion: nn.Module, channels: int, num_frames: int) -> TileShape:
    """The sizes of the NoiseFusion `fusion` for clips of this many channels and frames."""
    if fusion.tnf is None:
        return tile_shape(channels, num_frames, fusion.normalize_prior, fusion.matched, width=0, heads=0, layers=0)
    tnf = fusion.tnf
    return tile_shape(
        channels,
        num_frames,
        fusion.normalize_prior,
        fusion.matched,
        tnf.in_proj.out_features,
        tnf.layers[0].self_attention.heads,
        len(tnf.layers),
    )
