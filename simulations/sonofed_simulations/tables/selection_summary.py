"""What a selection table shows: rows, paired differences, budget curves, label savings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.results import Machine
from sonofed_common.metrics import classification_metrics
from sonofed_server.study.report import this_machine
from sonofed_simulations.paired import Contrast, Floats, Interval, contrast, holm, interval
from sonofed_simulations.statistics import (
    budget_area,
    delong,
    needed_budget,
    paired_effect,
    sign_permutation,
)
from sonofed_simulations.tables.cells import Cell
from sonofed_simulations.tables.preset import choose, is_ours, preset_cells
from sonofed_simulations.tables.selection_replicates import (
    METRICS,
    Key,
    SelectionReplicates,
    selection_replicates,
)
from sonofed_simulations.tables.settings import (
    ALL_LABELS,
    BASELINE,
    CONTROLS,
    Mode,
    SelectionTable,
    SplitName,
)

RANDOM = "random"
MARGIN = 0.01
"""Accuracy below that of all labels at which labels count as saved."""
POINTS = ("balanced_accuracy", "sensitivity_at_specificity_90", "ece", "brier")


class Row(Model):
    """One strategy or control at one budget, over the splits that it has finished.

    Notes
    -----
    ``over_random`` and ``over_best`` (by metric) are differences in the same bootstrap samples,
    over the splits that both have; ``effect`` is Cohen's d of the accuracy's differences to Random
    over these splits, ``p_permutation`` of flipping their signs by patient, and ``p_delong`` of
    the AUROCs in the first seed's folds and sites, against Random's first draw.
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
    effect: float | None = None
    p_permutation: float | None = None
    p_delong: float | None = None


class Curve(Model):
    """One strategy over all budgets, on the splits that have finished every one of them.

    Notes
    -----
    ``area`` is the mean accuracy over the budgets' range. ``saving`` is by how large a share of
    the pools fewer labels than Random's reach the accuracy of all labels less one point, on curves
    that are linear between no label, the budgets and all labels.
    """

    strategy: str
    mode: Mode
    splits: int
    accuracy: dict[str, Interval]
    area: Interval
    over_random: Contrast | None = None
    saving: Interval | None = None


class Summary(Model):
    """A selection table's numbers."""

    scenario: str
    machine: Machine
    cells: int
    wanted: int
    seconds: float
    main_budget: float
    best_rival: str | None
    preset: dict[str, str] = Field(default={}, description="by site: the candidate of sonofed")
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...]


def summarise(
    table: SelectionTable, cells: Sequence[Cell], wanted: int, threshold: float
) -> Summary:
    """Summarise finished cells.

    Parameters
    ----------
    table : SelectionTable
        What was asked for.
    cells : sequence of Cell
        What has finished of it.
    wanted : int
        Cells of the whole table.
    threshold : float
        Operating point found on the source's held-out images.
    """
    replicates = selection_replicates([*cells, *preset_cells(cells, table)])
    rows = [_row(key, replicates, threshold) for key in replicates.by_key]
    rows = [_against_random(row, replicates) for row in rows]
    rival = _best_rival(rows, table.main_budget)
    rows = [_against_best(row, rival, replicates) for row in rows]
    for field in ("over_random", "over_best"):
        rows = _corrected(rows, field)
    strategies = [(name, mode) for name, mode, _ in replicates.by_key if name not in CONTROLS]
    curves = [_curve(n, m, table, replicates) for n, m in dict.fromkeys(strategies)]
    return Summary(
        scenario=table.scenario,
        machine=this_machine(),
        cells=len(cells),
        wanted=wanted,
        seconds=sum(cell.seconds for cell in cells),
        main_budget=table.main_budget,
        best_rival=rival,
        preset=choose(cells, table),
        rows=tuple(rows),
        curves=tuple(curve for curve in curves if curve is not None),
    )


