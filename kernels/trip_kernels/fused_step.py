"""One launch does everything that a denoising step does after the UNet: prior, TNF, λ skip, guidance, the solver's
update and the held first frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trip_kernels.fuse_noise import shape_of
from trip_kernels.packing import pack, weight_layout
from trip_kernels.tile_choices import Tile, tile_choices
from trip_kernels.tnf_tile import fused_noise, load_tile
from trip_rt.sampling.step import History, advance, guide, hold_first_frame
from trip_rt.sampling.step_table import COLUMNS, steps_of_row

if TYPE_CHECKING:
    from torch import nn

# Where the numbers of a step lie in its row of the step table. At LATENTS and CORRECTED begin five coefficients each:
# of the latents, the noise, and the history's three tensors.
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


@triton.jit
def combined(p_coefficients, before, noise, corrected, clean_1, clean_2):
    """The linear combination that a solver's step is, with the five coefficients at `p_coefficients`."""
    x = tl.load(p_coefficients) * before + tl.load(p_coefficients + 1) * noise + tl.load(p_coefficients + 2) * corrected
    return x + tl.load(p_coefficients + 3) * clean_1 + tl.load(p_coefficients + 4) * clean_2


# By default Triton makes a constant of an integer argument that is 1 and compiles anew for one that 16 divides. The
# kernel in a bundle serves any batch and any number of pixels.
@triton.jit(do_not_specialize=["batch", "pixels"])
def fused_step_kernel(
    p_latents,
    p_first_frame,
    p_first_noise,
    p_residual_noise,
    p_history,
    p_timestep,
    p_table,
    p_step,
    p_done,
    p_weights,
    batch,
    pixels,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One program moves PIXELS pixels of one clip on by a step. It fuses the noise of the unconditional half first.

    `p_done` counts the programs that have finished. The last one moves the loop on to the next step and sets the count
    back to zero.
    """
    step = tl.load(p_step)
    p_row = p_table + step * ROW_LENGTH
    blocks = tl.cdiv(pixels, PIXELS)
    clip = (tl.program_id(0) // blocks).to(tl.int64)
    ROWS: tl.constexpr = PIXELS * SHAPE.frames
    CHANNELS_P: tl.constexpr = SHAPE.channels_p  # Triton 3.6 takes no plain number of a shape in `zeros`
    row = tl.arange(0, ROWS)
    pixel, frame = (tl.program_id(0) % blocks) * PIXELS + row // SHAPE.frames, row % SHAPE.frames
    inside = (pixel < pixels) & (frame < SHAPE.real_frames)
    guided = tl.zeros([ROWS, CHANNELS_P], tl.float32)
    guidance = tl.load(p_row + GUIDANCE)
    # Without guidance the second half, the conditional one, is enough.
    for branch in tl.range(tl.where(guidance == 1, 1, 0), 2, disable_licm=True):
        noise = fused_noise(
            p_latents,
            p_first_frame,
            p_residual_noise,
            p_weights,
            i_modulation=tl.load(p_row + TIMESTEP).to(tl.int64),
            clip=clip + branch * batch,
            pixel=pixel,
            frame=frame,
            inside=inside,
            pixels=pixels,
            signal=tl.load(p_row + SIGNAL),
            sigma=tl.load(p_row + SIGMA),
            SHAPE=SHAPE,
            LAYOUT=LAYOUT,
        )
        guided += noise * tl.where(branch == 1, guidance, 1 - guidance)

    CHANNELS: tl.constexpr = SHAPE.channels
    channel = tl.arange(0, CHANNELS_P)
    real = inside[:, None] & (channel < CHANNELS)[None, :]
    channel_stride = SHAPE.real_frames * pixels
    offset = clip * CHANNELS * channel_stride + frame * pixels + pixel
    before = load_tile(p_latents, channel, offset, channel_stride, real)
    history_stride = batch.to(tl.int64) * CHANNELS * channel_stride
    corrected = load_tile(p_history, channel, offset, channel_stride, real)
    clean_1 = load_tile(p_history + history_stride, channel, offset, channel_stride, real)
    clean_2 = load_tile(p_history + 2 * history_stride, channel, offset, channel_stride, real)
    latents = combined(p_row + LATENTS, before, guided, corrected, clean_1, clean_2)
    corrected = combined(p_row + CORRECTED, before, guided, corrected, clean_1, clean_2)
    clean = (before - tl.load(p_row + SIGMA) * guided) / tl.load(p_row + SIGNAL)
    # Frame 1 is held at the given picture: it follows the exact path from its own noise.
    held = real & (frame == 0)[:, None]
    first_offset = clip * CHANNELS * pixels + pixel
    path = tl.load(p_row + NEXT_SIGNAL) * load_tile(p_first_frame, channel, first_offset, pixels, held)
    path += tl.load(p_row + NEXT_SIGMA) * load_tile(p_first_noise, channel, first_offset, pixels, held)
    latents = tl.where(held, path, latents)
    next_timestep = tl.load(p_row + NEXT_TIMESTEP).to(tl.int64)
    tl.debug_barrier()  # the program reads the whole tile before it overwrites any of it
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
    """Move `latents`, `history`, `timestep` and `step` on by one step, in place, as `fused_step_ref` does.

    The matrix products of TNF take operands of `compute`, by default the weights' own dtype.
    """
    buffers = dict(
        latents=latents,
        first_frame=first_frame,
        first_noise=first_noise,
        residual_noise=residual_noise,
        history=history,
        timestep=timestep,
        table=table,
        step=step,
    )
    compute = compute or next(fusion.parameters(), residual_noise).dtype
    arguments = step_arguments(fusion, buffers, compute)
    launch_fused_step(arguments, tile or tile_choices(arguments["SHAPE"], compute)[0])


def step_arguments(fusion: nn.Module, buffers: dict[str, Tensor], compute: torch.dtype) -> dict[str, Any]:
    """The arguments of `fused_step_kernel` by name, all but PIXELS; `buffers` are the tensors that `fused_step`
    takes."""
    latents, table, step = buffers["latents"], buffers["table"], buffers["step"]
    _, channels, frames, h, w = latents.shape
    shape = shape_of(fusion, channels, frames)
    timesteps = torch.arange(int(table[:, TIMESTEP.value].max()) + 1, device=latents.device)
    return {f"p_{name}": tensor for name, tensor in buffers.items()} | dict(
        p_done=torch.zeros_like(step),
        p_weights=pack(fusion, shape, compute, timesteps),
        batch=len(latents) // 2,
        pixels=h * w,
        SHAPE=shape,
        LAYOUT=weight_layout(shape, compute),
    )


def launch_fused_step(arguments: dict[str, Any], tile: Tile) -> Any:
    """Launch the kernel on `step_arguments` and return what Triton compiled, None in its interpreter."""
    programs = arguments["batch"] * triton.cdiv(arguments["pixels"], tile.pixels)
    return fused_step_kernel[(programs,)](**arguments, PIXELS=tile.pixels, num_warps=tile.warps, num_stages=tile.stages)


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
    [2B, C, H, W], clean; first_noise [B, C, H, W], the noise of frame 1; history [3, B, C, F, H, W], what the steps
    before left (trip_rt/sampling/step.py); timestep int64 [1]; table fp32 [rows, len(COLUMNS)]; step int32 [1], the row
    of the table to do (trip_rt/sampling/step_table.py).
    """
    now, following = steps_of_row(table[int(step)].tolist())
    values = now.sqrt_alpha_bar, now.sqrt_one_minus_alpha_bar, now.timestep
    signal, sigma, t = (torch.tensor([value], device=latents.device) for value in values)
    noise = fusion(latents, first_frame, residual_noise, signal.to(latents.dtype), sigma.to(latents.dtype), t)
    batch = len(first_noise)
    moved, left = advance(now, latents[:batch], guide(now, noise, batch), History(*history))
    hold_first_frame(following, moved, first_frame[:batch], first_noise)
    history.copy_(torch.stack([torch.zeros_like(moved) if kept is None else kept for kept in left]))
    latents.copy_(torch.cat([moved, moved]))
    timestep.fill_(following.timestep)
    step += 1
