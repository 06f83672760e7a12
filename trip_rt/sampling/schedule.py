"""The noise schedule as pure functions of a ScheduleConfig. Tables are fp64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trip_rt.config import ScheduleConfig
from trip_rt.errors import InputError


def alpha_bars(config: ScheduleConfig) -> NDArray[np.float64]:
    """ᾱ_t = Π (1 − β_s) for t = 0 … num_train_timesteps − 1. `scaled_linear` is linear in sqrt(β) (ModelScope, Stable
    Diffusion)."""
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
