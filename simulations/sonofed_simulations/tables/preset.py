"""The row ``sonofed``: our strategies, judged at hospitals that had no part in choosing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sonofed_simulations.rivals import CANDIDATES, OURS
from sonofed_simulations.scenarios.scenario import read_scenario
from sonofed_simulations.statistics import leave_one_site_out
from sonofed_simulations.tables.cells import Cell
from sonofed_simulations.tables.settings import SelectionTable, SplitName

PRESET = "sonofed"
Place = tuple[str, float, SplitName]


def is_ours(strategy: str) -> bool:
    """Whether a row is ours: its name, or the preset's."""
    return strategy == PRESET or strategy in OURS


def choose(cells: Sequence[Cell], table: SelectionTable) -> dict[str, str]:
    """Choose a candidate for each site by what it is worth at the others.

    Parameters
    ----------
    cells : sequence of Cell
        Finished ones, of any strategy.
    table : SelectionTable
        Whose main budget decides.

    Returns
    -------
    dict of str to str
        Of `CANDIDATES`, by site: the highest mean accuracy over the own values of the sites of
        other data sets, on the splits that every candidate has finished. Empty where there is
        none, or a single data set: another scanner of the same hospital is no other hospital.
    """
    held = _by_place(cells)
    splits = _common(held, table.main_budget)
    if not splits:
        return {}
    sites = list(held[next(iter(CANDIDATES)), table.main_budget, splits[0]][0].predictions)
    worth = {
        name: {
            site: np.mean(
                [
                    _accuracy(cell, site)
                    for split in splits
                    for cell in held[name, table.main_budget, split]
                ]
            )
            for site in sites
        }
        for name in CANDIDATES
    }
    return {
        site: max(worth, key=lambda name: np.mean([worth[name][s] for s in others]))
        for site, others in leave_one_site_out(_data_sets(table, sites)).items()
    }


def preset_cells(cells: Sequence[Cell], table: SelectionTable) -> list[Cell]:
    """Put the preset together: each site's part is of the candidate that other hospitals chose."""
    chosen, held = choose(cells, table), _by_place(cells)
    found = []
    for budget in table.budgets:
        for split in _common(held, budget) if chosen else []:
            parts = {site: held[name, budget, split][0] for site, name in chosen.items()}
            one = next(iter(parts.values()))
            found.append(
                Cell(
                    replace(one.chain, strategy=PRESET),
                    budget,
                    {site: cell.chosen[site] for site, cell in parts.items()},
                    {site: cell.malignant[site] for site, cell in parts.items()},
                    {site: cell.predictions[site] for site, cell in parts.items()},
                    one.threshold,
                    0.0,
                )
            )
    return found


def _data_sets(table: SelectionTable, sites: Sequence[str]) -> dict[str, str]:
    """The data set of each site; one of phantoms is its own."""
    hospitals = read_scenario(table.scenario).hospitals
    real = {name: hospital.path for name, hospital in hospitals.items() if hospital.kind}
    return {site: str(real.get(site, site)) for site in sites}


def _by_place(cells: Sequence[Cell]) -> dict[Place, list[Cell]]:
    held: dict[Place, list[Cell]] = {}
    for cell in cells:
        if cell.chain.mode == "federated":
            held.setdefault((cell.chain.strategy, cell.budget, cell.chain.split), []).append(cell)
    return held


def _common(held: dict[Place, list[Cell]], budget: float) -> list[SplitName]:
    """Splits in which every candidate has finished a budget."""
    finished = [{s for n, b, s in held if (n, b) == (name, budget)} for name in CANDIDATES]
    return sorted(set.intersection(*finished), key=lambda split: (split.seed, split.fold))


def _accuracy(cell: Cell, site: str) -> float:
    labels, probabilities, _ = cell.predictions[site]
    return float(np.mean((probabilities >= 0.5) == (labels == 1)))
