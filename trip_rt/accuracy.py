"""How far one array is from another: the two figures that every comparison here reports."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

NOT_A_NUMBER = 1e9  # JSON has no infinity


def psnr(found: NDArray[Any], expected: NDArray[Any], peak: float, most: float = 200.0) -> float:
    """Peak signal-to-noise ratio 10·log10(peak² / mean((found − expected)²)) in dB, computed in fp64.

    Equal arrays give `most`, which is the upper bound of the result; an error that is not finite gives −`most`.
    """
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    if not np.isfinite(error):
        return -most
    return most if error == 0 else float(min(most, 10 * np.log10(peak**2 / error)))


def relative_errors(found: NDArray[Any], expected: NDArray[Any]) -> tuple[float, float]:
    """max|found − expected| and RMS(found − expected), both over RMS(expected) = sqrt(mean(expected²)), computed in
    fp64.

    Both are NOT_A_NUMBER where `found` holds NaN or infinity.
    """
    if not np.isfinite(found).all():
        return NOT_A_NUMBER, NOT_A_NUMBER
    exact = expected.astype(np.float64)
    error, scale = np.abs(found - exact), max(_rms(exact), 1e-30)
    return float(error.max()) / scale, _rms(error) / scale


def _rms(array: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(array**2)))
