"""Every solver against diffusers' scheduler of the same name, and on a model whose answer is known."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from schedules import SCHEDULES, ddim_scheduler

from trip_reference.presets import DEMO
from trip_rt import InputError
from trip_rt.sampling.solvers import SOLVERS, solver_steps
from trip_rt.sampling.step import History, advance


def diffusers_scheduler(config, solver):
    if solver == "ddim":
        return ddim_scheduler(config)
    order = dict(solver_order=2, final_sigmas_type="zero")
    if solver == "dpm++":
        return DPMSolverMultistepScheduler(**dataclasses.asdict(config), **order, algorithm_type="dpmsolver++")
    return UniPCMultistepScheduler(**dataclasses.asdict(config), **order, solver_type="bh2")


def solved(steps, model, latents):
    """Runs the steps on `model(latents, timestep)`, the predicted noise."""
    history = History()
    for step in steps:
        latents, history = advance(step, latents, model(latents, step.timestep), history)
    return latents


def bent(latents, timestep):
    return 0.9 * np.tanh(1.3 * np.asarray(latents) + timestep / 500)


@pytest.mark.parametrize(
    "config", [c for c in SCHEDULES if c.timestep_spacing == "trailing"], ids=lambda c: c.beta_schedule
)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 20, 50])
def test_a_run_is_diffusers(config, solver, count):
    scheduler = diffusers_scheduler(config, solver)
    scheduler.set_timesteps(count)
    start = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    theirs = torch.from_numpy(start)
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(torch.from_numpy(bent(theirs, int(timestep))), timestep, theirs).prev_sample
    ours = solved(solver_steps(config, count, solver), bent, start)
    # diffusers' tables are fp32, and near t = 1000 of a linear schedule an error of theirs is multiplied by 158
    bound = 2e-6 if config.beta_schedule == "scaled_linear" else 2e-3
    np.testing.assert_allclose(ours, theirs, atol=bound * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda c: f"{c.beta_schedule}-{c.timestep_spacing}-{c.steps_offset}")
@pytest.mark.parametrize("count", [1, 10, 1000])
def test_ddim_steps_are_diffusers_one_by_one(config, count):
    scheduler = diffusers_scheduler(config, "ddim")
    scheduler.set_timesteps(count)
    rng = np.random.default_rng(0)
    for step in solver_steps(config, count)[:: max(1, count // 10)]:
        latents, noise = rng.standard_normal((2, 3, 4), np.float32)
        theirs = scheduler.step(torch.from_numpy(noise), step.timestep, torch.from_numpy(latents)).prev_sample
        a, b, *history = step.latents
        assert not any(history) and not any(step.corrected)
        np.testing.assert_allclose(a * latents + b * noise, theirs, rtol=1e-3, atol=2e-4 * a)


@pytest.mark.parametrize(("config", "solver"), itertools.product((SCHEDULES[0], SCHEDULES[-1]), SOLVERS))
@pytest.mark.parametrize("count", [1, 2, 8, 50])  # of 1000, as diffusers' DDIM lands a fixed stride lower
def test_the_true_noise_leads_back_to_the_clean_latents(config, solver, count):
    clean, noise = np.random.default_rng(0).standard_normal((2, 40))
    steps = solver_steps(config, count, solver)
    points = {step.timestep: (step.sqrt_alpha_bar, step.sqrt_one_minus_alpha_bar) for step in steps}

    def true_noise(latents, timestep):
        return (latents - points[timestep][0] * clean) / points[timestep][1]

    signal, sigma = points[steps[0].timestep]
    np.testing.assert_allclose(solved(steps, true_noise, signal * clean + sigma * noise), clean, atol=1e-9)


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
def test_solvers_of_second_order_come_nearer_with_fewer_steps(solver):
    start = np.random.default_rng(0).standard_normal(200)
    answer = solved(solver_steps(DEMO.trip.schedule, 1000, "unipc"), bent, start)

    def error(name, count):
        return np.abs(solved(solver_steps(DEMO.trip.schedule, count, name), bent, start) - answer).mean()

    assert error(solver, 20) < error("ddim", 50) / 2


def test_an_unknown_solver_and_counts_out_of_bounds_are_refused():
    with pytest.raises(InputError, match="found 'euler', expected one of ddim, dpm\\+\\+, unipc"):
        solver_steps(DEMO.trip.schedule, 10, "euler")
    with pytest.raises(InputError, match="found 0, expected 1 to 1000"):
        solver_steps(DEMO.trip.schedule, 0, "unipc")
