"""Solvers of the denoising ODE, each as the coefficients of its steps: DDIM, DPM-Solver++(2M) and UniPC. Pure
functions, fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trip_rt.config import ScheduleConfig
from trip_rt.errors import InputError
from trip_rt.schedule import alpha_bars, inference_timesteps

Solver = Literal["ddim", "dpm++", "unipc"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
Coefficients = tuple[float, float, float, float, float]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """One step from `timestep`, linear in five tensors: the latents z, the predicted noise ε̃, and what the steps
    before left, namely the corrected latents z̄ and the clean latents x⁻ and x⁻⁻ predicted one and two steps before.

    `latents` are the coefficients of the next latents, `corrected` those of this step's z̄. The clean latents predicted
    here are (z − sqrt_one_minus_alpha_bar·ε̃) / sqrt_alpha_bar.
    """

    timestep: int
    sqrt_alpha_bar: float
    sqrt_one_minus_alpha_bar: float
    latents: Coefficients
    corrected: Coefficients


@dataclass(frozen=True)
class _Point:
    """Where a step starts or lands: signal α = sqrt(ᾱ), noise σ = sqrt(1 − ᾱ), and half the log of their ratio's
    square."""

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


def solver_steps(config: ScheduleConfig, num_inference_steps: int, solver: Solver = "ddim") -> list[Step]:
    """The steps of a whole run, first to last, the last landing on clean latents; InputError for a number or a solver
    that is not to be had.

    DDIM lands `num_train_timesteps // num_inference_steps` lower than it starts, as diffusers' does; the others where
    the next one starts.
    """
    if solver not in SOLVERS:
        raise InputError(f"solver: found {solver!r}, expected one of {', '.join(SOLVERS)}")
    table = alpha_bars(config)
    timesteps = inference_timesteps(config, num_inference_steps).tolist()
    stride = config.num_train_timesteps // num_inference_steps
    landings = [timestep - stride for timestep in timesteps] if solver == "ddim" else [*timesteps[1:], -1]
    points = [_Point(math.sqrt(table[timestep]), math.sqrt(1 - table[timestep])) for timestep in timesteps]
    targets = [_Point(math.sqrt(table[t]), math.sqrt(1 - table[t])) if t >= 0 else _Point(1.0, 0.0) for t in landings]
    made: Callable[[list[_Point], int, _Point], tuple[Coefficients, Coefficients]] = {
        "ddim": _ddim,
        "dpm++": _dpm,
        "unipc": _unipc,
    }[solver]
    return [
        Step(timestep, point.alpha, point.sigma, *made(points, i, target))
        for i, (timestep, point, target) in enumerate(zip(timesteps, points, targets, strict=True))
    ]


# The tensors a step is linear in, as vectors of their coefficients.
_Z, _NOISE, _CORRECTED, _CLEAN_1, _CLEAN_2 = np.eye(5)
_NOTHING: Coefficients = (0.0, 0.0, 0.0, 0.0, 0.0)


def _clean(point: _Point) -> Vector:
    """x, the clean latents predicted at this step."""
    return (_Z - point.sigma * _NOISE) / point.alpha


def _coefficients(vector: Vector) -> Coefficients:
    return tuple(map(float, vector))  # type: ignore[return-value]


def _ddim(points: list[_Point], i: int, target: _Point) -> tuple[Coefficients, Coefficients]:
    """Song et al. 2021, eq. 12 with σ = 0."""
    return _coefficients(target.alpha * _clean(points[i]) + target.sigma * _NOISE), _NOTHING


def _dpm(points: list[_Point], i: int, target: _Point) -> tuple[Coefficients, Coefficients]:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2; its first step and its last, which lands on σ = 0, are of first
    order."""
    here, clean = points[i], _clean(points[i])
    if i > 0 and target.sigma > 0:
        ratio = (here.log_snr - points[i - 1].log_snr) / (target.log_snr - here.log_snr)
        clean = clean + (clean - _CLEAN_1) / (2 * ratio)
    return _coefficients(
        target.sigma / here.sigma * _Z - target.alpha * math.expm1(here.log_snr - target.log_snr) * clean
    ), _NOTHING


def _unipc(points: list[_Point], i: int, target: _Point) -> tuple[Coefficients, Coefficients]:
    """UniPC of order 2 with B(h) = e^h − 1 on predicted clean latents (Zhao et al. 2023, algorithms 7 and 8): correct,
    then predict."""
    here, clean = points[i], _clean(points[i])
    corrected = _Z if i == 0 else _corrected(points, i)
    h = target.log_snr - here.log_snr
    landed = target.sigma / here.sigma * corrected - target.alpha * math.expm1(-h) * clean
    if 0 < i < len(points) - 1:
        ratio = (points[i - 1].log_snr - here.log_snr) / h
        landed = landed - target.alpha * math.expm1(-h) * 0.5 * (_CLEAN_1 - clean) / ratio
    return _coefficients(landed), _coefficients(corrected)


def _corrected(points: list[_Point], i: int) -> Vector:
    """z̄ at step i: the step that led here, done again with what the model says here, of the order it was done in."""
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
