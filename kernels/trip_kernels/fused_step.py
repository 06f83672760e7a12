"""Everything a denoising step does after the UNet, in one launch: prior, TNF, λ skip, guidance, the solver's update and
the held first frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trip_kernels.fuse_noise import shape_of
from trip_kernels.packing import WEIGHTS, TileShape, pack, parts_of
from trip_kernels.tile_choices import Tile, tile_choices
from trip_kernels.tnf_tile import fused_noise, load_tile
from trip_rt.sampling.step_table import COLUMNS

if TYPE_CHECKING:
    from torch import nn

# Where the numbers of a step lie in its row of the step table. At LATENTS and CORRECTED begin five coefficients each: of
# the latents, the noise, and the history's three tensors.
TIMESTEP = tl.constexpr(COLUMNS.index("timestep"))
SIGNAL = tl.constexpr(COLUMNS.index("sqrt_alpha_bar"))
SIGMA = tl.constexpr(COLUMNS.index("sqrt_one_minus_alpha_bar"))
GUIDANCE = tl.constexpr(COLUMNS.index("guidance_scale"))
LATENTS = tl.constexpr(COLUMNS.index("latents_z"))
CORRECTED = tl.constexpr(COLUMNS.index("corrected_z"))
NEXT_TIMESTEP = tl.constexpr(COLUMNS.index("next_timestep"))
NEXT_SIGNAL = tl.constexpr(COLUMNS.index("next_sqrt_alpha_bar"))
NEXT_SIGMA = tl.constexpr(COLUMNS.index("next_sqrt_one_minus_alpha_bar"))
ROW_LENGTH = tl.constexpr(len(COLUMNS))
BUFFERS = (
    "latents",
    "first_frame",
    "first_noise",
    "residual_noise",
    "history",
    "timestep",
    "table",
    "step",
)  # as the kernel takes them


@triton.jit
def combined(p_coefficients, before, noise, corrected, clean_1, clean_2):
    """The linear combination of a solver's step, by the five coefficients at `p_coefficients`."""
    x = tl.load(p_coefficients) * before + tl.load(p_coefficients + 1) * noise + tl.load(p_coefficients + 2) * corrected
    return x + tl.load(p_coefficients + 3) * clean_1 + tl.load(p_coefficients + 4) * clean_2


@triton.jit
def fused_step_kernel(
    p_latents, p_first_frame, p_first_noise, p_residual_noise, p_history, p_timestep, p_table, p_step, p_done, p_modulation,
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
    p_row = p_table + step * ROW_LENGTH
    blocks = tl.cdiv(pixels, PIXELS)
    clip = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.arange(0, PIXELS * FRAMES)
    pixel, frame = (tl.program_id(0) % blocks) * PIXELS + row // FRAMES, row % FRAMES
    inside = (pixel < pixels) & (frame < REAL_FRAMES)
    guided = tl.zeros([PIXELS * FRAMES, CHANNELS_P], tl.float32)
    guidance = tl.load(p_row + GUIDANCE)
    # Without guidance the conditional half, the second, is all there is.
    for branch in tl.range(tl.where(guidance == 1, 1, 0), 2, disable_licm=True):
        noise = fused_noise(
            p_latents, p_first_frame, p_residual_noise, p_modulation + tl.load(p_row + TIMESTEP).to(tl.int64) * LAYERS * 4 * WIDTH_P,
            p_in_proj, p_frame_embedding, p_self_qkv, p_self_out, p_cross_query, p_cross_out, p_bias, p_out_proj, p_out_bias, p_gate,
            clip + branch * batch, pixel, frame, inside, pixels,
            tl.load(p_row + SIGNAL), tl.load(p_row + SIGMA),
            CHANNELS, WIDTH, HEADS, LAYERS, REAL_FRAMES, NORMALIZE_PRIOR, CHANNELS_P, CONTEXT_P, WIDTH_P, HEAD_P, FRAMES, PARTS,
        )  # fmt: skip
        guided += noise * tl.where(branch == 1, guidance, 1 - guidance)

    channel = tl.arange(0, CHANNELS_P)
    real = inside[:, None] & (channel < CHANNELS)[None, :]
    channel_stride = REAL_FRAMES * pixels
    offset = clip * CHANNELS * channel_stride + frame * pixels + pixel
    before = load_tile(p_latents, channel, offset, channel_stride, real)
    history_stride = batch.to(tl.int64) * CHANNELS * channel_stride
    corrected = load_tile(p_history, channel, offset, channel_stride, real)
    clean_1 = load_tile(p_history + history_stride, channel, offset, channel_stride, real)
    clean_2 = load_tile(p_history + 2 * history_stride, channel, offset, channel_stride, real)
    latents = combined(p_row + LATENTS, before, guided, corrected, clean_1, clean_2)
    corrected = combined(p_row + CORRECTED, before, guided, corrected, clean_1, clean_2)
    clean = (before - tl.load(p_row + SIGMA) * guided) / tl.load(p_row + SIGNAL)
    # Frame 1 is held at the given picture: it follows its exact path.
    held = real & (frame == 0)[:, None]
    first_offset = clip * CHANNELS * pixels + pixel
    path = tl.load(p_row + NEXT_SIGNAL) * load_tile(p_first_frame, channel, first_offset, pixels, held)
    path += tl.load(p_row + NEXT_SIGMA) * load_tile(p_first_noise, channel, first_offset, pixels, held)
    latents = tl.where(held, path, latents)
    next_timestep = tl.load(p_row + NEXT_TIMESTEP).to(tl.int64)
    tl.debug_barrier()  # all of the tile is read before any of it is overwritten
    place = offset[:, None] + channel[None, :] * channel_stride
    tl.store(p_latents + place, latents, mask=real)
    tl.store(p_latents + history_stride + place, latents, mask=real)
    tl.store(p_history + place, corrected, mask=real)
    tl.store(p_history + history_stride + place, clean, mask=real)
    tl.store(p_history + 2 * history_stride + place, clean_1, mask=real)
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
    history: Tensor,
    timestep: Tensor,
    table: Tensor,
    step: Tensor,
    compute: torch.dtype | None = None,
    tile: Tile | None = None,
) -> None:
    """Move `latents`, `history`, `timestep` and `step` on by one step, in place, as `fused_step_ref` does."""
    buffers = dict(latents=latents, first_frame=first_frame, first_noise=first_noise, residual_noise=residual_noise)
    buffers |= dict(history=history, timestep=timestep, table=table, step=step)
    compute = compute or next(fusion.parameters(), residual_noise).dtype
    arguments, constants, shape = step_arguments(fusion, buffers, compute)
    tile = tile or tile_choices(shape, compute)[0]
    batch, pixels = arguments[-2:]
    fused_step_kernel[(batch * triton.cdiv(pixels, tile.pixels),)](
        *arguments, **constants, PIXELS=tile.pixels, num_warps=tile.warps, num_stages=tile.stages
    )


