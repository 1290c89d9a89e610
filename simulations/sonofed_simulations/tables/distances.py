"""Distances between two samples of numbers whose items are weighted, in many bootstrap samples."""

from __future__ import annotations

import numpy as np
from scipy.stats import gaussian_kde

from sonofed_simulations.statistics import Floats

GRID = 256


def wasserstein(one: Floats, weights_one: Floats, two: Floats, weights_two: Floats) -> Floats:
    """Wasserstein-1: the area between both distribution functions.

    Parameters
    ----------
    one, two : ndarray (N,), (M,)
        The samples.
    weights_one, weights_two : ndarray (R, N), (R, M)
        How often each item counts; no row is all zero.

    Returns
    -------
    ndarray of float64 (R,)
        At least 0, in the samples' unit.
    """
    values = np.concatenate([one, two])
    order = np.argsort(values, kind="stable")
    shares = np.hstack([_shares(weights_one), -_shares(weights_two)])[:, order]
    gap = np.abs(np.cumsum(shares, axis=1))[:, :-1]
    return np.asarray(gap @ np.diff(values[order]))


def overlap(one: Floats, weights_one: Floats, two: Floats, weights_two: Floats) -> Floats:
    """Area under the lower of both Gaussian kernel density estimates.

    Parameters
    ----------
    one, two, weights_one, weights_two
        As for `wasserstein`; each sample has at least two distinct values.

    Returns
    -------
    ndarray of float64 (R,)
        In [0, 1]: 1 for equal densities.

    Notes
    -----
    Bandwidths are Scott's (Multivariate Density Estimation, 1992) of the unweighted samples, the
    same in every bootstrap sample.
    """
    widths = [float(np.sqrt(gaussian_kde(x).covariance[0, 0])) for x in (one, two)]
    values = np.concatenate([one, two])
    margin = 4 * max(widths)
    grid = np.linspace(values.min() - margin, values.max() + margin, GRID)
    densities = [
        _shares(weights) @ _kernel(grid, sample, width)
        for sample, weights, width in zip(
            (one, two), (weights_one, weights_two), widths, strict=True
        )
    ]
    return np.asarray(np.trapezoid(np.minimum(*densities), grid, axis=1))


def _kernel(grid: Floats, sample: Floats, width: float) -> Floats:
    """Densities (N, G) of a normal distribution around each item."""
    z = (grid[None, :] - sample[:, None]) / width
    return np.asarray(np.exp(-0.5 * z**2) / (width * np.sqrt(2 * np.pi)))


def _shares(weights: Floats) -> Floats:
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))
