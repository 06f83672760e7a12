"""What a run does at each step: guidance, reuse, and the table that the loop is driven by."""

import dataclasses

import numpy as np
import pytest

from trip_reference.presets import DEMO
from trip_rt import InputError
from trip_rt.speed import SPEEDS, STEP_COLUMNS, Speed, loop_steps, speed_named, step_table

CONFIG = dataclasses.replace(DEMO.trip, guidance_scale=3.0)


@pytest.mark.parametrize("speed", [Speed(), Speed("unipc", 7), Speed("dpm++", 12, (0.2, 0.7))], ids=str)
def test_the_step_table_holds_every_step_and_where_it_lands(speed):
    steps = loop_steps(CONFIG, speed)
    table = step_table(steps)
    assert table.shape == (len(steps) + 1, len(STEP_COLUMNS)) and table.dtype == np.float32
    columns = dict(zip(STEP_COLUMNS, table.T, strict=True))
    for name in ("timestep", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"):
        values = np.array([getattr(one.step, name) for one in steps], np.float32)
        assert (columns[name][1:] == values).all() and columns[name][0] == values[0]
        assert (columns[f"next_{name}"][:-1] == values).all()
    assert table[-1, -3:].tolist() == [0, 1, 0]  # frame 1 ends as the given latent
    assert table[0, 3:14].tolist() == [1] + [1, 0, 0, 0, 0] + [0] * 5  # the beginning changes nothing
    assert (table[1:, 4:9] == np.float32([one.step.latents for one in steps])).all()
    assert (table[1:, 9:14] == np.float32([one.step.corrected for one in steps])).all()
    assert (columns["guidance_scale"][1:] == [one.guidance_scale for one in steps]).all()


def test_exact_is_the_models_own_way():
    steps = loop_steps(CONFIG)
    assert len(steps) == CONFIG.num_inference_steps and steps == loop_steps(CONFIG, SPEEDS["exact"])
    assert all(
        one.guided and not one.shallow and one.guidance_scale == 3 and not any(one.step.latents[2:]) for one in steps
    )


def test_guidance_is_given_within_its_interval_alone():
    steps = loop_steps(CONFIG, Speed(num_inference_steps=20, guidance_interval=(0.25, 0.75)))
    assert [one.guided for one in steps] == [250 <= one.step.timestep <= 750 for one in steps]
    assert {one.guidance_scale for one in steps} == {1, 3}
    assert not any(one.guided for one in loop_steps(CONFIG, guidance_scale=1.0))


def test_features_are_reused_between_whole_runs_and_never_across_the_beginning_of_guidance():
    assert [one.shallow for one in loop_steps(CONFIG, Speed(num_inference_steps=7, feature_reuse=3))] == [
        False,
        True,
        True,
    ] * 2 + [False]
    steps = loop_steps(CONFIG, Speed(num_inference_steps=10, feature_reuse=10, guidance_interval=(0.3, 0.7)))
    assert [(one.guided, one.shallow) for one in steps] == [(False, False)] + [(False, True)] * 2 + [(True, False)] + [
        (True, True)
    ] * 3 + [(False, True)] * 3


@pytest.mark.parametrize(
    ("speed", "guidance_scale", "says"),
    [
        (Speed(guidance_interval=(0.5, 0.2)), None, "found 0.5 to 0.2, expected two numbers from 0 to 1"),
        (Speed(guidance_interval=(-1, 1)), None, "guidance interval: found -1"),
        (Speed(feature_reuse=0), None, "feature reuse: found 0"),
        (Speed(num_inference_steps=0), None, "steps: found 0"),
        (Speed(), float("inf"), "guidance scale: found inf"),
    ],
)
def test_what_is_out_of_bounds_is_refused(speed, guidance_scale, says):
    with pytest.raises(InputError, match=says):
        loop_steps(CONFIG, speed, guidance_scale)


def test_an_unknown_speed_is_refused():
    assert speed_named("fast") is SPEEDS["fast"]
    with pytest.raises(InputError, match="found 'ludicrous', expected exact, balanced, fast"):
        speed_named("ludicrous")
