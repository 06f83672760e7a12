"""What a run does at each of its steps: the model's own way, or with less work for nearly the same clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trip_rt.config import TripConfig
from trip_rt.errors import InputError
from trip_rt.solvers import Solver, Step, solver_steps


@dataclass(frozen=True)
class Speed:
    """How much work a run saves; the defaults save none.

    - `solver` and `num_inference_steps` (None: the model's own): a better solver needs fewer steps.
    - `guidance_interval`: guidance, and with it the unconditional half of all work, only where timestep /
      num_train_timesteps lies within (Kynkäänniemi et al. 2024); outside of it the guidance scale is 1.
    - `feature_reuse`: the whole UNet every so many steps, in between only its outermost layer, on deep features that
      the last whole run left (DeepCache, Ma et al. 2023).
    """

    solver: Solver = "ddim"
    num_inference_steps: int | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    feature_reuse: int = 1


SPEEDS = {
    "exact": Speed(),
    "balanced": Speed("unipc", 20),
    "fast": Speed("unipc", 8),
}


@dataclass(frozen=True)
class LoopStep:
    """A solver's step with its guidance scale, 1 where the conditional half is all there is; `shallow`, whether it
    reuses deep features."""

    step: Step
    guidance_scale: float
    shallow: bool = False

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1


def speed_named(name: str) -> Speed:
    """One of SPEEDS; InputError for another name."""
    if name not in SPEEDS:
        raise InputError(f"speed: found {name!r}, expected {', '.join(SPEEDS)}")
    return SPEEDS[name]


def loop_steps(config: TripConfig, speed: Speed | None = None, guidance_scale: float | None = None) -> list[LoopStep]:
    """The steps of a run, first to last; `guidance_scale` is the model's own by default. InputError where something is
    out of bounds."""
    speed = speed or Speed()
    scale = config.guidance_scale if guidance_scale is None else guidance_scale
    if not (math.isfinite(scale) and 0 <= scale <= 100):
        raise InputError(f"guidance scale: found {scale}, expected 0 to 100")
    low, high = speed.guidance_interval
    if not 0 <= low <= high <= 1:
        raise InputError(
            f"guidance interval: found {low} to {high}, expected two numbers from 0 to 1, the lower one first"
        )
    if speed.feature_reuse < 1:
        raise InputError(f"feature reuse: found {speed.feature_reuse}, expected at least 1, which reuses none")
    count = config.num_inference_steps if speed.num_inference_steps is None else speed.num_inference_steps
    steps: list[LoopStep] = []
    whole = -1  # the last step that ran the whole UNet
    for i, step in enumerate(solver_steps(config.schedule, count, speed.solver)):
        guided = scale != 1 and low <= step.timestep / config.schedule.num_train_timesteps <= high
        # The features of an unguided run are of the conditional half alone.
        shallow = whole >= 0 and i - whole < speed.feature_reuse and not (guided and not steps[whole].guided)
        whole = whole if shallow else i
        steps.append(LoopStep(step, scale if guided else 1.0, shallow))
    return steps


# A row of the step table, fp32: what one step needs, and of the step after it what holds frame 1 there. The
# coefficients are those of Step.
COEFFICIENTS = ("z", "noise", "corrected", "clean_1", "clean_2")
STEP_COLUMNS = (
    "timestep", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar", "guidance_scale",
    *(f"latents_{name}" for name in COEFFICIENTS), *(f"corrected_{name}" for name in COEFFICIENTS),
    "next_timestep", "next_sqrt_alpha_bar", "next_sqrt_one_minus_alpha_bar",
)  # fmt: skip


def step_table(steps: Sequence[LoopStep]) -> NDArray[np.float32]:
    """The rows of a run, fp32 [len(steps) + 1, len(STEP_COLUMNS)], for a loop that counts its steps on a GPU.

    Row 0 is the beginning: z = 1·z, which changes nothing but puts frame 1 on its path at the first step. Row i is step
    i. After the last step frame 1 is the given latent itself.
    """
    points = [(one.step.timestep, one.step.sqrt_alpha_bar, one.step.sqrt_one_minus_alpha_bar) for one in steps]
    landings = [*points, (0, 1.0, 0.0)]
    rows = [(*landings[0], 1.0, *(1.0, 0.0, 0.0, 0.0, 0.0), *(0.0,) * 5, *landings[0])]
    rows += [
        (*points[i], one.guidance_scale, *one.step.latents, *one.step.corrected, *landings[i + 1])
        for i, one in enumerate(steps)
    ]
    return np.array(rows, np.float32)
