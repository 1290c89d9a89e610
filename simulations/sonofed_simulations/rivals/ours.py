"""The dual score of ADAptation on the start model's features, without reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.stats import rankdata

from sonofed_client.adaptation.ranking import order_component
from sonofed_client.adaptation.scoring import distance_to_centroids, uncertainty
from sonofed_server.source.statistics import spherical_kmeans
from sonofed_simulations.rivals.pool import Floats, Indices, Pool, best

CLUSTERS = 4


@dataclass(frozen=True)
class DualScore:
    """Rank of the uncertainty plus rank of the distance to the source (arXiv 2507.00474, Eq. 4).

    Adapted: on features of the start model, without the contrastive stage; r is the angle to the
    nearest source centroid, for a hospital that reconstructs nothing. All sites' images are
    clustered and ranked together, which federated sums and histograms do to the same result.
    """

    uncertainty: Literal["margin", "range"]
    order: Literal["near", "far", "both"]
    ranks_globally: bool = True
    uses_local: bool = False
    uses_passes: bool = False

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        z = torch.from_numpy(np.ascontiguousarray(pool.unit))
        centroids, _ = spherical_kmeans(z.double(), CLUSTERS, seed % 2**31)
        u = uncertainty(z, centroids.to(z), self.uncertainty).numpy()
        r = distance_to_centroids(z, torch.from_numpy(pool.source_centroids)).numpy()
        left = pool.unlabelled
        scores = np.zeros(len(u))
        below, above = _below(r[left]), _below(-r[left])
        scores[left] = _below(u[left]) + order_component(below, above, self.order)
        return best(pool, -scores, count, seed)


def _below(values: Floats) -> Indices:
    """How many values are strictly smaller than each (N,)."""
    return np.asarray(rankdata(values, method="min") - 1, dtype=np.int64)
