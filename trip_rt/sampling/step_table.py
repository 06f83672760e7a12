"""A run's steps as a table for the fused kernel, which counts steps on the GPU and reads their numbers there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trip_rt.sampling.step import History, Step

_TERMS = ("z", "noise", *History._fields)
# A row, fp32: the step's own numbers, and those of the step after it that frame 1 is put to.
COLUMNS = (
    "timestep",
    "sqrt_alpha_bar",
    "sqrt_one_minus_alpha_bar",
    "guidance_scale",
    *(f"latents_{term}" for term in _TERMS),
    *(f"corrected_{term}" for term in _TERMS),
    "next_timestep",
    "next_sqrt_alpha_bar",
    "next_sqrt_one_minus_alpha_bar",
)


def step_table(steps: Sequence[Step]) -> NDArray[np.float32]:
    """fp32 [len(steps) + 1, len(COLUMNS)].

    Row 0 is the beginning: it leaves the latents as they are (1·z) and puts frame 1 on its path. Row i is step i. After
    the last step frame 1 is the given latent itself.
    """
    points = [(step.timestep, step.sqrt_alpha_bar, step.sqrt_one_minus_alpha_bar) for step in steps]
    landings = [*points, (0, 1.0, 0.0)]
    rows = [(*landings[0], 1.0, *(1.0, 0.0, 0.0, 0.0, 0.0), *(0.0,) * 5, *landings[0])]
    for point, step, landing in zip(points, steps, landings[1:], strict=True):
        rows.append((*point, step.guidance_scale, *step.latents, *step.corrected, *landing))
    return np.array(rows, np.float32)


def steps_of_row(row: Sequence[float]) -> tuple[Step, Step]:
    """The step of a table's row and the step after it, of which a row says where it starts and no more."""
    values = dict(zip(COLUMNS, row, strict=True))

    def start(prefix: str) -> tuple[int, float, float]:
        timestep, signal, sigma = (values[f"{prefix}{name}"] for name in COLUMNS[:3])
        return int(timestep), signal, sigma

    latents, corrected = (tuple(values[f"{of}_{term}"] for term in _TERMS) for of in ("latents", "corrected"))
    nothing = (0.0,) * 5
    return Step(*start(""), latents, corrected, values["guidance_scale"]), Step(*start("next_"), nothing, nothing)  # type: ignore[arg-type]
