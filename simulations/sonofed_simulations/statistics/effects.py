"""Effect sizes beside contrasts: Cohen's d of pairs, and of two groups that have none."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from sonofed_common.contract.configuration import Model
from sonofed_simulations.statistics.bootstrap import Floats

LEAST = 3
"""Fewer numbers have no spread worth dividing by."""


class Effect(Model):
    """How large a difference is beside its spread.

    Notes
    -----
    ``d`` is Cohen's, of the pairs or of two groups, None with fewer than three of them; ``higher``
    counts the pairs in which the first one is higher.
    """

    d: float | None
    higher: int
    pairs: int

    @property
    def words(self) -> tuple[str, str]:
        """Both as a page has them: d, and ``higher of pairs``."""
        return "" if self.d is None else f"{self.d:+.2f}", f"{self.higher} of {self.pairs}"


def effect_of(differences: Iterable[float]) -> Effect:
    """Effect of paired differences."""
    values = list(differences)
    higher = sum(value > 0 for value in values)
    return Effect(d=paired_effect(values), higher=higher, pairs=len(values))


def paired_effect(differences: ArrayLike) -> float | None:
    """Cohen's d of paired differences (M,), mean by standard deviation.

    None where there are fewer than three, or all are equal.
    """
    values = np.asarray(differences, np.float64)
    if len(values) < LEAST:
        return None
    spread = float(values.std(ddof=1))
    # Differences that are equal on paper differ in the last bits.
    return float(values.mean()) / spread if spread > 1e-12 * float(np.abs(values).max()) else None


def group_effect(one: Floats, two: Floats) -> float | None:
    """Cohen's d of two independent groups (N,) and (M,), by their pooled standard deviation.

    None where a group has fewer than three members, or nothing varies.
    """
    if min(len(one), len(two)) < LEAST:
        return None
    squares = sum(len(group) * float(np.var(group)) for group in (one, two))
    spread = np.sqrt(squares / (len(one) + len(two) - 2))
    return float((np.mean(one) - np.mean(two)) / spread) if spread > 0 else None
