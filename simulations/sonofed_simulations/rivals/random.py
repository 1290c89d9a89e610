"""Random selection, which every other strategy has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sonofed_simulations.rivals.pool import Indices, PerSite, Pool


@dataclass(frozen=True)
class Random(PerSite):
    """A uniform draw without replacement."""

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        return np.random.default_rng(seed).permutation(pool.unlabelled)[:count]
