"""The Fréchet distance between Gaussians fitted to features, which FID and FVD are, and its bias."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MOST_SUBSETS = 8


class Moments:
    """Mean and covariance of features that come in batches, in fp64."""

    def __init__(self, width: int):
        self.count = 0
        self.mean: Array = np.zeros(width)
        self._scatter: Array = np.zeros((width, width))

    def update(self, features: NDArray[np.floating]) -> Moments:
        """Add features [N, D], by Chan et al.'s pairwise update, which keeps its precision where means are large."""
        batch = np.asarray(features, np.float64)
        if batch.ndim != 2 or batch.shape[1] != len(self.mean):
            raise ValueError(f"features: found shape {list(batch.shape)}, expected [N, {len(self.mean)}]")
        if not np.isfinite(batch).all():
            raise ValueError(
                "features: found values that are not finite, expected numbers; is the network in a half precision?"
            )
        if len(batch):
            centre = batch.mean(0)
            shift, total = centre - self.mean, self.count + len(batch)
            self._scatter += (batch - centre).T @ (batch - centre) + np.outer(shift, shift) * (
                self.count * len(batch) / total
            )
            self.mean = self.mean + shift * (len(batch) / total)
            self.count = total
        return self

    @property
    def covariance(self) -> Array:
        """Unbiased, [D, D]; of fewer than two features it is zero."""
        return self._scatter / max(self.count - 1, 1)


def frechet_distance(mean_1: Array, covariance_1: Array, mean_2: Array, covariance_2: Array) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) (Dowson and Landau 1982).

    (Σ₁Σ₂)^½ has the eigenvalues of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric: nothing complex appears where covariances are
    singular.
    """
    root = _square_root(covariance_1)
    overlap = np.sqrt(np.clip(np.linalg.eigvalsh(root @ covariance_2 @ root), 0, None)).sum()
    of_means = np.square(mean_1 - mean_2).sum()
    return max(0.0, float(of_means + np.trace(covariance_1) + np.trace(covariance_2) - 2 * overlap))


def distance_of(features_1: NDArray[np.floating], features_2: NDArray[np.floating]) -> float:
    """The Fréchet distance between two sets of features [N, D] and [M, D]."""
    first, second = (Moments(features.shape[1]).update(features) for features in (features_1, features_2))
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def extrapolated(features_1: NDArray[np.floating], features_2: NDArray[np.floating], seed: int = 0) -> float | None:
    """The distance for endless data: measured on subsets of several sizes and continued linearly in 1/N to 0 (Chong and
    Forsyth 2020).

    The plain estimate is biased upwards by about c/N; the result may be negative. None where the smallest subset would
    have fewer than 8 features or no more than their width: covariances are singular there, the bias is no line, and its
    continuation was seen to give 124 in place of 4.
    """
    count = min(len(features_1), len(features_2))
    if count // 2 < 8 or count // 2 <= features_1.shape[1]:
        return None
    rng = np.random.default_rng(seed)
    sizes = np.unique(np.linspace(count // 2, count, MOST_SUBSETS).astype(int))
    distances = []
    for size in sizes:
        subsets = [features[rng.permutation(len(features))[:size]] for features in (features_1, features_2)]
        distances.append(distance_of(*subsets))
    return float(np.polynomial.Polynomial.fit(1 / sizes, distances, 1)(0.0))


def _square_root(matrix: Array) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)