def _row(key: Key, replicates: SelectionReplicates, threshold: float) -> Row:
    splits = replicates.splits(key)
    cells = [cell for split in splits for cell in replicates.by_key[key][split]]
    by_site = replicates.mean(key, splits)
    over_sites = by_site.mean(axis=1)
    names = list(cells[0].predictions)
    labels = {name: np.mean([len(cell.chosen[name]) for cell in cells]) for name in names}
    total = float(sum(labels.values()))
    malignant = float(np.mean([sum(cell.malignant.values()) for cell in cells]))
    metrics = [
        classification_metrics(y, p, threshold)
        for cell in cells
        for y, p, _ in cell.predictions.values()
    ]
    points = {name: [found[name] for found in metrics] for name in POINTS}
    return Row(
        strategy=key[0],
        mode=_mode(key[1]),
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


def _known_mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None


def _mode(name: str) -> Mode:
    return "pooled" if name == "pooled" else "federated"


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
            "effect": paired_effect(steps),
            "p_permutation": sign_permutation(_by_patient(key, other, splits, replicates)),
            "p_delong": _combined_delong(key, other, splits, replicates),
        }
    )


def _against_best(row: Row, rival: str | None, replicates: SelectionReplicates) -> Row:
    if rival is None or row.strategy in (rival, RANDOM, *CONTROLS):
        return row
    key, other = (row.strategy, row.mode, row.budget), (rival, row.mode, row.budget)
    splits = replicates.splits(key, other)
    found = _contrasts(key, other, splits, replicates) if splits else {}
    return row.model_copy(update={"over_best": found})


def _contrasts(
    key: Key, other: Key, splits: Sequence[SplitName], replicates: SelectionReplicates
) -> dict[str, Contrast]:
    values, reference = (replicates.over_sites(k, splits) for k in (key, other))
    return {name: contrast(values[n], reference[n]) for n, name in enumerate(METRICS)}


def _best_rival(rows: Sequence[Row], budget: float) -> str | None:
    """The strategy, neither ours nor Random, of the highest mean accuracy at the main budget."""
    rivals = [
        row
        for row in rows
        if row.budget == budget
        and row.mode == "federated"
        and row.strategy not in (RANDOM, *CONTROLS)
        and not is_ours(row.strategy)
    ]
    return max(rivals, key=lambda row: row.accuracy.value).strategy if rivals else None


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


def _by_patient(
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


def _combined_delong(
    key: Key, other: Key, splits: Sequence[SplitName], replicates: SelectionReplicates
) -> float | None:
    """P of the mean difference of AUROC over the folds of one seed, which share no patient."""
    from scipy.stats import norm

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


def _curve(
    strategy: str, mode: Mode | str, table: SelectionTable, replicates: SelectionReplicates
) -> Curve | None:
    keys = [(strategy, mode, budget) for budget in table.budgets]
    splits = replicates.splits(*keys)
    if not splits or len(keys) < 2:
        return None
    values = [replicates.over_sites(key, splits)[0] for key in keys]
    area = _area(table, values)
    reference = [(RANDOM, mode, budget) for budget in table.budgets]
    common = replicates.splits(*keys, *reference)
    over_random = saving = None
    if common and strategy != RANDOM:
        own, others = (
            [replicates.over_sites(key, common)[0] for key in chain] for chain in (keys, reference)
        )
        over_random = contrast(_area(table, own), _area(table, others))
        ends = [(BASELINE, "federated", 0.0), (ALL_LABELS, "federated", 1.0)]
        if mode == "federated" and set(common) <= set(replicates.splits(*ends)):
            low, high = (replicates.over_sites(key, common)[0] for key in ends)
            budgets = [0.0, *table.budgets, 1.0]
            needs = [
                needed_budget(budgets, np.stack([low, *curve, high], axis=1), high - MARGIN)
                for curve in (others, own)
            ]
            saving = interval(needs[0] - needs[1])
    return Curve(
        strategy=strategy,
        mode=_mode(mode),
        splits=len(splits),
        accuracy={f"{b:g}": interval(v) for b, v in zip(table.budgets, values, strict=True)},
        area=interval(area),
        over_random=over_random,
        saving=saving,
    )


def _area(table: SelectionTable, values: Sequence[Floats]) -> Floats:
    return budget_area(table.budgets, np.stack(values, axis=-1))
