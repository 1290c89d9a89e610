"""P values of a strategy against another, patient by patient and fold by fold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm

from sonofed_simulations.statistics import delong
from sonofed_simulations.tables.selection_replicates import Key, SelectionReplicates
from sonofed_simulations.tables.settings import SplitName


def by_patient(
    key: Key, other: Key, splits: Sequence[SplitName], replicates: SelectionReplicates
) -> list[float]:
    """Each patient's difference of correct images, Random's being means over its draws."""
    sums: dict[tuple[str, str], float] = {}
    for split in splits:
        for sign, cells in (
            (1.0, replicates.by_key[key][split]),
            (-1.0, replicates.by_key[other][split]),
        ):
            for cell in cells:
                for site, (labels, probabilities, groups) in cell.predictions.items():
                    correct = (probabilities >= 0.5) == (labels == 1)
                    for group, right in zip(groups.tolist(), correct.tolist(), strict=True):
                        place = (site, group)
                        sums[place] = sums.get(place, 0.0) + sign * right / len(cells)
    return list(sums.values())


def combined_delong(
    key: Key, other: Key, splits: Sequence[SplitName], replicates: SelectionReplicates
) -> float | None:
    """P of the mean difference of AUROC over the folds of one seed, which share no patient."""
    gaps, variances = [], []
    for split in (s for s in splits if s.seed == splits[0].seed):
        one, two = replicates.by_key[key][split][0], replicates.by_key[other][split][0]
        for site, (labels, probabilities, _) in one.predictions.items():
            if len(set(labels.tolist())) == 2 and min(np.bincount(labels)) > 1:
                found = delong(labels, probabilities, two.predictions[site][1])
                gaps.append(found.first - found.second)
                variances.append(found.standard_error**2)
    error = float(np.sqrt(np.sum(variances)))
    return 2 * float(norm.sf(abs(float(np.sum(gaps))) / error)) if error > 0 else None
