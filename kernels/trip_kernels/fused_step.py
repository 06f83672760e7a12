"""Everything a denoising step does after the UNet, in one launch: prior, TNF, λ skip, guidance, the DDIM update and the held first frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trip_kernels.fuse_noise import shape_of
from trip_kernels.packing import WEIGHTS, TileShape, pack, parts_of
from trip_kernels.tiles import Tile, tiles
from trip_kernels.tnf_tile import fused_noise, load_tile

if TYPE_CHECKING:
    from torch import nn

# Columns of the step table (trip_rt/schedule.py).
TIMESTEP, SIGNAL, SIGMA, A, B, GUIDANCE, NEXT_TIMESTEP, NEXT_SIGNAL, NEXT_SIGMA = (tl.constexpr(i) for i in range(9))
COLUMNS = tl.constexpr(9)
BUFFERS = ("latents", "first_frame", "first_noise", "residual_noise", "timestep", "table", "step")  # as the kernel takes them


@triton.jit
def fused_step_kernel(
    p_latents, p_first_frame, p_first_noise, p_residual_noise, p_timestep, p_table, p_step, p_done, p_modulation,
    p_in_proj, p_frame_embedding, p_self_qkv, p_self_out, p_cross_query, p_cross_out, p_bias, p_out_proj, p_out_bias, p_gate,
    batch, pixels,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, LAYERS: tl.constexpr, REAL_FRAMES: tl.constexpr, NORMALIZE_PRIOR: tl.constexpr,
    CHANNELS_P: tl.constexpr, CONTEXT_P: tl.constexpr, WIDTH_P: tl.constexpr, HEAD_P: tl.constexpr, FRAMES: tl.constexpr, PARTS: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """One program: PIXELS pixels of one clip, the unconditional half first.

    The last program to finish moves the loop on: `p_done` counts them, and is zero again afterwards.
    """
    step = tl.load(p_step)
    p_row = p_table + step * COLUMNS
    blocks = tl.cdiv(pixels, PIXELS)
    clip = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.arange(0, PIXELS * FRAMES)
    pixel, frame = (tl.program_id(0) % blocks) * PIXELS + row // FRAMES, row % FRAMES
    inside = (pixel < pixels) & (frame < REAL_FRAMES)
    guided = tl.zeros([PIXELS * FRAMES, CHANNELS_P], tl.float32)
    for branch in tl.range(2, disable_licm=True):
        noise = fused_noise(
            p_latents, p_first_frame, p_residual_noise, p_modulation + tl.load(p_row + TIMESTEP).to(tl.int64) * LAYERS * 4 * WIDTH_P,
            p_in_proj, p_frame_embedding, p_self_qkv, p_self_out, p_cross_query, p_cross_out, p_bias, p_out_proj, p_out_bias, p_gate,
            clip + branch * batch, pixel, frame, inside, pixels,
            tl.load(p_row + SIGNAL), tl.load(p_row + SIGMA),
            CHANNELS, WIDTH, HEADS, LAYERS, REAL_FRAMES, NORMALIZE_PRIOR, CHANNELS_P, CONTEXT_P, WIDTH_P, HEAD_P, FRAMES, PARTS,
        )  # fmt: skip
        guidance = tl.load(p_row + GUIDANCE)
        guided += noise * tl.where(branch == 1, guidance, 1 - guidance)

    channel = tl.arange(0, CHANNELS_P)
    real = inside[:, None] & (channel < CHANNELS)[None, :]
    channel_stride = REAL_FRAMES * pixels
    offset = clip * CHANNELS * channel_stride + frame * pixels + pixel
    latents = tl.load(p_row + A) * load_tile(p_latents, channel, offset, channel_stride, real) + tl.load(p_row + B) * guided
    # Frame 1 is held at the given picture: it follows its exact path.
    held = real & (frame == 0)[:, None]
    first_offset = clip * CHANNELS * pixels + pixel
    path = tl.load(p_row + NEXT_SIGNAL) * load_tile(p_first_frame, channel, first_offset, pixels, held)
    path += tl.load(p_row + NEXT_SIGMA) * load_tile(p_first_noise, channel, first_offset, pixels, held)
    latents = tl.where(held, path, latents)
    next_timestep = tl.load(p_row + NEXT_TIMESTEP).to(tl.int64)
    tl.debug_barrier()  # all of the tile is read before any of it is overwritten
    p_clip = p_latents + offset[:, None] + channel[None, :] * channel_stride
    tl.store(p_clip, latents, mask=real)
    tl.store(p_clip + batch.to(tl.int64) * CHANNELS * channel_stride, latents, mask=real)
    if tl.atomic_add(p_done, 1) == tl.num_programs(0) - 1:
        tl.store(p_done, 0)
        tl.store(p_step, step + 1)
        tl.store(p_timestep, next_timestep)


def fused_step(
    fusion: nn.Module,
    latents: Tensor,
    first_frame: Tensor,
    first_noise: Tensor,
    residual_noise: Tensor,
    timestep: Tensor,
    table: Tensor,
    step: Tensor,
    compute: torch.dtype | None = None,
    tile: Tile | None = None,
) -> None:
    """Move `latents`, `timestep` and `step` on by one step, in place, as `fused_step_ref` does."""
    buffers = dict(latents=latents, first_frame=first_frame, first_noise=first_noise, residual_noise=residual_noise)
    buffers |= dict(timestep=timestep, table=table, step=step)
    compute = compute or next(fusion.parameters(), residual_noise).dtype
    arguments, constants, shape = step_arguments(fusion, buffers, compute)
    tile = tile or tiles(shape, compute)[0]
    batch, pixels = arguments[-2:]
    fused_step_kernel[(batch * triton.cdiv(pixels, tile.pixels),)](
        *arguments, **constants, PIXELS=tile.pixels, num_warps=tile.warps, num_stages=tile.stages
    )


def step_arguments(fusion: nn.Module, buffers: dict[str, Tensor], compute: torch.dtype) -> tuple[list[Any], dict[str, int], TileShape]:
    """The kernel's arguments in order, ending in batch and pixels, all its constants but PIXELS, and its sizes."""
    latents, table, step = buffers["latents"], buffers["table"], buffers["step"]
    _, channels, frames, h, w = latents.shape
    shape = shape_of(fusion, channels, frames)
    packed = pack(fusion.state_dict(), shape, compute, torch.arange(int(table[:, 0].max()) + 1, device=latents.device))
    weights = (packed[name] for name in ("modulation", *WEIGHTS))
    arguments = [*(buffers[name] for name in BUFFERS), torch.zeros_like(step), *weights, len(latents) // 2, h * w]
    return arguments, shape.constants() | {"PARTS": parts_of(compute)}, shape


@torch.no_grad()
def fused_step_ref(
    fusion: nn.Module,
    latents: Tensor,
    first_frame: Tensor,
    first_noise: Tensor,
    residual_noise: Tensor,
    timestep: Tensor,
    table: Tensor,
    step: Tensor,
) -> None:
    """One step after the UNet in plain torch, in place.

    latents, residual_noise: [2B, C, F, H, W], the unconditional half first, both halves of latents equal; first_frame [2B, C, H, W], clean;
    first_noise [B, C, H, W], frame 1's own; timestep int64 [1]; table fp32 [rows, 9] and step int32 [1], the row in it (trip_rt/schedule.py).
    """
    t, signal, sigma, a, b, guidance, next_timestep, next_signal, next_sigma = table[int(step)].to(latents.dtype)
    noise = fusion(latents, first_frame, residual_noise, signal[None], sigma[None], t[None].long())
    unconditional, conditional = noise.chunk(2)
    following = a * latents.chunk(2)[0] + b * (unconditional + guidance * (conditional - unconditional))
    following[:, :, 0] = next_signal * first_frame.chunk(2)[0] + next_sigma * first_noise
    latents.copy_(torch.cat([following, following]))
    timestep.fill_(int(next_timestep))
    step += 1
