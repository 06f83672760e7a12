import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from trip_reference.presets import DEMO, TRIP_256
from trip_rt import InputError
from trip_rt.schedule import STEP_COLUMNS, alpha_bars, ddim_steps, inference_timesteps, step_table


def diffusers_scheduler(config):
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        timestep_spacing=config.timestep_spacing,
        steps_offset=config.steps_offset,
        set_alpha_to_one=True,
        clip_sample=False,
    )


SCHEDULES = [
    dataclasses.replace(base, timestep_spacing=spacing, steps_offset=offset)
    for base in (DEMO.trip.schedule, TRIP_256.trip.schedule)
    for spacing, offset in (("leading", 0), ("leading", 1), ("trailing", 0))
]


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda c: f"{c.beta_schedule}-{c.timestep_spacing}-{c.steps_offset}")
@pytest.mark.parametrize("count", [1, 2, 10, 25, 50, 1000])
def test_timesteps_tables_and_steps_are_diffusers(config, count):
    scheduler = diffusers_scheduler(config)
    np.testing.assert_allclose(alpha_bars(config), scheduler.alphas_cumprod, rtol=2e-4)
    scheduler.set_timesteps(count)
    steps = ddim_steps(config, count)
    expected = np.minimum(scheduler.timesteps.numpy(), config.num_train_timesteps - 1)
    assert [step.timestep for step in steps] == expected.tolist()

    # diffusers' tables are fp32, and its first error grows as the steps are chained: each step is compared on its own.
    rng = np.random.default_rng(0)
    for step in steps[:: max(1, count // 10)]:
        latents, noise = rng.standard_normal((2, 3, 4), np.float32)
        theirs = scheduler.step(torch.from_numpy(noise), step.timestep, torch.from_numpy(latents)).prev_sample
        np.testing.assert_allclose(step.a * latents + step.b * noise, theirs, rtol=1e-3, atol=2e-4 * step.a)


@pytest.mark.parametrize("config", SCHEDULES[:1] + SCHEDULES[-1:])
def test_the_true_noise_leads_back_to_the_clean_latents(config):
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 1, 4, 3, 2, 2), np.float32)

    def true_noise(latents, step):
        return (latents - step.sqrt_alpha_bar * clean) / step.sqrt_one_minus_alpha_bar

    steps = ddim_steps(config, 50)
    start = steps[0].sqrt_alpha_bar * clean + steps[0].sqrt_one_minus_alpha_bar * noise
    latents = start
    for step in steps:
        latents = (step.a * latents + step.b * true_noise(latents, step)).astype(np.float32)
    np.testing.assert_allclose(latents[:, :, 1:], clean[:, :, 1:], atol=2e-4)


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_the_step_table_holds_every_step_and_where_it_lands(config, count):
    steps, table = ddim_steps(config, count), step_table(ddim_steps(config, count), 2.5)
    assert table.shape == (count + 1, len(STEP_COLUMNS)) and table.dtype == np.float32
    columns = dict(zip(STEP_COLUMNS, table.T, strict=True))
    for name in ("timestep", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"):
        values = np.array([getattr(step, name) for step in steps], np.float32)
        assert (columns[name][1:] == values).all() and columns[name][0] == values[0]
        assert (columns[f"next_{name}"][:-1] == values).all()
    assert table[-1, -3:].tolist() == [0, 1, 0]  # frame 1 ends as the given latent
    for name, beginning in (("a", 1), ("b", 0)):
        assert columns[name].tolist() == [beginning, *np.float32([getattr(step, name) for step in steps]).tolist()]
    assert (columns["guidance_scale"] == 2.5).all()


def test_the_linear_schedule_starts_and_ends_where_the_paper_says():
    config = TRIP_256.trip.schedule
    table = alpha_bars(config)
    assert table.dtype == np.float64
    assert 1 - table[0] == pytest.approx(1e-4)
    assert np.sqrt(table[-1]) == pytest.approx(0.0064, abs=2e-4)


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_a_step_count_out_of_bounds_is_refused(count):
    for function in (inference_timesteps, ddim_steps):
        with pytest.raises(InputError, match=f"found {count}, expected 1 to 1000"):
            function(DEMO.trip.schedule, count)


@given(st.integers(1, 1000), st.sampled_from(SCHEDULES))
def test_timesteps_fall_and_stay_in_range(count, config):
    timesteps = inference_timesteps(config, count)
    assert len(timesteps) == count
    assert (np.diff(timesteps) <= 0).all()
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
