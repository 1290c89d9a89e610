"""Which images to label: selection strategies side by side (ADAptation's Table 2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from sonofed_common.models.classifiers import TWO_VIEWS
from sonofed_common.runtime import Events, set_threads
from sonofed_server.source.settings import DiffusionTraining
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import Scenario, read_scenario
from sonofed_simulations.tables.cells import Cell, cell_origin, decode, run_chain
from sonofed_simulations.tables.manifest import write_manifest
from sonofed_simulations.tables.material import Material
from sonofed_simulations.tables.records import read_records
from sonofed_simulations.tables.request import Made, Request, part_of
from sonofed_simulations.tables.selection_page import write_page
from sonofed_simulations.tables.selection_summary import Summary, summarise
from sonofed_simulations.tables.selection_tables import summary_table
from sonofed_simulations.tables.settings import FULL, QUICK, Chain, SelectionTable, chains

THREADS = 1


def make(request: Request) -> Made:
    """Make the table; see `run_selection_table`."""
    table = QUICK if request.quick else FULL
    summary = run_selection_table(table, request.out, request.data, request.shard, request.events)
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
        Gets README.md, table.csv, table.json, budget_curves.svg, manifest.json and splits.csv;
        ``work/`` holds the source, the features and the cells.
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
    part_of((), shard)
    set_threads(THREADS)
    scenario = _scenario(table)
    material = Material.prepare(table, Laboratory(scenario, out / "work", data, events))
    everything = list(chains(table))
    # Shards share few splits, whose features each machine extracts.
    by_split = sorted(everything, key=lambda chain: chain.split)
    own = set(part_of(by_split, shard))
    try:
        _run([chain for chain in everything if chain in own], material)
    except KeyboardInterrupt:
        _write(everything, material, out)
        raise
    return _write(everything, material, out)


def _write(everything: Sequence[Chain], material: Material, out: Path) -> Summary:
    cells, wanted = finished(everything, material)
    material.laboratory.events.emit("table", cells=len(cells), wanted=wanted)
    summary = summarise(material.table, cells, wanted)
    write_page(summary, material.table, out)
    write_manifest(out, material, cells)
    return summary


def finished(wanted: Sequence[Chain], material: Material) -> tuple[list[Cell], int]:
    """Finished cells that still are what the table asks for, and how many it asks for."""
    found: list[Cell] = []
    count = 0
    for chain in wanted:
        start, features = material.start(chain), material.origins(chain)
        for budget in chain.budgets:
            count += 1
            origin = cell_origin(chain, budget, material.table, start.begin, features)
            records = read_records(material.cells / chain.path(budget), origin)
            if records is not None:
                found.append(decode(chain, budget, records, start.threshold))
    return found, count


def _run(wanted: Sequence[Chain], material: Material) -> None:
    missing = []
    for chain in wanted:
        found, count = finished([chain], material)
        if len(found) < count:
            missing.append(chain)
    done = len(wanted) - len(missing)
    for (split, name), group in groupby(missing, key=lambda c: (c.split, material.start(c).name)):
        start = material.starts[name]
        sites, begin = material.sites(split, start), start.begin
        for chain in group:
            run_chain(chain, material.table, begin, sites, material.origins(chain), material.cells)
            done += 1
            material.laboratory.events.progress(
                "chains", done, len(wanted), strategy=chain.strategy, split=str(split)
            )


def _scenario(table: SelectionTable) -> Scenario:
    """The table's scenario with the models that its cells start from, and no others."""
    scenario = read_scenario(table.scenario)
    first = scenario.study.classifiers[0]
    two_views = (f"{first}{TWO_VIEWS}",) if table.lesions is not None else ()
    training = scenario.source.training
    source = scenario.source.model_copy(
        update={
            "threads": THREADS,
            "classifiers": (*(table.classifiers or (first,)), *two_views),
            "training": training.model_copy(update={"epochs": table.epochs or training.epochs}),
            "segmentation": table.lesions,
            "diffusion": DiffusionTraining(kind="none"),
            "synthetic": None,
        }
    )
    return scenario.model_copy(update={"threads": THREADS, "source": source})
