"""What site and coordinator must agree on to select exactly from counts.

Scores become unsigned integer keys whose order is the scores' order; sites count keys in intervals,
and the coordinator splits the intervals that matter until each holds one image or one key. No score
is sent, but an interval with one image tells that image's score to the interval's width. All
intervals are ``[low, high)`` in uint64; a ``high`` of 0 means ``2**64``, because the interval of
all 64-bit identities ends there and no useful interval ends at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.study import Selection

Keys = NDArray[np.uint64]
Counts = NDArray[np.int64]
Column = Literal["uncertainty", "representativeness", "informativeness", "identity"]
Stage = tuple[Literal["floor", "pool"], int]

MAX_PARTS = 65536
"""Most counts that one query may ask for."""

_PI_KEY = int(np.float32(np.pi).view(np.uint32))

WHOLE: dict[Column, Keys] = {
    "uncertainty": np.array([[0, _PI_KEY + 1]], dtype=np.uint64),
    "representativeness": np.array([[0, _PI_KEY + 1]], dtype=np.uint64),
    "informativeness": np.array([[0, 2**63]], dtype=np.uint64),
    "identity": np.array([[0, 0]], dtype=np.uint64),
}
"""Interval (1, 2) of all keys of a column: float32 angles, non-negative float64, 64-bit ids."""


def part_widths(edges: Keys, split: int) -> Keys:
    """Return the width of each interval's parts, the same number on every machine.

    Parameters
    ----------
    edges : ndarray of uint64 (m, 2)
        Ascending, disjoint intervals ``[low, high)``.
    split : int
        Parts per interval. All are equally wide but the last used one, which may be narrower;
        parts beyond the interval's end are empty.

    Returns
    -------
    ndarray of uint64 (m,)
        Widths; 0 stands for ``2**64``.

    Raises
    ------
    ParameterError
        The edges are not such intervals, or more than `MAX_PARTS` counts are asked for.
    """
    if edges.dtype != np.uint64 or edges.ndim != 2 or edges.shape[1] != 2 or len(edges) == 0:
        raise ParameterError("the edges are not (m, 2) uint64 intervals; send at least one")
    if split < 1 or len(edges) * split > MAX_PARTS:
        raise ParameterError(
            f"{len(edges)} intervals in {split} parts are not between 1 and {MAX_PARTS} counts; "
            "ask for fewer at a time"
        )
    low, last = edges[:, 0], last_keys(edges)
    if np.any(last < low) or np.any(low[1:] <= last[:-1]):
        raise ParameterError("intervals overlap or are not ascending; send disjoint sorted ones")
    return (last - low) // np.uint64(split) + np.uint64(1)


def last_keys(edges: Keys) -> Keys:
    """Return the largest key (m,) inside each interval; wraps from a ``high`` of 0 to 2**64 - 1."""
    return edges[:, 1] - np.uint64(1)


@dataclass(frozen=True)
class RankTable:
    """Pooled ranks of a column: scores to a bin's width, without saying whose.

    Attributes
    ----------
    starts : ndarray of uint64 (b,)
        Ascending starts of the bins that hold one image or one key value.
    cumulative : ndarray of int64 (b + 1,)
        Pooled images in the bins before each start; the last entry is the pool's size.
    """

    starts: Keys
    cumulative: Counts

    def __post_init__(self) -> None:
        if (self.starts.ndim, self.starts.dtype.kind) != (1, "u") or (
            (self.cumulative.ndim, self.cumulative.dtype.kind) != (1, "i")
        ):
            raise ParameterError("a rank table is not two lists of whole numbers; ask again")
        ascending = bool(np.all(self.starts[1:] > self.starts[:-1]))
        growing = bool(np.all(np.diff(self.cumulative) > 0))
        whole = len(self.cumulative) == len(self.starts) + 1 and self.cumulative[0] == 0
        if not (whole and ascending and growing):
            raise ParameterError("a rank table is not ascending or has the wrong length; ask again")

    @property
    def images(self) -> int:
        """Size of the pool."""
        return int(self.cumulative[-1])

    def ranks(self, keys: Keys) -> tuple[Counts, Counts]:
        """Count, for each of a site's keys, the pooled images strictly below and strictly above.

        Parameters
        ----------
        keys : ndarray of uint64 (n,)
            Keys that were in the pool when the table was made.

        Returns
        -------
        below, above : ndarray of int64 (n,)
            Both are between 0 and the pool's size - 1; tied keys share them.

        Raises
        ------
        ParameterError
            A key lies before the first bin, shares its bin with another key, or its bin holds fewer
            images than there are keys here: the table belongs to another pool.
        """
        bins = np.searchsorted(self.starts, keys, side="right") - 1
        held = np.diff(self.cumulative)
        # A table that joins images would make ties of its own.
        apart = len(np.unique(bins)) == len(np.unique(keys))
        if np.any(bins < 0) or not apart or np.any(np.bincount(bins, minlength=len(held)) > held):
            raise ParameterError("the rank table belongs to another pool; repeat the selection")
        return self.cumulative[bins], self.images - self.cumulative[bins + 1]


def budget_count(share: float, images: int) -> int:
    """Return ``share`` of a number of images, rounded half up, at least 1 where there is one.

    The share counts as the decimal number it is written as (0.1 is a tenth), so that no budget
    depends on binary rounding.
    """
    if images == 0:
        return 0
    return max(1, int(Fraction(repr(share)) * images + Fraction(1, 2)))


def floor_count(site_floor: float, share: float, images: int) -> int:
    """Return the images that a site may take before the global choice: the floor of the product."""
    return int(Fraction(repr(site_floor)) * Fraction(repr(share)) * images)


def stages(settings: Selection) -> tuple[Stage, ...]:
    """Return the cuts that a scope needs, in order: (candidates, index of the budget).

    ``pool`` cuts among all images that are not yet taken, ``floor`` among those that are also
    among their site's own best. Each budget goes on from what the smaller ones took: budgets nest.
    """
    budgets = range(len(settings.budgets))
    if settings.scope == "global":
        return tuple(("pool", b) for b in budgets)
    if settings.scope == "global_with_site_floor":
        return tuple(stage for b in budgets for stage in (("floor", b), ("pool", b)))
    return ()


def ranked_columns(settings: Selection) -> tuple[Column, ...]:
    """Return the columns whose pooled ranks the informativeness is made of."""
    if settings.strategy != "dual_score" or settings.combine == "radians":
        return ()
    return ("uncertainty", "representativeness") if settings.omega > 0 else ("uncertainty",)
