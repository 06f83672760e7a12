"""What the parts run on: models' sizes, random weights and inputs, the reference without a word to the host, and its
cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trip_kernels.packing import TileShape
from trip_kernels.tile_choices import Tile
from trip_reference.fusion import NoiseFusion
from trip_reference.presets import DEMO, TRIP_256, Preset
from trip_rt.accuracy import relative_errors
from trip_rt.config import TNFConfig, TripConfig
from trip_rt.sampling.step_table import COLUMNS, step_table
from trip_rt.settings import Settings, Speed

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BOUNDS = {"fp16": 1e-3, "bf16": 8e-3, "fp32": 1e-5}  # RMS error over RMS; bf16 rounds 8 times as coarsely as fp16
FLOORS = {"fp16": 40.0, "fp32": 60.0}  # dB of the loop's latents
ROOT = Path(__file__).parents[2]
# A model with all that the real ones have, small enough for an interpreter.
TINY = Preset(
    trip=dataclasses.replace(
        DEMO.trip,
        num_frames=5,
        height=32,
        width=48,
        latent_channels=8,
        vae_scale_factor=8,
        text_width=16,
        tnf=TNFConfig(16, 2, 1),
    ),
    unet=DEMO.unet | dict(block_out_channels=(8, 16), norm_num_groups=4),
    vae=DEMO.vae | dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4),
    text_encoder=DEMO.text_encoder
    | dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, bos_token_id=62, eos_token_id=63),
)
ODD = dataclasses.replace(
    DEMO.trip,
    num_frames=7,
    height=40,
    width=24,
    latent_channels=3,
    vae_scale_factor=8,
    tnf=TNFConfig(48, 3, 3),
    normalize_prior=False,
    gate="frame",
)
ROWS = DEMO.trip.schedule.num_train_timesteps + 1  # of the loop's own step table


@dataclass
class Context:
    """How to run: for real or dry, with how many rounds, where files may lie, what takes figures as they come, and the
    folder of machine code compiled before, if there is one."""

    dry: bool
    quick: bool
    folder: Path
    keep: Callable[[dict[str, Any]], None] = lambda figures: None
    kernels: Path | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def rounds(self) -> int:
        return 1 if self.dry else 15 if self.quick else 50

    @property
    def full(self) -> Preset:
        return TINY if self.dry else TRIP_256


def random_fusion(config: TripConfig, device: str) -> NoiseFusion:
    """A fusion with no dead path."""
    torch.manual_seed(0)
    fusion = NoiseFusion(config)
    with torch.no_grad():
        for parameter in fusion.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return fusion.eval().requires_grad_(False).to(device)


def step_tensors(config: TripConfig, batch: int, device: str, seed: int = 0) -> dict[str, Tensor]:
    """The arguments of `fused_step` at the first of four steps; fp32 buffers lie between NaNs, so that what reads past
    their ends shows."""
    generator = torch.Generator().manual_seed(seed)
    size = config.latent_shape
    latents, residual = (torch.randn(clips, *size, generator=generator) for clips in (batch, 2 * batch))
    first, first_noise = (torch.randn(batch, size[0], *size[2:], generator=generator) for _ in range(2))
    history = torch.randn(3, batch, *size, generator=generator)
    buffers = dict(
        latents=torch.cat([latents, latents]),
        first_frame=torch.cat([first, first]),
        first_noise=first_noise,
        residual_noise=residual,
    )
    buffers["history"] = history
    steps = Settings(Speed("unipc", 4), guidance_scale=2.5).steps(config)
    return {name: _guarded(tensor.to(device)) for name, tensor in buffers.items()} | {
        "timestep": torch.tensor([steps[0].timestep], device=device),
        "table": torch.from_numpy(step_table(steps)).to(device),
        "step": torch.ones(1, dtype=torch.int32, device=device),
    }


def steady_table(config: TripConfig, device: str = "cpu") -> Tensor:
    """A step table of ROWS equal rows that stay at one timestep near 500; under them latents stay as large as they are,
    however often moved on."""
    step = min(
        Settings(num_inference_steps=2).steps(config),
        key=lambda step: abs(step.timestep - 500),
    )
    point = dict(
        timestep=float(step.timestep),
        sqrt_alpha_bar=step.sqrt_alpha_bar,
        sqrt_one_minus_alpha_bar=step.sqrt_one_minus_alpha_bar,
    )
    row = point | {f"next_{name}": value for name, value in point.items()}
    row |= dict(guidance_scale=2.5, latents_z=0.5, latents_noise=0.1)
    return torch.tensor([[row.get(name, 0.0) for name in COLUMNS]], device=device).repeat(ROWS, 1)


def of_row(row: Tensor, column: str, count: int = 1) -> Tensor:
    """The `count` numbers of a step table's row that begin at `column`, [count]; a view."""
    start = COLUMNS.index(column)
    return row[start : start + count]


