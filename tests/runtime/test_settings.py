"""What a run does at each step: speeds, guidance, reuse; and the settings that a person may get wrong."""

import dataclasses
from typing import get_type_hints

import numpy as np
import pytest

from trip_reference.presets import DEMO
from trip_rt import InputError
from trip_rt.sampling.step_table import COLUMNS, step_table
from trip_rt.settings import SPEEDS, Settings, SettingsKeywords, Speed

CONFIG = dataclasses.replace(DEMO.trip, guidance_scale=3.0)


def steps_of(**settings):
    return Settings(**settings).steps(CONFIG)


@pytest.mark.parametrize("speed", [Speed(), Speed("unipc", 7), Speed("dpm++", 12, (0.2, 0.7))], ids=str)
def test_the_step_table_holds_every_step_and_where_it_lands(speed):
    steps = steps_of(speed=speed)
    table = step_table(steps)
    assert table.shape == (len(steps) + 1, len(COLUMNS)) and table.dtype == np.float32
    columns = dict(zip(COLUMNS, table.T, strict=True))
    for name in ("timestep", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"):
        values = np.array([getattr(step, name) for step in steps], np.float32)
        assert (columns[name][1:] == values).all() and columns[name][0] == values[0]
        assert (columns[f"next_{name}"][:-1] == values).all()
    assert table[-1, -3:].tolist() == [0, 1, 0]  # frame 1 ends as the given latent
    assert table[0, 3:14].tolist() == [1] + [1, 0, 0, 0, 0] + [0] * 5  # the beginning changes nothing
    assert (table[1:, 4:9] == np.float32([step.latents for step in steps])).all()
    assert (table[1:, 9:14] == np.float32([step.corrected for step in steps])).all()
    assert (columns["guidance_scale"][1:] == [step.guidance_scale for step in steps]).all()


def test_exact_is_the_models_own_way():
    steps = steps_of()
    assert len(steps) == CONFIG.num_inference_steps and steps == steps_of(speed=SPEEDS["exact"])
    assert all(
        step.guided and not step.shallow and step.guidance_scale == 3 and not any(step.latents[2:]) for step in steps
    )


def test_a_setting_replaces_the_speeds_own():
    assert Settings().resolved_speed == SPEEDS["exact"]
    assert Settings(speed="fast").resolved_speed == SPEEDS["fast"]
    replaced = Settings(speed="fast", num_inference_steps=12, feature_reuse=2)
    assert replaced.resolved_speed == Speed("unipc", 12, feature_reuse=2, arithmetic="auto")
    assert len(replaced.steps(CONFIG)) == 12


def test_guidance_is_given_within_its_interval_alone():
    steps = steps_of(num_inference_steps=20, guidance_interval=(0.25, 0.75))
    assert [step.guided for step in steps] == [250 <= step.timestep <= 750 for step in steps]
    assert {step.guidance_scale for step in steps} == {1, 3}
    assert not any(step.guided for step in steps_of(guidance_scale=1.0))


def test_features_are_reused_between_whole_runs_and_never_across_the_beginning_of_guidance():
    steps = steps_of(num_inference_steps=7, feature_reuse=3)
    assert [step.shallow for step in steps] == [False, True, True, False, True, True, False]
    steps = steps_of(num_inference_steps=10, feature_reuse=10, guidance_interval=(0.3, 0.7))
    kinds = [(step.guided, step.shallow) for step in steps]
    unguided, guided = [(False, False)] + [(False, True)] * 2, [(True, False)] + [(True, True)] * 3
    assert kinds == unguided + guided + [(False, True)] * 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"guidance_interval": (0.5, 0.2)}, "found 0.5 to 0.2, expected two numbers from 0 to 1"),
        ({"guidance_interval": (-1, 1)}, "guidance interval: found -1"),
        ({"speed": Speed(guidance_interval=(0, 2))}, "guidance interval: found 0 to 2"),
        ({"feature_reuse": 0}, "feature reuse: found 0"),
        ({"num_inference_steps": 0}, "steps: found 0"),
        ({"guidance_scale": float("inf")}, "guidance scale: found inf"),
        ({"solver": "euler"}, "solver: found 'euler', expected ddim, dpm.. or unipc"),
        ({"speed": "ludicrous"}, "speed: found 'ludicrous', expected exact, balanced or fast"),
        ({"fit": "stretch"}, "fit: found 'stretch', expected crop or letterbox"),
        ({"negative_prompt": "\ud800"}, "undecodable"),
    ],
)
def test_what_is_out_of_bounds_is_refused(settings, says):
    with pytest.raises(InputError, match=says):
        steps_of(**settings)


def test_the_keywords_are_the_fields():
    """Editors complete the keywords of the one, at run time the other counts."""
    fields = {field.name: get_type_hints(Settings)[field.name] for field in dataclasses.fields(Settings)}
    assert get_type_hints(SettingsKeywords) == fields


@pytest.mark.parametrize(
    ("keyword", "says"),
    [
        ("generator", "write seed=7"),
        ("height", "--size WxH --add"),
        ("callback_on_step_end", "on_step"),
        ("sharpness", "expected some of speed, num_inference_steps"),
    ],
)
def test_an_unknown_keyword_gets_a_line_that_says_what_to_write(keyword, says):
    with pytest.raises(InputError, match=f"^{keyword}: found no such setting, .*{says}"):
        Settings().changed({keyword: 1})
