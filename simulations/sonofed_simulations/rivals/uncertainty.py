"""Strategies that take what the model is unsure of."""

from __future__ import annotations

from dataclasses import dataclass

from sonofed_simulations.rivals.pool import Indices, PerSite, Pool, best, entropy


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

    uses_passes: bool = True

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        information = entropy(pool.passes.mean(axis=0)) - entropy(pool.passes).mean(axis=0)
        return best(pool, information, count, seed)
