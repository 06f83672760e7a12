"""Solvers of the denoising ODE as coefficients of their steps: DDIM, DPM-Solver++(2M), UniPC. Pure functions, fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trip_rt.config import ScheduleConfig
from trip_rt.errors import InputError
from trip_rt.sampling.schedule import alpha_bars, inference_timesteps
from trip_rt.sampling.step import Step

Solver = Literal["ddim", "dpm++", "unipc"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class _Point:
    """Where a step starts or lands: signal α = sqrt(ᾱ), noise σ = sqrt(1 − ᾱ), and the log of their ratio."""

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


def solver_steps(config: ScheduleConfig, num_inference_steps: int, solver: Solver = "ddim") -> list[Step]:
    """The steps of a whole run, first to last; the last one lands on clean latents. InputError for an unknown solver or
    a number of steps that the schedule does not have.

    DDIM lands `num_train_timesteps // num_inference_steps` below its start, as diffusers' does; the other solvers land
    where the next step starts.
    """
    if solver not in SOLVERS:
        raise InputError(f"solver: found {solver!r}, expected one of {', '.join(SOLVERS)}")
    table = alpha_bars(config)
    timesteps = inference_timesteps(config, num_inference_steps).tolist()
    stride = config.num_train_timesteps // num_inference_steps
    landings = [timestep - stride for timestep in timesteps] if solver == "ddim" else [*timesteps[1:], -1]
    points = [_Point(math.sqrt(table[timestep]), math.sqrt(1 - table[timestep])) for timestep in timesteps]
    targets = [_Point(math.sqrt(table[t]), math.sqrt(1 - table[t])) if t >= 0 else _Point(1.0, 0.0) for t in landings]
    rules: dict[Solver, Callable[[list[_Point], int, _Point], tuple[Vector, Vector]]] = {
        "ddim": _ddim,
        "dpm++": _dpm,
        "unipc": _unipc,
    }
    steps = []
    for i, (timestep, target) in enumerate(zip(timesteps, targets, strict=True)):
        latents, corrected = (tuple(map(float, vector)) for vector in rules[solver](points, i, target))
        steps.append(Step(timestep, points[i].alpha, points[i].sigma, latents, corrected))  # type: ignore[arg-type]
    return steps


# The five tensors a step is linear in (sampling/step.py), as vectors of their coefficients.
_Z, _NOISE, _CORRECTED, _CLEAN_1, _CLEAN_2 = np.eye(5)
_NONE = np.zeros(5)


def _clean(point: _Point) -> Vector:
    """x̂_0, the clean latents predicted at this step."""
    return (_Z - point.sigma * _NOISE) / point.alpha


def _ddim(points: list[_Point], i: int, target: _Point) -> tuple[Vector, Vector]:
    """Song et al. 2021, eq. 12 with σ = 0."""
    return target.alpha * _clean(points[i]) + target.sigma * _NOISE, _NONE


def _dpm(points: list[_Point], i: int, target: _Point) -> tuple[Vector, Vector]:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2. The first step and the last, which lands on σ = 0, are of first
    order."""
    here, clean = points[i], _clean(points[i])
    if i > 0 and target.sigma > 0:
        ratio = (here.log_snr - points[i - 1].log_snr) / (target.log_snr - here.log_snr)
        clean = clean + (clean - _CLEAN_1) / (2 * ratio)
    shrink = math.expm1(here.log_snr - target.log_snr)
    return target.sigma / here.sigma * _Z - target.alpha * shrink * clean, _NONE


def _unipc(points: list[_Point], i: int, target: _Point) -> tuple[Vector, Vector]:
    """UniPC of order 2 with B(h) = e^h − 1 on predicted clean latents (Zhao et al. 2023, algorithms 7 and 8): correct
    the latents, then predict the next ones."""
    here, clean = points[i], _clean(points[i])
    corrected = _Z if i == 0 else _corrected(points, i)
    h = target.log_snr - here.log_snr
    landed = target.sigma / here.sigma * corrected - target.alpha * math.expm1(-h) * clean
    if 0 < i < len(points) - 1:
        ratio = (points[i - 1].log_snr - here.log_snr) / h
        landed = landed - target.alpha * math.expm1(-h) * 0.5 * (_CLEAN_1 - clean) / ratio
    return landed, corrected


def _corrected(points: list[_Point], i: int) -> Vector:
    """z̄ at step i (UniC): step i − 1 is repeated, of the same order, with the clean latents now predicted at step i."""
    before, here = points[i - 1], points[i]
    h = here.log_snr - before.log_snr
    shrink = math.expm1(-h)
    landed = here.sigma / before.sigma * _CORRECTED - here.alpha * shrink * _CLEAN_1
    difference = _clean(here) - _CLEAN_1
    if i == 1:
        return landed - here.alpha * shrink * 0.5 * difference
    ratio = (points[i - 2].log_snr - before.log_snr) / h
    phi_1 = shrink / -h - 1
    phi_2 = phi_1 / -h - 0.5
    # The weights of both differences solve older + newest = phi_1 / shrink, ratio·older + newest = 2·phi_2 / shrink.
    older = (phi_1 - 2 * phi_2) / shrink / (1 - ratio)
    newest = phi_1 / shrink - older
    return landed - here.alpha * shrink * (older * (_CLEAN_2 - _CLEAN_1) / ratio + newest * difference)
