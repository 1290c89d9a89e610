"""Rows of a selection table: metrics, and paired differences to what each is set against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from sonofed_common.contract.configuration import Model
from sonofed_common.metrics import classification_metrics
from sonofed_simulations.rivals.two_views import TWO_VIEW_RANDOM, TWO_VIEWS
from sonofed_simulations.statistics import (
    Contrast,
    Interval,
    contrast,
    holm,
    interval,
    paired_effect,
    sign_permutation,
)
from sonofed_simulations.tables.arms import Array
from sonofed_simulations.tables.preset import PRESET, is_ours
from sonofed_simulations.tables.selection_replicates import METRICS, Key, SelectionReplicates
from sonofed_simulations.tables.selection_tests import by_patient, combined_delong
from sonofed_simulations.tables.settings import CONTROLS, RANDOM, Mode, SplitName

LEAST_SPLITS = 5
"""Splits whose differences have a spread worth dividing by."""
AT_PREVALENCE = "accuracy_at_prevalence"
POINTS = ("balanced_accuracy", "sensitivity_at_specificity_90", "ece", "brier", AT_PREVALENCE)


class Row(Model):
    """One strategy or control at one budget, over the splits that it has finished.

    Notes
    -----
    ``over_random``, ``over_best`` and, of rows of two views, ``over_two_view_random`` (by metric)
    are differences in the same bootstrap samples, over the splits that both have; ``effect`` is
    Cohen's d of the accuracy's differences to Random over these splits, where there are
    `LEAST_SPLITS`, ``p_permutation`` of flipping their signs by patient, and ``p_delong`` of the
    AUROCs in the first seed's folds and sites, against Random's first draw.
    """

    strategy: str
    mode: Mode
    budget: float
    splits: int
    cells: int
    labels: float
    accuracy: Interval
    auroc: Interval
    points: dict[str, float | None]
    worst_site_auroc: float
    sites: dict[str, Interval]
    malignant_share: float | None
    site_share: dict[str, float]
    over_random: dict[str, Contrast] = Field(default={})
    over_best: dict[str, Contrast] = Field(default={})
    over_two_view_random: dict[str, Contrast] = Field(default={})
    effect: float | None = None
    p_permutation: float | None = None
    p_delong: float | None = None


def rows_of(replicates: SelectionReplicates) -> tuple[list[Row], dict[float, str]]:
    """Return all rows, and the best rival at each budget, which they are set against."""
    rows = [_against_random(_row(key, replicates), replicates) for key in replicates.by_key]
    rivals = {budget: _best_rival(rows, budget) for budget in {row.budget for row in rows}}
    best = {budget: rival for budget, rival in rivals.items() if rival is not None}
    rows = [
        _against(row, best[row.budget], "over_best", replicates) if row.budget in best else row
        for row in rows
    ]
    rows = [
        _against(row, TWO_VIEW_RANDOM, "over_two_view_random", replicates)
        if row.strategy in (PRESET, *TWO_VIEWS)
        else row
        for row in rows
    ]
    for field in ("over_random", "over_best", "over_two_view_random"):
        rows = _corrected(rows, field)
    return rows, best


def _row(key: Key, replicates: SelectionReplicates) -> Row:
    splits = replicates.splits(key)
    cells = [cell for split in splits for cell in replicates.by_key[key][split]]
    by_site = replicates.mean(key, splits)
    over_sites = by_site.mean(axis=1)
    names = list(cells[0].predictions)
    labels = {name: np.mean([len(cell.chosen[name]) for cell in cells]) for name in names}
    total = float(sum(labels.values()))
    malignant = float(np.mean([sum(cell.malignant.values()) for cell in cells]))
    metrics = [
        {**classification_metrics(y, p, cell.threshold), AT_PREVALENCE: _at_prevalence(y, p)}
        for cell in cells
        for y, p, _ in cell.predictions.values()
    ]
    points = {name: [found[name] for found in metrics] for name in POINTS}
    return Row(
        strategy=key[0],
        mode=key[1],
        budget=key[2],
        splits=len(splits),
        cells=len(cells),
        labels=total,
        accuracy=interval(over_sites[0]),
        auroc=interval(over_sites[1]),
        points={name: _known_mean(values) for name, values in points.items()},
        worst_site_auroc=float(by_site[1, :, 0].min()),
        sites={name: interval(by_site[1, n]) for n, name in enumerate(names)},
        malignant_share=malignant / total if total else None,
        site_share={name: float(labels[name] / total) for name in names} if total else {},
    )


def _at_prevalence(labels: Array, probabilities: Array) -> float:
    """Accuracy where as many of a site's images are called malignant as there are."""
    called = np.zeros(len(labels), bool)
    called[np.argsort(-probabilities, kind="stable")[: int((labels == 1).sum())]] = True
    return float(np.mean(called == (labels == 1)))


def _known_mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None


def _against_random(row: Row, replicates: SelectionReplicates) -> Row:
    if row.strategy in (RANDOM, *CONTROLS):
        return row
    key, other = (row.strategy, row.mode, row.budget), (RANDOM, row.mode, row.budget)
    splits = replicates.splits(key, other)
    if not splits:
        return row
    steps = [
        float((replicates.values[key, s] - replicates.values[other, s])[0, :, 0].mean())
        for s in splits
    ]
    return row.model_copy(
        update={
            "over_random": _contrasts(key, other, splits, replicates),
            "effect": paired_effect(steps) if len(steps) >= LEAST_SPLITS else None,
            "p_permutation": sign_permutation(by_patient(key, other, splits, replicates)),
            "p_delong": combined_delong(key, other, splits, replicates),
        }
    )


def _against(row: Row, reference: str, field: str, replicates: SelectionReplicates) -> Row:
    if row.strategy in (reference, RANDOM, *CONTROLS):
        return row
    key, other = (row.strategy, row.mode, row.budget), (reference, row.mode, row.budget)
    splits = replicates.splits(key, other)
    found = _contrasts(key, other, splits, replicates) if splits else {}
    return row.model_copy(update={field: found})


def _contrasts(
    key: Key, other: Key, splits: Sequence[SplitName], replicates: SelectionReplicates
) -> dict[str, Contrast]:
    values, reference = (replicates.over_sites(k, splits) for k in (key, other))
    return {name: contrast(values[n], reference[n]) for n, name in enumerate(METRICS)}


def _best_rival(rows: Sequence[Row], budget: float) -> str | None:
    """The strategy, neither ours nor Random, that gains most over Random at a budget.

    The gain is on the splits that both have; mean accuracies of rows may be of other splits.
    """
    rivals = [
        row
        for row in rows
        if row.budget == budget
        and row.mode == "federated"
        and row.strategy not in (RANDOM, *CONTROLS)
        and not is_ours(row.strategy)
        and row.over_random
    ]
    return max(rivals, key=lambda r: r.over_random["accuracy"].value).strategy if rivals else None


def _corrected(rows: Sequence[Row], field: str) -> list[Row]:
    """Correct p values over the strategies of one mode, budget and metric."""
    found = {n: dict(getattr(row, field)) for n, row in enumerate(rows)}
    families = {(row.mode, row.budget) for row in rows}
    for mode, budget in families:
        members = [n for n, row in enumerate(rows) if (row.mode, row.budget) == (mode, budget)]
        for metric in METRICS:
            known = {str(n): found[n][metric] for n in members if metric in found[n]}
            for n, corrected in holm(known).items():
                found[int(n)][metric] = corrected
    return [row.model_copy(update={field: found[n]}) for n, row in enumerate(rows)]
