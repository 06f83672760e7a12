"""The harness itself: what it must not let pass."""

import tempfile
import time

import fuzzing
import numpy as np
import pytest
from fuzzing import Fuzz
from hypothesis import strategies as st

from trip_rt import InputError


def _lines(folder):
    raise InputError("one\ntwo")


def _traceback(folder):
    raise KeyError("x")


def _leftover(folder):
    tempfile.mkstemp(prefix=".trip-", dir=folder)
    raise InputError("refused")


def _slow(folder):
    time.sleep(5)


def _large(folder):
    np.ones(100 * 2**20, np.uint8)
    raise InputError("refused")


@pytest.mark.parametrize("one", [_lines, _traceback, _leftover, _slow, _large])
def test_an_input_that_does_harm_fails_the_test(one, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 0.2)
    monkeypatch.setattr(fuzzing, "MEGABYTES", 50)
    with pytest.raises((AssertionError, KeyError, fuzzing.TooLong)):
        Fuzz("harness", 1)(st.just(tmp_path), one, folder=tmp_path)


def test_inputs_are_counted():
    fuzz = Fuzz("harness", 100)

    def odd(value):
        if value % 2 == 0:
            raise InputError("found an even number")

    fuzz(st.integers(0, 10**6), odd)
    assert fuzz.counts["inputs"] == 100 == fuzz.counts["accepted"] + fuzz.counts["refused"]
    assert 0 < fuzz.counts["accepted"] < 100
