"""Tests of differences that need no bootstrap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, rankdata

PERMUTATIONS = 10_000
_CHUNK = 1_000


@dataclass(frozen=True)
class DeLong:
    """Two correlated AUROCs and the test of their difference.

    Attributes
    ----------
    first, second : float
        The AUROCs.
    standard_error : float
        Of their difference.
    p : float
        Two-sided; NaN where the difference does not vary.
    """

    first: float
    second: float
    standard_error: float
    p: float


def delong(labels: ArrayLike, first: ArrayLike, second: ArrayLike) -> DeLong:
    """Compare two scores' AUROCs on the same images (DeLong, DeLong and Clarke-Pearson, 1988).

    Parameters
    ----------
    labels : array (N,)
        0 benign, 1 malignant; both are needed.
    first, second : array (N,)
        Scores; larger is malignant.

    Notes
    -----
    By midranks (Sun and Xu, IEEE Signal Processing Letters, 2014). Images count as independent:
    several images of a patient make the test too sure.
    """
    positive = np.asarray(labels) == 1
    m, n = int(positive.sum()), int((~positive).sum())
    areas, of_positive, of_negative = [], [], []
    for scores in (np.asarray(first, np.float64), np.asarray(second, np.float64)):
        together = rankdata(scores)
        above = (together[positive] - rankdata(scores[positive])) / n
        below = 1 - (together[~positive] - rankdata(scores[~positive])) / m
        areas.append(float(above.mean()))
        of_positive.append(above)
        of_negative.append(below)
    difference = np.array([1.0, -1.0])
    covariance = np.cov(of_positive) / m + np.cov(of_negative) / n
    error = math.sqrt(max(float(difference @ covariance @ difference), 0.0))
    gap = areas[0] - areas[1]
    p = 2 * float(norm.sf(abs(gap) / error)) if error > 0 else math.nan
    return DeLong(first=areas[0], second=areas[1], standard_error=error, p=p)


def sign_permutation(differences: ArrayLike, seed: int = 0) -> float:
    """Test whether paired differences are centred on 0, by flipping their signs.

    Parameters
    ----------
    differences : array (M,)
        One a patient: the sum over its images, whose signs must flip together.
    seed : int
        Of the 10,000 random flips.

    Returns
    -------
    float
        Two-sided p of the mean, the observed one counted as one of the flips.
    """
    values = np.asarray(differences, np.float64)
    generator = np.random.default_rng(seed)
    observed = abs(values.sum())
    extreme = 0
    for _ in range(PERMUTATIONS // _CHUNK):
        signs = generator.integers(0, 2, (_CHUNK, len(values))) * 2 - 1
        # Sums that are equal on paper differ in the last bit.
        extreme += int((np.abs(signs @ values) >= observed - 1e-9).sum())
    return (extreme + 1) / (PERMUTATIONS + 1)
