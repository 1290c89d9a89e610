"""The coordinator's half of federated spherical k-means, from pooled sums alone.

Spherical k-means: Dhillon and Modha, Machine Learning 42 (2001): assign by largest cosine, then
centroid = normalised sum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sonofed_common.contract.errors import ParameterError, SiteEmptyError

Sums = NDArray[np.float64]


def initial_centroids(total: Sums, second: Sums, count: int, clusters: int) -> Sums:
    """Place centroids deterministically: the pooled mean plus and minus each principal deviation.

    Parameters
    ----------
    total : ndarray of float64 (d,)
        Sum of all sites' unit vectors.
    second : ndarray of float64 (d, d)
        Sum of their outer products.
    count : int
        Number of vectors.
    clusters : int
        k, at most 2 d.

    Returns
    -------
    ndarray of float64 (k, d)
        Unit vectors.

    Raises
    ------
    SiteEmptyError
        No site has an image.
    ParameterError
        More clusters than twice the dimension.
    """
    if count == 0:
        raise SiteEmptyError("no site has an image to cluster; add images at one of them")
    if clusters > 2 * len(total):
        raise ParameterError(
            f"{len(total)} dimensions cannot start {clusters} clusters; ask for fewer"
        )
    mean = total / count
    # Rounding hides the order of summation, which would turn equal principal directions otherwise.
    covariance = np.round(second / count - np.outer(mean, mean), 10)
    variances, directions = np.linalg.eigh(covariance)
    pairs = (clusters + 1) // 2
    axes = directions[:, ::-1][:, :pairs].T
    deviations = np.sqrt(np.maximum(variances[::-1][:pairs], 0.0))
    leading = np.argmax(np.round(np.abs(axes), 8), axis=1)
    axes = axes * np.sign(axes[np.arange(pairs), leading])[:, None]
    signed = np.stack([axes, -axes], axis=1).reshape(2 * pairs, -1)[:clusters]
    points = mean + np.repeat(deviations, 2)[:clusters, None] * signed
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    centroids: Sums = np.where(norms > 1e-9, points / np.maximum(norms, 1e-9), signed)
    return centroids


def update_centroids(sums: Sums, counts: NDArray[np.int64], old: Sums) -> Sums:
    """Normalise the pooled sums; an empty cluster, or one whose sum vanishes, keeps its centroid.

    Parameters
    ----------
    sums : ndarray of float64 (k, d)
        Per-cluster sums over all sites.
    counts : ndarray of int64 (k,)
        Per-cluster counts over all sites.
    old : ndarray of float64 (k, d)
        Centroids that the sums were made with.

    Returns
    -------
    ndarray of float64 (k, d)
        Unit vectors.
    """
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    usable = (counts[:, None] > 0) & (norms > 1e-9)
    centroids: Sums = np.where(usable, sums / np.maximum(norms, 1e-9), old)
    return centroids


def largest_move(old: Sums, new: Sums) -> float:
    """Return the largest angle (radians) between old and new centroids, unit vectors (k, d)."""
    apart = np.linalg.norm(new - old, axis=1)
    along = np.linalg.norm(new + old, axis=1)
    return float(np.max(2 * np.arctan2(apart, along)))
