"""What a row of a selection table is of, and by what it is measured."""

from __future__ import annotations

from collections.abc import Iterable

from sonofed_simulations.tables.cells import Cell
from sonofed_simulations.tables.replicates import Replicates
from sonofed_simulations.tables.settings import Mode, SplitName

METRICS = ("accuracy", "auroc")
NAMES = {"accuracy": "accuracy", "auroc": "AUROC"}
Key = tuple[str, Mode, float]
"""Strategy, mode and budget."""
SelectionReplicates = Replicates[Key, SplitName, Cell]


def selection_replicates(cells: Iterable[Cell]) -> SelectionReplicates:
    """Gather finished cells by key and split: several of Random, one a draw."""
    found: dict[Key, dict[SplitName, list[Cell]]] = {}
    for cell in cells:
        splits = found.setdefault((cell.chain.strategy, cell.chain.mode, cell.budget), {})
        splits.setdefault(cell.chain.split, []).append(cell)
    return Replicates(found, METRICS)