def step_arguments(
    fusion: nn.Module, buffers: dict[str, Tensor], compute: torch.dtype
) -> tuple[list[Any], dict[str, int], TileShape]:
    """The kernel's arguments in order, ending in batch and pixels, all its constants but PIXELS, and its sizes."""
    latents, table, step = buffers["latents"], buffers["table"], buffers["step"]
    _, channels, frames, h, w = latents.shape
    shape = shape_of(fusion, channels, frames)
    packed = pack(fusion, shape, compute, torch.arange(int(table[:, TIMESTEP.value].max()) + 1, device=latents.device))
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
    history: Tensor,
    timestep: Tensor,
    table: Tensor,
    step: Tensor,
) -> None:
    """One step after the UNet in plain torch, in place.

    latents, residual_noise: [2B, C, F, H, W], the unconditional half first, both halves of latents equal; first_frame
    [2B, C, H, W], clean; first_noise [B, C, H, W], frame 1's own; history [3, B, C, F, H, W], what the steps before
    left (trip_rt/sampling/step.py); timestep int64 [1]; table fp32 [rows, len(COLUMNS)] and step int32 [1], the row in it
    (trip_rt/sampling/step_table.py).
    """
    row = dict(zip(COLUMNS, table[int(step)].to(latents.dtype), strict=True))
    signal, sigma, guidance = row["sqrt_alpha_bar"], row["sqrt_one_minus_alpha_bar"], row["guidance_scale"]
    noise = fusion(latents, first_frame, residual_noise, signal[None], sigma[None], row["timestep"][None].long())
    unconditional, conditional = noise.chunk(2)
    before, guided = latents.chunk(2)[0], unconditional + guidance * (conditional - unconditional)
    terms = torch.stack([before, guided, *history])
    following, corrected = (
        torch.tensordot(torch.stack([row[name] for name in COLUMNS if name.startswith(update)]), terms, 1)
        for update in ("latents_", "corrected_")
    )
    history.copy_(torch.stack([corrected, (before - sigma * guided) / signal, history[1]]))
    next_signal, next_sigma = row["next_sqrt_alpha_bar"], row["next_sqrt_one_minus_alpha_bar"]
    following[:, :, 0] = next_signal * first_frame.chunk(2)[0] + next_sigma * first_noise
    latents.copy_(torch.cat([following, following]))
    timestep.fill_(int(row["next_timestep"]))
    step += 1
