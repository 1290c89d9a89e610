"""Which images to label: selection strategies side by side (ADAptation's Table 2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.runtime import Events, set_threads
from sonofed_server.source.settings import DiffusionTraining
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import Scenario, read_scenario
from sonofed_simulations.tables.cells import Cell, cell_origin, decode, read_records, run_chain
from sonofed_simulations.tables.features import (
    HospitalImages,
    Start,
    features_origin,
    read_hospitals,
    read_start,
    site_features,
)
from sonofed_simulations.tables.manifest import write_manifest
from sonofed_simulations.tables.request import Made, Request
from sonofed_simulations.tables.selection_page import summary_table, write_page
from sonofed_simulations.tables.selection_summary import Summary, summarise
from sonofed_simulations.tables.settings import QUICK, Chain, SelectionTable, chains

THREADS = 1


def make(request: Request) -> Made:
    """Make the quick form.

    Raises
    ------
    ConfigurationError
        The full form was asked for, or see `run_selection_table`.
    """
    if not request.quick:
        raise ConfigurationError(f"table {request.name} has no full form yet; add --quick")
    summary = run_selection_table(QUICK, request.out, request.data, request.shard, request.events)
    return Made(summary_table(summary), summary.cells, summary.wanted)


def run_selection_table(
    table: SelectionTable, out: Path, data: Path | None, shard: tuple[int, int], events: Events
) -> Summary:
    """Run one shard's cells that are not there yet, and write the table of all finished cells.

    An interruption from the keyboard writes the table of what has finished, too.

    Parameters
    ----------
    table : SelectionTable
        What to compare.
    out : Path
        Gets README.md, table.csv, table.json, budget_curves.svg and manifest.json; ``work/`` holds
        the source, the features and the cells.
    data : Path or None
        Folder of the real data sets.
    shard : tuple of int
        Number of the shard, from 1, and how many there are.
    events : Events
        Progress.

    Raises
    ------
    ConfigurationError
        The shard is out of range.
    DataMissingError
        A data set is not there.
    """
    number, total = shard
    if not 1 <= number <= total:
        raise ConfigurationError(f"shard {number}/{total} does not exist; count from 1 to {total}")
    set_threads(THREADS)
    scenario = _scenario(table)
    laboratory = Laboratory(scenario, out / "work", data, events)
    with laboratory.alone():
        bundle = laboratory.prepare_source()
        hospitals = read_hospitals(laboratory, scenario.source.image_size)
    start = read_start(bundle, scenario.study.classifiers[0])
    everything = list(chains(table))
    # Contiguous shards: a machine extracts the features of few splits.
    first, last = ((n * len(everything)) // total for n in (number - 1, number))
    try:
        _run(everything[first:last], table, laboratory, start, hospitals)
    except KeyboardInterrupt:
        _write(everything, table, laboratory, start, hospitals, out)
        raise
    return _write(everything, table, laboratory, start, hospitals, out)


def _write(
    everything: Sequence[Chain],
    table: SelectionTable,
    laboratory: Laboratory,
    start: Start,
    hospitals: Sequence[HospitalImages],
    out: Path,
) -> Summary:
    cells, wanted = finished(everything, table, laboratory.root, start, hospitals)
    laboratory.events.emit("table", cells=len(cells), wanted=wanted)
    summary = summarise(table, cells, wanted, start.threshold)
    write_page(summary, table, out)
    write_manifest(out, table, laboratory.scenario, start, hospitals, cells)
    return summary


def finished(
    wanted: Sequence[Chain],
    table: SelectionTable,
    root: Path,
    start: Start,
    hospitals: Sequence[HospitalImages],
) -> tuple[list[Cell], int]:
    """Finished cells that still are what the table asks for, and how many it asks for."""
    found: list[Cell] = []
    count = 0
    for chain in wanted:
        features = [features_origin(start, h, table, chain.split) for h in hospitals]
        for budget in chain.budgets:
            count += 1
            origin = cell_origin(chain, budget, table, features)
            records = read_records(root / "cells" / chain.path(budget), origin)
            if records is not None:
                found.append(decode(chain, budget, records))
    return found, count


def _run(
    wanted: Sequence[Chain],
    table: SelectionTable,
    laboratory: Laboratory,
    start: Start,
    hospitals: Sequence[HospitalImages],
) -> None:
    missing = []
    for chain in wanted:
        found, count = finished([chain], table, laboratory.root, start, hospitals)
        if len(found) < count:
            missing.append(chain)
    done = len(wanted) - len(missing)
    for split, group in groupby(missing, key=lambda chain: chain.split):
        folder = laboratory.root / "features" / str(split)
        # Another shard may be extracting the same ones.
        with laboratory.alone():
            sites = [
                site_features(
                    start, h, table, split, folder / f"{h.name}.safetensors", laboratory.events
                )
                for h in hospitals
            ]
        origins = [features_origin(start, h, table, split) for h in hospitals]
        for chain in group:
            run_chain(chain, table, start, sites, origins, laboratory.root / "cells")
            done += 1
            laboratory.events.progress(
                "chains", done, len(wanted), strategy=chain.strategy, split=str(split)
            )


def _scenario(table: SelectionTable) -> Scenario:
    """The table's scenario, without what its cells have no use for."""
    scenario = read_scenario(table.scenario)
    source = scenario.source.model_copy(
        update={"threads": THREADS, "diffusion": DiffusionTraining(kind="none"), "synthetic": None}
    )
    return scenario.model_copy(update={"threads": THREADS, "source": source})
