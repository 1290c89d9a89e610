"""Metrics of a binary classifier, with patient-clustered bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sonofed_common.contract.errors import OneClassError

Floats = NDArray[np.float64]

CALIBRATION_BINS = 10
_CHUNK = 2_000_000


def classification_metrics(
    labels: ArrayLike, probabilities: ArrayLike, threshold_at_specificity_90: float | None
) -> dict[str, float]:
    """Compute the metrics of a binary classifier.

    Parameters
    ----------
    labels : array (N,)
        0 benign, 1 malignant.
    probabilities : array (N,)
        P(malignant) in [0, 1].
    threshold_at_specificity_90 : float or None
        Operating point found on source data, see `threshold_at_specificity`.

    Returns
    -------
    dict of str to float
        ``auroc`` (ties count one half), ``accuracy``, ``balanced_accuracy``, ``sensitivity`` and
        ``specificity`` at probability 0.5, ``sensitivity_at_specificity_90`` at the given
        threshold, ``ece`` (expected calibration error of P(malignant), 10 equal-width bins; Naeini
        et al., AAAI 2015) and ``brier``. What the data cannot tell is NaN: a metric of a class
        that is absent, anything without images, the operating point without a threshold.
    """
    y, p = _arrays(labels, probabilities)
    values = _weighted_metrics(y, p, np.ones((1, len(y))), threshold_at_specificity_90)
    return {name: float(value[0]) for name, value in values.items()}


def threshold_at_specificity(
    labels: ArrayLike, probabilities: ArrayLike, specificity: float = 0.9
) -> float:
    """Find the lowest threshold that keeps a specificity; ``p >= threshold`` means malignant.

    Parameters
    ----------
    labels : array (N,)
        0 benign, 1 malignant.
    probabilities : array (N,)
        P(malignant) in [0, 1].
    specificity : float
        Least share of benign images below the threshold, in (0, 1].

    Raises
    ------
    OneClassError
        There is no benign image.
    """
    y, p = _arrays(labels, probabilities)
    benign = np.sort(p[y == 0])
    if not len(benign):
        raise OneClassError("an operating point needs benign images; add labelled benign images")
    below = max(math.ceil(specificity * len(benign) - 1e-9), 1)
    return float(np.nextafter(benign[below - 1], np.inf))


def clustered_intervals(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: Sequence[str] | ArrayLike,
    replicates: int,
    seed: int,
    threshold: float | None,
) -> dict[str, tuple[float, float]]:
    """Compute 95% bootstrap percentile intervals, drawing whole patients.

    Parameters
    ----------
    labels : array (N,)
        0 benign, 1 malignant.
    probabilities : array (N,)
        P(malignant) in [0, 1].
    groups : sequence (N,)
        Patient of each image; images of a patient are drawn together.
    replicates : int
        Number of bootstrap samples.
    seed : int
        Seed of the draws.
    threshold : float or None
        As in `classification_metrics`.

    Returns
    -------
    dict of str to (float, float)
        Low and high end of each metric of `classification_metrics`. Replicates in which a metric
        is undefined are left out; where all are, both ends are NaN.
    """
    y, p = _arrays(labels, probabilities)
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    generator = np.random.default_rng(seed)
    step = max(_CHUNK // max(len(y), 1), 1)
    drawn: dict[str, list[Floats]] = {}
    for start in range(0, replicates if len(y) else 0, step):
        size = min(step, replicates - start)
        counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size)
        weights = counts.astype(np.float64)[:, members]
        for name, value in _weighted_metrics(y, p, weights, threshold).items():
            drawn.setdefault(name, []).append(value)
    if not drawn:
        drawn = {n: [v] for n, v in _weighted_metrics(y, p, np.zeros((1, len(y))), None).items()}
    return {name: _percentiles(np.concatenate(values)) for name, values in drawn.items()}


def weighted_auroc(labels: ArrayLike, probabilities: ArrayLike, weights: Floats) -> Floats:
    """Area under the ROC curve under each of several weightings, as a bootstrap needs it.

    Parameters
    ----------
    labels, probabilities : array (N,)
        As in `classification_metrics`.
    weights : ndarray of float64 (R, N)
        Weight of each image in each replicate.

    Returns
    -------
    ndarray of float64 (R,)
        NaN where a replicate holds one class only.
    """
    y, p = _arrays(labels, probabilities)
    return _auroc(y, p, weights, (weights @ y) * (weights @ (1 - y)))


def _arrays(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Floats, Floats]:
    return np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)


def _percentiles(values: Floats) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def _weighted_metrics(
    y: Floats, p: Floats, weights: Floats, threshold: float | None
) -> dict[str, Floats]:
    """Metrics of images (N,) under each row of weights (R, N): arrays (R,)."""
    positive, negative = weights @ y, weights @ (1 - y)
    total = positive + negative
    called = (p >= 0.5).astype(np.float64)
    sensitivity = _ratio(weights @ (called * y), positive)
    specificity = _ratio(weights @ ((1 - called) * (1 - y)), negative)
    at_threshold = np.full(len(weights), np.nan)
    if threshold is not None:
        at_threshold = _ratio(weights @ ((p >= threshold) * y), positive)
    bins = np.minimum((p * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    residuals = np.eye(CALIBRATION_BINS)[bins] * (p - y)[:, None]
    return {
        "auroc": _auroc(y, p, weights, positive * negative),
        "accuracy": _ratio(weights @ (called == y).astype(np.float64), total),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "sensitivity_at_specificity_90": at_threshold,
        "ece": _ratio(np.abs(weights @ residuals).sum(axis=1), total),
        "brier": _ratio(weights @ (p - y) ** 2, total),
    }


def _auroc(y: Floats, p: Floats, weights: Floats, pairs: Floats) -> Floats:
    # The weight of (malignant, benign) pairs in the right order, ties counting one half.
    if not len(y):
        return np.full(len(weights), np.nan)
    order = np.argsort(p, kind="stable")
    _, starts = np.unique(p[order], return_index=True)
    malignant = np.add.reduceat((weights * y)[:, order], starts, axis=1)
    benign = np.add.reduceat((weights * (1 - y))[:, order], starts, axis=1)
    below = np.cumsum(benign, axis=1) - benign / 2
    return _ratio((malignant * below).sum(axis=1), pairs)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    result = np.full(len(denominator), np.nan)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result
