import json
import math

import pytest

from trip_reference.presets import PRESETS
from trip_rt import InputError
from trip_rt.config import TripConfig, from_json, to_json


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = PRESETS[name].trip
    assert from_json(TripConfig, json.loads(json.dumps(to_json(config))), "x") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": "sum"}, "fusion: found 'sum', expected one of tnf, linear, none"),
        ({"num_frames": "16"}, "num_frames: found '16', expected int"),
        ({"num_frames": True}, "num_frames: found True, expected int"),
        ({"fusion": "\ud800"}, "found values that no file of ours holds"),
        ({"a\nb": 1}, "found the unknown field a.b"),
        ({"surprise": 1}, "found the unknown field surprise"),
        ({"tnf": 3}, "tnf: found 3, expected object"),
        ({"schedule": {}}, "schedule: Object missing required field `beta_schedule`"),
        ({"tnf": {"hidden_size": 8, "num_heads": 2, "num_layers": 1, "extra": 0}}, "unknown field tnf.extra"),
        ({"fps": -1}, "fps: found -1, expected int >= 1"),
        ({"num_frames": 2**40}, "num_frames: found 1099511627776, expected int <= 4096"),
        ({"scaling_factor": math.inf}, "scaling_factor: found inf, expected float <= 1000000.0"),
        (
            {"num_frames": 4096, "height": 8192, "width": 8192},
            "4096 frames of 8192x8192, 768.0 GiB",
        ),
        ({"width": 100}, "width: found 100, expected a multiple of vae_scale_factor, 16"),
        ({"num_inference_steps": 1001}, "num_inference_steps: found 1001, expected at most num_train_timesteps, 1000"),
        ({"tnf": {"hidden_size": 8, "num_heads": 3, "num_layers": 1}}, "tnf: num_heads: found 3, expected a divisor"),
        ({"tnf": {"hidden_size": 7, "num_heads": 1, "num_layers": 1}}, "tnf: hidden_size: found 7, expected an even"),
        ({"scaling_factor": -1.0}, "scaling_factor: found -1.0, expected float >= 1e-06"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    data = to_json(PRESETS["demo"].trip) | change
    with pytest.raises(InputError, match=message):
        from_json(TripConfig, data, "trip_config.json")


def test_whole_numbers_serve_as_floats():
    data = to_json(PRESETS["demo"].trip) | {"guidance_scale": 3}
    assert from_json(TripConfig, data, "x").guidance_scale == 3.0
