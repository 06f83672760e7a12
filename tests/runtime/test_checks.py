"""Single values of any type: taken as what they mean, or refused in one line."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from trip_rt.checks import one_of, real_number, text, whole_number
from trip_rt.errors import InputError


@pytest.mark.parametrize("value", [7, np.int8(7), np.uint64(7)])
def test_whole_numbers(value):
    assert whole_number("n", value, 0, 7) == 7 and type(whole_number("n", value, 0, 7)) is int


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), Fraction(4, 2)])
def test_numbers(value):
    assert real_number("x", value, 0, 2) == 2 and type(real_number("x", value, 0, 2)) is float


def test_what_is_refused_is_refused_in_one_short_line():
    values = [None, True, "5", b"5", [5], {}, 1j, object(), float("nan"), float("inf"), np.array([1, 2]), 8, -1]
    values += [1 << 20000, -(1 << 20000), 10**40, np.float64("nan"), "x\ny" * 1000, "\ud800"]
    for value in values:
        for check in (whole_number, real_number):
            with pytest.raises(InputError, match=r"^n: found .*, expected a (whole )?number from 0 to 7$") as caught:
                check("n", value, 0, 7)
            assert str(caught.value).isprintable() and len(str(caught.value)) < 150
        with pytest.raises(InputError, match=r"^n: found .*, expected a or b$"):
            one_of("n", value, ("a", "b"))


def test_the_largest_seed_is_written_as_a_power():
    with pytest.raises(InputError, match=r"from 0 to 2\^64 − 1$"):
        whole_number("seed", 1 << 64, 0, (1 << 64) - 1)


def test_text():
    assert text("t", "Straße") == "Straße"
    for value in (None, 5, b"a", "\ud800", "a\udcff"):
        with pytest.raises(InputError, match=r"^t: found "):
            text("t", value)
