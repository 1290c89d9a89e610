"""The selection table from another source, so that BUSI is a hospital that is judged, too."""

from __future__ import annotations

from sonofed_simulations.tables.adaptation_selection import run_selection_table
from sonofed_simulations.tables.request import Made, Request
from sonofed_simulations.tables.selection_tables import summary_table
from sonofed_simulations.tables.settings import FULL_FROM_RIO, QUICK_FROM_RIO


def make(request: Request) -> Made:
    """Make the table; see `run_selection_table`."""
    table = QUICK_FROM_RIO if request.quick else FULL_FROM_RIO
    summary = run_selection_table(table, request.out, request.data, request.shard, request.events)
    return Made(summary_table(summary), summary.cells, summary.wanted)
