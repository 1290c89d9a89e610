"""Metrics of cells in the same bootstrap samples of patients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sonofed_common.metrics import weighted_auroc
from sonofed_simulations.paired import Floats, PatientDraws
from sonofed_simulations.tables.cells import Cell
from sonofed_simulations.tables.settings import SplitName

METRICS = ("accuracy", "auroc")
Key = tuple[str, str, float]
"""Strategy, mode and budget."""


@dataclass(frozen=True)
class Replicates:
    """Accuracy and AUROC of every key and split: the estimate, then one value a sample.

    Attributes
    ----------
    cells : tuple of Cell
        All finished ones.
    """

    cells: tuple[Cell, ...]

    @cached_property
    def by_key(self) -> dict[Key, dict[SplitName, list[Cell]]]:
        """The cells of each key and split: several of Random, one a draw."""
        found: dict[Key, dict[SplitName, list[Cell]]] = {}
        for cell in self.cells:
            splits = found.setdefault((cell.chain.strategy, cell.chain.mode, cell.budget), {})
            splits.setdefault(cell.chain.split, []).append(cell)
        return found

    @cached_property
    def values(self) -> dict[tuple[Key, SplitName], Floats]:
        """Arrays (2, sites, 1 + R) of accuracy and AUROC, means over draws."""
        draws = PatientDraws(
            (site, groups.tolist())
            for cell in self.cells
            for site, (_, _, groups) in cell.predictions.items()
        )
        weights: dict[tuple[SplitName, str], Floats] = {}
        found = {}
        for key, splits in self.by_key.items():
            for split, cells in splits.items():
                for site, (_, _, groups) in cells[0].predictions.items():
                    if (split, site) not in weights:
                        weights[split, site] = draws.weights(site, groups.tolist())
                drawn = [_metrics(cell, weights) for cell in cells]
                found[key, split] = np.mean(drawn, axis=0)
        return found

    def splits(self, *keys: Key) -> list[SplitName]:
        """Splits that all of these keys have finished."""
        held = [set(self.by_key.get(key, {})) for key in keys]
        return sorted(set.intersection(*held), key=lambda split: (split.seed, split.fold))

    def mean(self, key: Key, splits: Sequence[SplitName]) -> Floats:
        """Mean over splits (2, sites, 1 + R); a split without a metric in a sample is left out."""
        return nanmean(self.values[key, split] for split in splits)

    def over_sites(self, key: Key, splits: Sequence[SplitName]) -> Floats:
        """Mean over splits and then over sites (2, 1 + R)."""
        return np.asarray(self.mean(key, splits).mean(axis=1))


def nanmean(arrays: Iterable[Floats]) -> Floats:
    """Mean of arrays of one shape where they are numbers; NaN where none is."""
    stacked = np.stack(list(arrays))
    there = ~np.isnan(stacked)
    total = np.where(there, stacked, 0.0).sum(axis=0)
    count = there.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _metrics(cell: Cell, weights: dict[tuple[SplitName, str], Floats]) -> Floats:
    found = []
    for site, (labels, probabilities, _) in cell.predictions.items():
        drawn = weights[cell.chain.split, site]
        correct = ((probabilities >= 0.5) == (labels == 1)).astype(np.float64)
        total = drawn.sum(axis=1)
        accuracy = np.divide(
            drawn @ correct, total, out=np.full(len(total), np.nan), where=total > 0
        )
        found.append((accuracy, weighted_auroc(labels, probabilities, drawn)))
    return np.swapaxes(np.array(found), 0, 1)
