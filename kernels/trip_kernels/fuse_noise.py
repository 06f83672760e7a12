"""ε̃ from the UNet's residual noise in one launch: prior, TNF and λ skip, of which nothing but ε̃ is written to memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trip_kernels.packing import WEIGHTS, TileShape, pack, parts_of, tile_shape
from trip_kernels.tile_choices import Tile, tile_choices
from trip_kernels.tnf_tile import fused_noise

if TYPE_CHECKING:
    from torch import nn


@triton.jit
def fuse_noise_kernel(
    p_latents, p_first_frame, p_residual_noise, p_noise, p_coefficients, p_modulation,
    p_in_proj, p_frame_embedding, p_self_qkv, p_self_out, p_cross_query, p_cross_out, p_bias, p_out_proj, p_out_bias, p_gate,
    pixels, shared_timestep,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, LAYERS: tl.constexpr, REAL_FRAMES: tl.constexpr, NORMALIZE_PRIOR: tl.constexpr,
    CHANNELS_P: tl.constexpr, CONTEXT_P: tl.constexpr, WIDTH_P: tl.constexpr, HEAD_P: tl.constexpr, FRAMES: tl.constexpr, PARTS: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """One program: PIXELS pixels of one clip. `p_coefficients` are sqrt(ᾱ_t) and sqrt(1−ᾱ_t), [B, 2] or, as the
    modulation, shared."""
    blocks = tl.cdiv(pixels, PIXELS)
    clip = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.arange(0, PIXELS * FRAMES)
    pixel, frame = (tl.program_id(0) % blocks) * PIXELS + row // FRAMES, row % FRAMES
    inside = (pixel < pixels) & (frame < REAL_FRAMES)
    step = clip * (1 - shared_timestep)
    signal, sigma = tl.load(p_coefficients + step * 2), tl.load(p_coefficients + step * 2 + 1)
    noise = fused_noise(
        p_latents, p_first_frame, p_residual_noise, p_modulation + step * LAYERS * 4 * WIDTH_P,
        p_in_proj, p_frame_embedding, p_self_qkv, p_self_out, p_cross_query, p_cross_out, p_bias, p_out_proj, p_out_bias, p_gate,
        clip, pixel, frame, inside, pixels, signal, sigma,
        CHANNELS, WIDTH, HEADS, LAYERS, REAL_FRAMES, NORMALIZE_PRIOR, CHANNELS_P, CONTEXT_P, WIDTH_P, HEAD_P, FRAMES, PARTS,
    )  # fmt: skip
    channel = tl.arange(0, CHANNELS_P)
    offset = clip * CHANNELS * REAL_FRAMES * pixels + frame * pixels + pixel
    tl.store(
        p_noise + offset[:, None] + channel[None, :] * REAL_FRAMES * pixels,
        noise,
        mask=inside[:, None] & (channel < CHANNELS)[None, :],
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
    """What the `trip_reference.fusion.NoiseFusion` `fusion`, which is this op's reference, makes of the same arguments,
    in one launch.

    latents, residual_noise: [B, C, F, H, W]; first_frame: [B, C, H, W]; the rest [B] or [1]; fp32, fp16 or bf16 in any
    mixture. TNF's matrix products take operands of `compute` (the weights' own dtype), all else is fp32. Returns ε̃,
    [B, C, F, H, W], of residual_noise's dtype. The gradient is the reference's. ValueError for shapes that do not
    belong together.
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
    """The kernel forward; backward, the reference is run anew and differentiated, so no activation is held in between."""

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
        found = iter(torch.autograd.grad(noise, sources, gradient, allow_unused=True))
        return None, None, None, *(next(found) if need else None for need in needed)


def _launch(fusion: nn.Module, compute: torch.dtype, tile: Tile | None, inputs: tuple[Tensor, ...]) -> Tensor:
    latents, first_frame, residual_noise, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, timestep = inputs
    b, _, frames, h, w = latents.shape
    shape = shape_of(fusion, latents.shape[1], frames)
    steps = max(t.shape[0] for t in (sqrt_alpha_bar, sqrt_one_minus_alpha_bar, timestep))
    coefficients = torch.stack([value.float().expand(steps) for value in (sqrt_alpha_bar, sqrt_one_minus_alpha_bar)], 1)
    packed = pack(fusion, shape, compute, timestep.expand(steps))
    noise = torch.empty_like(residual_noise, memory_format=torch.contiguous_format)
    tile = tile or tile_choices(shape, compute)[0]
    fuse_noise_kernel[(b * triton.cdiv(h * w, tile.pixels),)](
        latents.contiguous(),
        first_frame.contiguous(),
        residual_noise.contiguous(),
        noise,
        coefficients,
        packed["modulation"],
        *(packed[name] for name in WEIGHTS),
        h * w,
        int(steps == 1),
        **shape.constants(),
        PARTS=parts_of(compute),
        PIXELS=tile.pixels,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return noise


def shape_of(fusion: nn.Module, channels: int, num_frames: int) -> TileShape:
    """The sizes of a NoiseFusion over clips of so many channels and frames."""
    if fusion.tnf is None:
        return tile_shape(channels, num_frames, fusion.normalize_prior, width=0, heads=0, layers=0)
    tnf = fusion.tnf
    return tile_shape(
        channels,
        num_frames,
        fusion.normalize_prior,
        tnf.in_proj.out_features,
        tnf.layers[0].self_attention.heads,
        len(tnf.layers),
    )
