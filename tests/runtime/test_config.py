import json

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
        ({"surprise": 1}, "has unknown 'surprise'"),
        ({"tnf": 3}, "expected an object for TNFConfig"),
        ({"schedule": {}}, "ScheduleConfig lacks"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    data = to_json(PRESETS["demo"].trip) | change
    with pytest.raises(InputError, match=message):
        from_json(TripConfig, data, "trip_config.json")


def test_whole_numbers_serve_as_floats():
    data = to_json(PRESETS["demo"].trip) | {"guidance_scale": 3}
    assert from_json(TripConfig, data, "x").guidance_scale == 3.0
