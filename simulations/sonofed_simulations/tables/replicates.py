"""Metrics of cells in the same bootstrap samples of patients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from sonofed_common.metrics import weighted_auroc
from sonofed_simulations.statistics import Floats, PatientDraws
from sonofed_simulations.tables.arms import Array, Prediction


class Predicted(Protocol):
    """A finished cell of any table."""

    @property
    def predictions(self) -> Mapping[str, Prediction]:
        """By test site; all cells of a split have the same images."""
        ...


class _Name(Protocol):
    def __lt__(self, other: Any, /) -> bool: ...

    def __hash__(self) -> int: ...


Key = TypeVar("Key", bound=_Name)
Split = TypeVar("Split", bound=_Name)
Cell = TypeVar("Cell", bound=Predicted)


@dataclass(frozen=True)
class Replicates(Generic[Key, Split, Cell]):
    """Metrics of every key and split: the estimate, then one value a bootstrap sample.

    Attributes
    ----------
    by_key : mapping of Key to mapping of Split to sequence of Cell
        What a row of the table is of. Several cells of one split are draws of the same thing.
    metrics : tuple of str
        Names of `MEASURES`.
    """

    by_key: Mapping[Key, Mapping[Split, Sequence[Cell]]]
    metrics: tuple[str, ...]

    @cached_property
    def values(self) -> dict[tuple[Key, Split], Floats]:
        """Arrays (metrics, sites, 1 + R), means over draws."""
        draws = PatientDraws(
            (site, groups.tolist())
            for splits in self.by_key.values()
            for cells in splits.values()
            for cell in cells
            for site, (_, _, groups) in cell.predictions.items()
        )
        weights: dict[tuple[Split, str], Floats] = {}
        found = {}
        for key, splits in self.by_key.items():
            for split, cells in splits.items():
                for site, (_, _, groups) in cells[0].predictions.items():
                    if (split, site) not in weights:
                        weights[split, site] = draws.weights(site, groups.tolist())
                drawn = [self._measure(cell, split, weights) for cell in cells]
                found[key, split] = np.mean(drawn, axis=0)
        return found

    def splits(self, *keys: Key) -> list[Split]:
        """Splits that all of these keys have finished."""
        held = [set(self.by_key.get(key, {})) for key in keys]
        return sorted(set.intersection(*held))

    def mean(self, key: Key, splits: Sequence[Split]) -> Floats:
        """Mean over splits (metrics, sites, 1 + R), where a sample has the metric."""
        return nanmean(self.values[key, split] for split in splits)

    def over_sites(self, key: Key, splits: Sequence[Split]) -> Floats:
        """Mean over splits and then over sites (metrics, 1 + R)."""
        return np.asarray(self.mean(key, splits).mean(axis=1))

    def _measure(
        self, cell: Cell, split: Split, weights: dict[tuple[Split, str], Floats]
    ) -> Floats:
        found = [
            [MEASURES[m](labels, probabilities, weights[split, site]) for m in self.metrics]
            for site, (labels, probabilities, _) in cell.predictions.items()
        ]
        return np.swapaxes(np.array(found), 0, 1)


def nanmean(arrays: Iterable[Floats]) -> Floats:
    """Mean of arrays of one shape where they are numbers; NaN where none is."""
    stacked = np.stack(list(arrays))
    there = ~np.isnan(stacked)
    total = np.where(there, stacked, 0.0).sum(axis=0)
    count = there.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _accuracy(labels: Array, probabilities: Array, weights: Floats) -> Floats:
    return _share((probabilities >= 0.5) == (labels == 1), weights)


def _balanced_accuracy(labels: Array, probabilities: Array, weights: Floats) -> Floats:
    correct = (probabilities >= 0.5) == (labels == 1)
    members = [labels == label for label in (0, 1)]
    return np.asarray(
        np.mean([_share(correct[member], weights[:, member]) for member in members], axis=0)
    )


def _share(correct: Array, weights: Floats) -> Floats:
    """Weighted share of what is correct (R,); NaN in a sample that holds nothing."""
    total = weights.sum(axis=1)
    right = weights @ correct.astype(np.float64)
    return np.asarray(
        np.divide(right, total, out=np.full(len(total), np.nan), where=total > 0), np.float64
    )


MEASURES = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "auroc": weighted_auroc,
}
"""Of labels (N,), P(malignant) (N,) and weights (R, N): values (R,). Malignant from P 0.5 on."""