@torch.no_grad()
def reference_step(
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
    """`fused_step_ref` as fast as eager torch runs it: it reads the row on the device, so the host waits for
    nothing."""
    row = table.index_select(0, step)[0]
    signal, sigma = of_row(row, "sqrt_alpha_bar"), of_row(row, "sqrt_one_minus_alpha_bar")
    noise = fusion(latents, first_frame, residual_noise, signal, sigma, of_row(row, "timestep").long())
    unconditional, conditional = noise.chunk(2)
    before, guided = latents.chunk(2)[0], unconditional + of_row(row, "guidance_scale") * (conditional - unconditional)
    terms = torch.stack([before, guided, *history])
    following, corrected = (
        (of_row(row, column, len(terms))[:, None, None, None, None, None] * terms).sum(0)
        for column in ("latents_z", "corrected_z")
    )
    history.copy_(torch.stack([corrected, (before - sigma * guided) / signal, history[1]]))
    next_signal, next_sigma = of_row(row, "next_sqrt_alpha_bar"), of_row(row, "next_sqrt_one_minus_alpha_bar")
    following[:, :, 0] = next_signal * first_frame.chunk(2)[0] + next_sigma * first_noise
    latents.copy_(torch.cat([following, following]))
    timestep.copy_(of_row(row, "next_timestep"))
    step.add_(1)


def rms_ratio(found: Tensor, expected: Tensor) -> float:
    """RMS of the error over RMS of the expected; NOT_A_NUMBER where anything is not a number."""
    return relative_errors(*(tensor.detach().double().cpu().numpy() for tensor in (found, expected)))[1]


def kernel_flops(shape: TileShape, tile: Tile, batch: int, pixels: int, precision: str) -> int:
    """Floating-point operations of the fused step's matrix products for both halves, padding included; a product in
    fp32 is three in fp16."""
    tokens = 2 * batch * -(-pixels // tile.pixels) * tile.pixels * shape.frames
    attention = 2 * shape.frames
    own = shape.heads * shape.head_p * (4 * shape.width_p + attention)
    cross = shape.heads * shape.context_p * (2 * shape.width_p + attention)
    products = shape.width_p * (shape.context_p + shape.channels_p) + shape.layers * (own + cross)
    return 2 * tokens * products * (3 if precision == "fp32" else 1)


def reference_flops(config: TripConfig, batch: int) -> int:
    """Floating-point operations of the reference's matrix products for both halves, as its modules define them."""
    width, channels, layers = config.tnf.hidden_size, config.latent_channels, config.tnf.num_layers
    tokens = 2 * batch * math.prod(config.latent_shape[1:])
    attention = 2 * config.num_frames * width
    own = 4 * width * width + attention
    cross = 2 * width * width + 4 * channels * width + attention
    time = 2 * width * width * (1 + 2 * layers)
    return 2 * (tokens * (2 * channels * width + layers * (own + cross)) + time)


def build_kernels(context: Context, cases: dict[str, tuple[NoiseFusion, TripConfig, str]]) -> dict[str, Any]:
    """By the names of `cases`, the fused step compiled ahead of time for this GPU in the case's precision, here or
    before, or what was raised instead."""
    from gpu import prebuilt
    from trip_export.kernels import build_kernel
    from trip_kernels.compile import compile_fused_step

    capability = "9.0" if context.dry else "{}.{}".format(*torch.cuda.get_device_capability())

    compile_step = partial(prebuilt.read, context.kernels) if context.kernels else compile_fused_step

    def build(index: int, fusion: NoiseFusion, config: TripConfig, precision: str) -> Any:
        try:
            return build_kernel(
                fusion,
                config,
                precision,
                [capability],
                f"{index:016}",
                context.folder,
                lambda text: None,
                compile_step,
            )
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(cases)) as pool:  # it compiles in processes
        return dict(zip(cases, pool.map(build, range(len(cases)), *zip(*cases.values(), strict=True)), strict=True))


def _guarded(tensor: Tensor) -> Tensor:
    margin = 64
    whole = torch.full((tensor.numel() + 2 * margin,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    whole[margin:-margin] = tensor.flatten()
    return whole[margin:-margin].view(tensor.shape)
