"""The models that a server is started with."""

from __future__ import annotations

import re

import pytest
from service_parts import model

from trip_rt.errors import InputError
from trip_rt.serving.models import read_models


def test_names_of_models(tiny_bundle, tmp_path):
    (tmp_path / "odd@name").symlink_to(tiny_bundle)
    (tmp_path / "other").symlink_to(tiny_bundle)
    found = read_models(
        [str(tiny_bundle), f"a={tiny_bundle}", f"b={tiny_bundle}@48x32-5f-b1", f"c={tmp_path / 'odd@name'}"], 3
    )
    assert list(found) == [tiny_bundle.resolve().name, "a", "b", "c"]
    for each in found.values():
        assert (each.size, each.workers, each.profile.name) == ("48x32", 3, "48x32-5f-b1")
        assert each.bundle == tiny_bundle.resolve() and each.seconds(8) == "0.625" and each.seconds(3) == "1.66667"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{bundle}", "{bundle}"], r"model: found two called .*, expected a name for each; write NAME="),
        (["a={bundle}", "a={bundle}"], r"model: found two called a, expected a name for each; write NAME="),
        (["{bundle}@1x1-1f-b1"], r"profile: found '1x1-1f-b1', the bundle has 48x32-5f-b1; "),
        (["a={bundle}/none"], r".*none: found no such folder, expected a bundle; "),
        (["a\tb={bundle}"], r"model: found the name 'a\\tb', expected up to 100 printable characters"),
        (["a" * 101 + "={bundle}"], r"model: found the name 'a{100}', expected up to 100 printable characters"),
    ],
)
def test_what_is_no_model(tiny_bundle, arguments, message):
    with pytest.raises(InputError) as error:
        read_models([argument.format(bundle=tiny_bundle) for argument in arguments], 1)
    assert re.match(message, str(error.value)) and str(error.value).isprintable()


def test_how_long_a_clip_takes():
    timing = model().timing
    timing.step_s, timing.other_s = 0.5, 1.0
    assert timing.expected_s(4) == 3.0
    for _ in range(100):
        timing.measured(4, 4.0, 0.5)
    assert timing.expected_s(4) == pytest.approx(4.5)
