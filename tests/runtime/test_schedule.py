import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedules import SCHEDULES, ddim_scheduler

from trip_reference.presets import DEMO, TRIP_256
from trip_rt import InputError
from trip_rt.sampling.schedule import alpha_bars, inference_timesteps


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda c: f"{c.beta_schedule}-{c.timestep_spacing}-{c.steps_offset}")
@pytest.mark.parametrize("count", [1, 2, 10, 25, 50, 1000])
def test_timesteps_and_tables_are_diffusers(config, count):
    scheduler = ddim_scheduler(config)
    np.testing.assert_allclose(alpha_bars(config), scheduler.alphas_cumprod, rtol=2e-4)
    scheduler.set_timesteps(count)
    expected = np.minimum(scheduler.timesteps.numpy(), config.num_train_timesteps - 1)
    assert inference_timesteps(config, count).tolist() == expected.tolist()


def test_the_linear_schedule_starts_and_ends_where_the_paper_says():
    config = TRIP_256.trip.schedule
    table = alpha_bars(config)
    assert table.dtype == np.float64
    assert 1 - table[0] == pytest.approx(1e-4)
    assert np.sqrt(table[-1]) == pytest.approx(0.0064, abs=2e-4)


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_a_step_count_out_of_bounds_is_refused(count):
    with pytest.raises(InputError, match=f"found {count}, expected 1 to 1000"):
        inference_timesteps(DEMO.trip.schedule, count)


@given(st.integers(1, 1000), st.sampled_from(SCHEDULES))
def test_timesteps_fall_and_stay_in_range(count, config):
    timesteps = inference_timesteps(config, count)
    assert len(timesteps) == count
    assert (np.diff(timesteps) <= 0).all()
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
