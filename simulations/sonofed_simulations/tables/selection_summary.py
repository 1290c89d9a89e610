"""What a selection table shows: rows, paired differences, budget curves, label savings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.results import Machine
from sonofed_server.study.report import this_machine
from sonofed_simulations.tables.cells import Cell
from sonofed_simulations.tables.preset import choose, preset_cells
from sonofed_simulations.tables.selection_curves import Curve, curve_of
from sonofed_simulations.tables.selection_replicates import selection_replicates
from sonofed_simulations.tables.selection_rows import Row, rows_of
from sonofed_simulations.tables.selection_sites import SiteGain, site_gains
from sonofed_simulations.tables.settings import CONTROLS, Chain, SelectionTable


class Summary(Model):
    """A selection table's numbers."""

    scenario: str
    machine: Machine
    cells: int
    wanted: int
    seconds: float
    main_budget: float
    best_rivals: dict[float, str] = Field(description="by budget")
    preset: dict[str, str] = Field(default={}, description="by site: the candidate of sonofed")
    rows: tuple[Row, ...]
    by_classifier: dict[str, tuple[Row, ...]] = Field(
        default={}, description="of a table of several, on all that each has finished"
    )
    curves: tuple[Curve, ...]
    at_sites: tuple[SiteGain, ...] = ()

    @property
    def best_rival(self) -> str | None:
        """The best rival at the main budget."""
        return self.best_rivals.get(self.main_budget)


def summarise(table: SelectionTable, cells: Sequence[Cell], wanted: int) -> Summary:
    """Summarise finished cells.

    Parameters
    ----------
    table : SelectionTable
        What was asked for.
    cells : sequence of Cell
        What has finished of it.
    wanted : int
        Cells of the whole table.
    """
    finished, cells = cells, _complete(cells, table)
    replicates = selection_replicates([*cells, *preset_cells(cells, table)])
    rows, rivals = rows_of(replicates)
    strategies = [(name, mode) for name, mode, _ in replicates.by_key if name not in CONTROLS]
    curves = [curve_of(n, m, table, replicates) for n, m in dict.fromkeys(strategies)]
    return Summary(
        scenario=table.scenario,
        machine=this_machine(),
        cells=len(finished),
        wanted=wanted,
        seconds=sum(cell.seconds for cell in finished),
        main_budget=table.main_budget,
        best_rivals=rivals,
        preset=choose(cells, table),
        rows=tuple(rows),
        by_classifier=_by_classifier(finished, table),
        curves=tuple(curve for curve in curves if curve is not None),
        at_sites=site_gains(replicates, table.main_budget, rivals.get(table.main_budget)),
    )


def _complete(cells: Sequence[Cell], table: SelectionTable) -> list[Cell]:
    """Cells that every classifier has: a mean over some of them would be another row's."""
    held = Counter(_shared(cell) for cell in cells)
    return [
        cell
        for cell in cells
        if not cell.chain.classifier or held[_shared(cell)] == len(table.classifiers)
    ]


def _shared(cell: Cell) -> tuple[Chain, float]:
    return replace(cell.chain, classifier=""), cell.budget


def _by_classifier(cells: Sequence[Cell], table: SelectionTable) -> dict[str, tuple[Row, ...]]:
    found = {}
    for name in table.classifiers:
        own = [cell for cell in cells if cell.chain.classifier == name]
        found[name] = tuple(rows_of(selection_replicates(own))[0]) if own else ()
    return found
