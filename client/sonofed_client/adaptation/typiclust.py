"""TypiClust: the most typical image of each cluster (Hacohen et al., ICML 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from sonofed_common.runtime import derive_seed

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.int64]

NEIGHBOURS = 5
"""Of a cluster, over which typicality is the inverse of the mean distance; the authors take 20."""


def typiclust(features: Floats, labelled: Indices, count: int, seed: int) -> Indices:
    """Choose the most typical image of each of the largest clusters that hold no label.

    Parameters
    ----------
    features : ndarray (N, F)
        One vector an image; of unit length as the paper has them.
    labelled : ndarray of int64 (L,)
        Images that are labelled. K-means makes ``L + count`` clusters of all.
    count : int
        How many to choose, from 1 to ``N - L``.
    seed : int
        In [0, 2**32), of k-means and of what breaks ties.

    Returns
    -------
    ndarray of int64 (count,)
        Distinct images without a label, those of the largest clusters first. Where equal vectors
        leave too few clusters, chance chooses the last ones.

    Notes
    -----
    The authors take self-supervised features, at most 500 clusters, and none of fewer than five
    images; here the features are the caller's, and each label has a cluster of its own, as in
    scikit-activeml.
    """
    left = np.setdiff1d(np.arange(len(features)), labelled)
    clusters = len(labelled) + count
    # As scikit-activeml draws: its own TypiClust makes the same choices.
    draws = RandomState(RandomState(seed).randint(1, 2**31) * (len(left) + 1) % 2**31)
    # On any number of cores the same sums, and so the same choice.
    with threadpool_limits(1):
        cluster = KMeans(clusters, random_state=seed).fit_predict(features)
    sizes = np.bincount(cluster, minlength=clusters)
    sizes[cluster[labelled]] = 0
    chosen: list[int] = []
    while len(chosen) < count and sizes.any():
        largest = _largest(sizes, draws)
        members = np.flatnonzero(cluster == largest)
        worth = np.full(len(features), -np.inf)
        worth[members] = typicality(features[members])
        chosen.append(int(left[_largest(worth[left], draws)]))
        sizes[largest] = 0
    rest = draws.permutation(np.setdiff1d(left, chosen))
    return np.array([*chosen, *rest[: count - len(chosen)]], dtype=np.int64)


def typicality(features: Floats) -> Floats:
    """Inverse of the mean distance to an image's nearest neighbours, at most `NEIGHBOURS`.

    Parameters
    ----------
    features : ndarray (M, F)
        Of one cluster.

    Returns
    -------
    ndarray (M,)
        Positive; 1 for an image alone.
    """
    neighbours = min(NEIGHBOURS, len(features) - 1)
    if neighbours == 0:
        return np.ones(1)
    nearest = NearestNeighbors(n_neighbors=neighbours + 1).fit(features)
    # The nearest is the image itself; the small number keeps copies finite.
    distances, _ = nearest.kneighbors(features)
    return np.asarray(1 / ((1 / neighbours) * (distances.sum(axis=1) + 1e-7)))


def places(features: Floats, sizes: Sequence[int], seed: int) -> NDArray[np.float64]:
    """Place of each image in the order of choosing, each budget going on from the smaller ones.

    Parameters
    ----------
    features : ndarray (N, F)
        See `typiclust`.
    sizes : sequence of int
        Ascending budgets, at most N images.
    seed : int
        Of all draws.

    Returns
    -------
    ndarray of float64 (N,)
        0 is chosen first; N is not chosen.
    """
    chosen = np.empty(0, dtype=np.int64)
    for size in sizes:
        if size > len(chosen):
            own = derive_seed(seed, size) % 2**32
            more = typiclust(features, chosen, size - len(chosen), own)
            chosen = np.concatenate([chosen, more])
    found = np.full(len(features), float(len(features)))
    found[chosen] = np.arange(len(chosen))
    return found


def _largest(values: NDArray[Any], draws: RandomState) -> int:
    """Index of the largest value, a random one of several."""
    return int(np.argmax(draws.random(values.shape) * (values == values.max())))
