"""The two figures of accuracy against errors that are known."""

import numpy as np
import pytest

from trip_rt.accuracy import NOT_A_NUMBER, psnr, relative_errors


def test_psnr_against_a_known_error():
    expected = np.zeros((10, 10))
    assert psnr(expected + 0.1, expected, peak=1.0) == pytest.approx(20)
    assert psnr(expected, expected, peak=1.0) == 200 and psnr(expected, expected, peak=1.0, most=100) == 100
    assert psnr(expected + 1e-6, expected, peak=1.0, most=100) == 100
    assert psnr(expected * np.nan, expected, peak=1.0) == -200


def test_relative_errors_against_known_ones():
    expected = np.array([3.0, 4.0, 0.0, 0.0])  # RMS 2.5
    assert relative_errors(expected + np.eye(4)[3], expected) == pytest.approx((0.4, 0.2))
    for wrong in (np.nan, np.inf):
        assert relative_errors(expected + wrong, expected) == (NOT_A_NUMBER, NOT_A_NUMBER)
