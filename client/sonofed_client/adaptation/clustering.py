"""The site's half of federated spherical k-means: sums leave, embeddings stay."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(z: Tensor) -> tuple[Tensor, Tensor, int]:
    """First and second moments, from which the coordinator places the initial centroids.

    Parameters
    ----------
    z : Tensor (N, d)
        Unit vectors; N may be 0.

    Returns
    -------
    total : Tensor of float64 (d,)
        Sum of the vectors.
    second : Tensor of float64 (d, d)
        Sum of their outer products.
    count : int
        N.
    """
    vectors = z.detach().cpu().double()
    return vectors.sum(dim=0), vectors.T @ vectors, len(vectors)


def cluster_sums(z: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Assign each vector to the centroid of largest cosine and sum per cluster.

    Parameters
    ----------
    z : Tensor (N, d)
        Unit vectors; N may be 0.
    centroids : Tensor (k, d)
        Unit vectors; equally near ones leave a vector to the first.

    Returns
    -------
    sums : Tensor of float64 (k, d)
        Sum of each cluster's vectors.
    counts : Tensor of int64 (k,)
        Sizes of the clusters.
    """
    vectors = z.detach().cpu().double()
    nearest = (vectors @ centroids.double().T).argmax(dim=1)
    sums = torch.zeros(centroids.shape, dtype=torch.float64).index_add_(0, nearest, vectors)
    return sums, nearest.bincount(minlength=len(centroids))
