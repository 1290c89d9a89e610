"""Budget curves of a selection table: areas, and the labels that a strategy saves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sonofed_common.contract.configuration import Model
from sonofed_simulations.rivals import TWO_VIEW_RANDOM, TWO_VIEWS, UNMIRRORED
from sonofed_simulations.statistics import (
    Contrast,
    Floats,
    Interval,
    budget_area,
    contrast,
    interval,
    needed_budget,
)
from sonofed_simulations.tables.preset import PRESET
from sonofed_simulations.tables.selection_replicates import Key, SelectionReplicates
from sonofed_simulations.tables.settings import (
    ALL_LABELS,
    BASELINE,
    RANDOM,
    TWO_VIEW_ALL_LABELS,
    TWO_VIEW_BASELINE,
    Mode,
    SelectionTable,
)

MARGIN = 0.01
"""Accuracy below that of all labels at which labels count as saved."""


class Curve(Model):
    """One strategy over all budgets, on the splits that have finished every one of them.

    Notes
    -----
    ``area`` is the mean accuracy over the budgets' range. ``saving`` is by how large a share of
    the pools fewer labels than Random's reach the rivals' accuracy of all labels less one point, on
    curves that are linear between no label, the budgets and all labels, each from its own start:
    one that starts above the target saves all that Random needs. ``two_view_saving``, of two views,
    is against Random of two views and their all labels less one point.
    """

    strategy: str
    mode: Mode
    splits: int
    accuracy: dict[str, Interval]
    area: Interval
    over_random: Contrast | None = None
    saving: Interval | None = None
    two_view_saving: Interval | None = None


def curve_of(
    strategy: str, mode: Mode, table: SelectionTable, replicates: SelectionReplicates
) -> Curve | None:
    """Return a strategy's curve; None where no split has finished every budget."""
    keys = _keys(strategy, mode, table)
    splits = replicates.splits(*keys)
    if not splits or len(keys) < 2:
        return None
    values = [replicates.over_sites(key, splits)[0] for key in keys]
    area = _area(table, values)
    over_random = None
    common = replicates.splits(*keys, *_keys(RANDOM, mode, table))
    if common and strategy != RANDOM:
        own, others = (
            [replicates.over_sites(key, common)[0] for key in chain]
            for chain in (keys, _keys(RANDOM, mode, table))
        )
        over_random = contrast(_area(table, own), _area(table, others))
    saving = two_view_saving = None
    # The controls of two views predict from mirror images, too.
    if mode == "federated" and strategy != UNMIRRORED:
        saving = _saving(strategy, RANDOM, table, replicates)
        if strategy == PRESET or strategy in TWO_VIEWS:
            two_view_saving = _saving(strategy, TWO_VIEW_RANDOM, table, replicates)
    return Curve(
        strategy=strategy,
        mode=mode,
        splits=len(splits),
        accuracy={f"{b:g}": interval(v) for b, v in zip(table.budgets, values, strict=True)},
        area=interval(area),
        over_random=over_random,
        saving=saving,
        two_view_saving=two_view_saving,
    )


def _saving(
    strategy: str, reference: str, table: SelectionTable, replicates: SelectionReplicates
) -> Interval | None:
    """Labels that a strategy needs less than a reference to reach its all labels less a margin."""
    if strategy == reference:
        return None
    chains = [(_keys(name, "federated", table), _ends(name)) for name in (reference, strategy)]
    splits = replicates.splits(*(key for keys, ends in chains for key in (*keys, *ends)))
    if not splits:
        return None
    target = replicates.over_sites(_ends(reference)[1], splits)[0] - MARGIN
    needs = []
    for keys, (none, all_labels) in chains:
        curve = [replicates.over_sites(key, splits)[0] for key in (none, *keys, all_labels)]
        whole = np.stack(curve, axis=1)
        needs.append(needed_budget([0.0, *table.budgets, 1.0], whole, target))
    return interval(needs[0] - needs[1])


def _keys(strategy: str, mode: Mode, table: SelectionTable) -> list[Key]:
    return [(strategy, mode, budget) for budget in table.budgets]


def _ends(strategy: str) -> tuple[Key, Key]:
    """No label and all labels, from the start of a strategy."""
    two_views = strategy == PRESET or strategy in TWO_VIEWS
    none, all_labels = (
        (TWO_VIEW_BASELINE, TWO_VIEW_ALL_LABELS) if two_views else (BASELINE, ALL_LABELS)
    )
    return (none, "federated", 0.0), (all_labels, "federated", 1.0)


def _area(table: SelectionTable, values: Sequence[Floats]) -> Floats:
    return budget_area(table.budgets, np.stack(values, axis=-1))
