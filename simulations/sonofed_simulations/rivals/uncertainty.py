"""Strategies that take what the model is unsure of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from skactiveml.pool import batch_bald

from sonofed_simulations.rivals.pool import Indices, PerSite, Pool, best, entropy

JOINT_SAMPLES = 50
"""Joint outcomes that BatchBALD draws where they are too many to be counted."""


@dataclass(frozen=True)
class MaxEntropy(PerSite):
    """Largest predictive entropy (Settles, 2009).

    Adapted: nothing.
    """

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        return best(pool, entropy(pool.probabilities), count, seed)


@dataclass(frozen=True)
class Bald(PerSite):
    """Largest mutual information of label and weights (Houlsby et al., arXiv 1112.5745, 2011).

    Adapted: the weights' uncertainty is that of dropout before the head alone.
    """

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        information = entropy(pool.passes.mean(axis=0)) - entropy(pool.passes).mean(axis=0)
        return best(pool, information, count, seed)


@dataclass(frozen=True)
class BatchBald(PerSite):
    """Largest joint mutual information of a batch (Kirsch et al., NeurIPS 2019).

    Adapted: as `Bald`; the joint entropy is estimated from 50 drawn outcomes.
    """

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        candidates = pool.unlabelled
        utilities = batch_bald(
            pool.passes[:, candidates].astype(np.float64),
            count,
            n_MC_samples=JOINT_SAMPLES,
            random_state=seed % 2**32,
        )
        # What was taken has no utility afterwards; several may have shared the largest one.
        taken = [np.flatnonzero(np.isnan(row)) for row in utilities[1:]]
        order: list[int] = []
        for gone in taken:
            order.append(int(np.setdiff1d(gone, order)[0]))
        order.append(int(np.nanargmax(utilities[-1])))
        return candidates[order]
