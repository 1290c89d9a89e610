"""What a site may know of the source images: centroids and sums over many, never one of them."""

from __future__ import annotations

import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor
from torch.nn.functional import normalize

CLUSTERS = 4
SMALLEST = 5
"""Fewest images behind any disclosed vector."""
BINS = 100
STARTS = 10
ITERATIONS = 100


def feature_statistics(features: Tensor, seed: int) -> dict[str, Tensor]:
    """Summarise backbone features so that no single source image can be derived.

    Parameters
    ----------
    features : Tensor
        (N, F) backbone features of the source images; they are normalised to unit length here.
    seed : int
        Of the k-means starts.

    Returns
    -------
    dict of str to Tensor
        ``centroids`` (k, F) unit vectors, k <= 4, each over at least five images;
        ``counts`` (k,) int64, images behind each centroid;
        ``mean`` (F,), mean of the unit features;
        ``similarity_histogram`` (100,) int64, counts of the cosine between each unit feature and
        the mean's direction, in equal bins over [-1, 1].
        Empty with fewer than five images.

    Notes
    -----
    A centroid of one image would be that image's feature, from which a generator might redraw it,
    so clusters below five images are left out. The histogram holds one number an image, coarsened
    to 0.02 and without order.
    """
    if len(features) < SMALLEST:
        return {}
    unit = normalize(features.double(), dim=1)
    centroids, counts = spherical_kmeans(unit, CLUSTERS, seed)
    large = counts >= SMALLEST
    mean = unit.mean(0)
    similarities = (unit @ normalize(mean, dim=0)).clamp(-1, 1)
    return {
        "centroids": centroids[large].float(),
        "counts": counts[large],
        "mean": mean.float(),
        "similarity_histogram": torch.histc(similarities, BINS, -1, 1).long(),
    }


def spherical_kmeans(unit: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cluster unit vectors by cosine (Dhillon and Modha, 2001), best of ten k-means++ starts.

    Parameters
    ----------
    unit : Tensor
        (N, F) unit vectors.
    clusters : int
        Wanted number; at most N are made.
    seed : int
        Of the starts.

    Returns
    -------
    centroids : Tensor
        (k, F) unit vectors.
    counts : Tensor
        (k,) members of each, int64.
    """
    best: tuple[float, Tensor, Tensor] | None = None
    for start in range(STARTS):
        _, chosen = kmeans_plusplus(
            unit.numpy(), min(clusters, len(unit)), random_state=(seed + start) % 2**32
        )
        centroids, assignment = _lloyd(unit, unit[torch.from_numpy(chosen).long()])
        fit = float((unit * centroids[assignment]).sum())
        if best is None or fit > best[0]:
            best = fit, centroids, assignment
    assert best is not None
    return best[1], torch.bincount(best[2], minlength=len(best[1]))


def _lloyd(unit: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    assignment = torch.full((len(unit),), -1)
    for _ in range(ITERATIONS):
        renewed = (unit @ centroids.T).argmax(1)
        if torch.equal(renewed, assignment):
            break
        assignment = renewed
        sums = torch.zeros_like(centroids).index_add_(0, assignment, unit)
        # An empty cluster keeps its centroid: it has no sum to move to.
        filled = sums.norm(dim=1, keepdim=True) > 0
        centroids = torch.where(filled, normalize(sums, dim=1), centroids)
    return centroids, assignment
