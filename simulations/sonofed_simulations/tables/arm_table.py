"""A table of arms from its cells to its page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sonofed_common.runtime import Events, set_threads
from sonofed_simulations.tables.arm_page import About, summary_table, write_page
from sonofed_simulations.tables.arm_summary import ArmSummary, summarise_arms
from sonofed_simulations.tables.arms import Experiment, finished_arms, refused_arms, run_arms
from sonofed_simulations.tables.manifest import Tested, write_facts
from sonofed_simulations.tables.request import Made, Request


class ArmTable(Experiment, Protocol):
    """What one file gives for its table."""

    @property
    def about(self) -> About:
        """What the page says beside the numbers."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """For the manifest: data digests and settings, as JSON values."""
        ...

    def tested(self) -> Tested:
        """Patients of the test images of every seed, for the manifest."""
        ...


def make_arm_table(table: ArmTable, request: Request) -> Made:
    """Run one shard's cells that are not there yet, and write the page of all finished cells.

    Parameters
    ----------
    table : ArmTable
        What to compare.
    request : Request
        ``out`` gets README.md, table.csv, table.json, differences.svg, manifest.json, splits.csv
        and, in ``work/cells``, the cells.

    Raises
    ------
    ConfigurationError
        The shard is out of range.

    Notes
    -----
    An interruption from the keyboard writes the page of what has finished, too. The quick form
    runs on one thread, so that its numbers do not depend on the machine's cores.
    """
    set_threads(1 if request.quick else None)
    try:
        run_arms(table, request.out / "work" / "cells", request.shard, request.events)
    except KeyboardInterrupt:
        _write(table, request.out, request.events)
        raise
    summary = _write(table, request.out, request.events)
    return Made(summary_table(summary, table.about), summary.cells, summary.wanted)


def _write(table: ArmTable, out: Path, events: Events) -> ArmSummary:
    cells = list(finished_arms(table, out / "work" / "cells"))
    refused = tuple(refused_arms(table, out / "work" / "cells"))
    summary = summarise_arms(table.arms, table.seeds, cells, refused)
    events.emit("table", cells=summary.cells, wanted=summary.wanted)
    write_page(summary, table.about, out)
    counts = {"seeds": list(table.seeds), "cells": summary.cells, "wanted": summary.wanted}
    write_facts(out, {**table.facts(), **counts}, table.tested())
    return summary
