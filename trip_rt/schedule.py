"""The noise schedule and the DDIM update, as pure functions of a ScheduleConfig. Tables are fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trip_rt.config import ScheduleConfig
from trip_rt.errors import InputError


def alpha_bars(config: ScheduleConfig) -> NDArray[np.float64]:
    """ᾱ_t = Π (1 − β_s) for t = 0 … num_train_timesteps − 1. `scaled_linear` is linear in sqrt(β) (ModelScope, Stable Diffusion)."""
    if config.beta_schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, config.num_train_timesteps)
    else:
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
    return np.cumprod(1 - betas).astype(np.float64)


def inference_timesteps(config: ScheduleConfig, num_inference_steps: int) -> NDArray[np.int64]:
    """The timesteps an inference run visits, falling; `leading` and `trailing` as in Lin et al. 2023, table 2."""
    total = config.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise InputError(f"steps: found {num_inference_steps}, expected 1 to {total}")
    if config.timestep_spacing == "trailing":
        return np.round(np.arange(total, 0, -total / num_inference_steps)).astype(np.int64)[:num_inference_steps] - 1
    stride = total // num_inference_steps
    return np.minimum(np.arange(num_inference_steps)[::-1] * stride + config.steps_offset, total - 1)


@dataclass(frozen=True)
class DDIMStep:
    """One deterministic DDIM step z_prev = a·z + b·ε̃ from `timestep` (Song et al. 2021, eq. 12 with σ = 0)."""

    timestep: int
    sqrt_alpha_bar: float
    sqrt_one_minus_alpha_bar: float
    a: float
    b: float


def ddim_steps(config: ScheduleConfig, num_inference_steps: int) -> list[DDIMStep]:
    """The steps of a whole run, first to last; each lands `num_train_timesteps // num_inference_steps` lower, the last on clean latents."""
    table = alpha_bars(config)
    stride = config.num_train_timesteps // num_inference_steps if num_inference_steps else 0
    steps = []
    for timestep in inference_timesteps(config, num_inference_steps).tolist():
        alpha_bar = float(table[timestep])
        landing = float(table[timestep - stride]) if timestep >= stride else 1.0
        a = math.sqrt(landing / alpha_bar)
        b = math.sqrt(1 - landing) - a * math.sqrt(1 - alpha_bar)
        steps.append(DDIMStep(timestep, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), a, b))
    return steps


# A row of the step table, fp32: what one step needs, and of the step after it what holds frame 1 there.
STEP_COLUMNS = (
    "timestep", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar", "a", "b", "guidance_scale",
    "next_timestep", "next_sqrt_alpha_bar", "next_sqrt_one_minus_alpha_bar",
)  # fmt: skip


def step_table(steps: Sequence[DDIMStep], guidance_scale: float) -> NDArray[np.float32]:
    """The rows of a run, fp32 [len(steps) + 1, len(STEP_COLUMNS)], for a loop that counts its steps on a GPU.

    Row 0 is the beginning: z = 1·z + 0·ε̃, which changes nothing but puts frame 1 on its path at the first step. Row i is step i. After the last step
    frame 1 is the given latent itself.
    """
    landings = [*((step.timestep, step.sqrt_alpha_bar, step.sqrt_one_minus_alpha_bar) for step in steps), (0, 1.0, 0.0)]
    updates = [(1.0, 0.0), *((step.a, step.b) for step in steps)]
    rows = [(*landings[max(0, i - 1)], *update, guidance_scale, *landings[i]) for i, update in enumerate(updates)]
    return np.array(rows, np.float32)
