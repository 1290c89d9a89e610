"""The researcher's command, ``sonofed-lab``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sonofed_common.cli import application
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.progress import progress_listener
from sonofed_common.runtime import Events
from sonofed_simulations.engines import Enclaves, Engine
from sonofed_simulations.scenarios.scenario import built_in, read_scenario
from sonofed_simulations.tables import TABLES, maker

PLAIN_WIDTH = 110
"""Columns of a table that goes to a file or a log."""

app = application("Simulate federated ultrasound studies on one machine.")

Out = Annotated[Path, typer.Option("--out", help="Folder for everything the run writes.")]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of the real data sets.")]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Of the study and of the splits; default: the scenario's."),
]
EngineOption = Annotated[
    Engine,
    typer.Option("--engine", help="flower: Flower's simulation on Ray; inline: this process."),
]
EnclavesOption = Annotated[
    Enclaves,
    typer.Option(
        "--enclaves",
        help="process: each hospital's enclave is a process of its own, without a network; "
        "library: it runs inside the engine.",
    ),
]


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    engine: EngineOption = "flower",
    seed: Seed = None,
    enclaves: EnclavesOption = "library",
) -> None:
    """Run the phantom study: one source, three hospitals, every phase."""
    _run("demo", None, out, engine, seed, enclaves)


@app.command()
def run(
    scenario: Annotated[str, typer.Argument(help="Name of a built-in scenario, or a TOML file.")],
    out: Out,
    data: Data = None,
    engine: EngineOption = "inline",
    seed: Seed = None,
    enclaves: EnclavesOption = "library",
) -> None:
    """Run one scenario from data to report."""
    _run(scenario, data, out, engine, seed, enclaves)


@app.command()
def compare(
    comparison: Annotated[
        str, typer.Argument(help="Name of a built-in comparison, or a TOML file.")
    ],
    out: Out,
    data: Data = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Only these seeds.")] = None,
) -> None:
    """Run the variants of a comparison cell by cell, and summarise every finished cell."""
    from sonofed_common.contract.configuration import read_toml
    from sonofed_simulations.comparison import built_in as comparisons

    path = comparisons().get(comparison, Path(comparison))
    if not path.exists():
        raise ConfigurationError(
            f"there is no comparison {comparison!r}; give a TOML file, or one of "
            f"{', '.join(comparisons())}"
        )
    if "rows" in read_toml(path):
        table = _compare_segmentation(path, out, data, seed)
    else:
        table = _compare_selection(path, out, data, seed)
    _console().print(table)
    _console().print(f"summary: {out / 'comparison.md'}")


@app.command(name="table")
def table_(
    name: Annotated[str, typer.Argument(help=f"Table of the literature: {', '.join(TABLES)}.")],
    out: Out,
    data: Data = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The form for a CPU: fewer pixels, steps or layers.")
    ] = False,
    shard: Annotated[
        str, typer.Option("--shard", metavar="I/N", help="Only this part of the cells, from 1.")
    ] = "1/1",
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Cells that run at once, each on one CPU, by Ray."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Run on this Ray cluster, on --workers of its CPUs or on all.",
        ),
    ] = None,
) -> None:
    """Make a table of the literature anew, cell by cell, and write all that has finished."""
    from sonofed_simulations.tables.archive import pack, unpack
    from sonofed_simulations.tables.request import Request
    from sonofed_simulations.tables.workers import make_on_ray

    if name not in TABLES:
        raise ConfigurationError(f"there is no table {name!r}; choose one of {', '.join(TABLES)}")
    if not re.fullmatch(r"\d{1,4}/\d{1,4}", shard):
        raise ConfigurationError(f"'{shard}' is no shard; write it as 1/4, the first of four")
    number, total = map(int, shard.split("/"))
    spread = workers is not None or ray is not None
    if spread and total > 1:
        raise ConfigurationError("--shard is for machines without Ray; leave it out")
    with progress_listener() as listener:
        events = Events(listeners=[listener])
        request = Request(name, quick, out, data, (number, total), events)
        request.check()
        unpack(out)
        try:
            make = maker(name)
            made = make_on_ray(make, request, workers, ray) if spread else make(request)
        finally:
            pack(out, name)
    _console().print(made.table)
    _console().print(f"{made.cells} of {made.wanted} cells; page: {out / 'README.md'}")


@app.command()
def page(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, in this order.")],
    out: Annotated[Path, typer.Option("--out", help="The page, FILE.md; numbers go to FILE.json.")],
) -> None:
    """Set finished runs of segmentation side by side: a page of Markdown and its numbers."""
    from sonofed_common.contract.results import read_results
    from sonofed_simulations.report.outlines import write_outlines

    write_outlines([read_results(run / "results.json") for run in runs], out)
    _console().print(f"page: {out}\nnumbers: {out.with_suffix('.json')}")


@app.command()
def prepare(
    scenario: Annotated[str, typer.Argument(help="Name of a built-in scenario, or a TOML file.")],
    out: Out,
) -> None:
    """Write what a deployment on this machine starts from: settings, and phantoms as images."""
    from sonofed_simulations.deployment import prepare as prepare_deployment
    from sonofed_simulations.laboratory import Laboratory

    with progress_listener() as listener:
        events = Events(listeners=[listener])
        prepare_deployment(Laboratory(read_scenario(scenario), out, None, events))
    _console().print(f"settings and images: {out}")


@app.command()
def scenarios() -> None:
    """List the built-in scenarios."""
    table = Table("name", "hospitals", "what it is", box=None)
    for name in built_in():
        scenario = read_scenario(name)
        table.add_row(name, str(len(scenario.hospitals)), scenario.title)
    _console().print(table)


def _compare_selection(path: Path, out: Path, data: Path | None, seeds: list[int] | None) -> Table:
    from sonofed_simulations.comparison import finished_cells, read_comparison, run_comparison
    from sonofed_simulations.comparison_summary import summarise, summary_table, write_summary

    chosen, scenario = read_comparison(path)
    with progress_listener() as listener:
        events = Events(listeners=[listener])
        run_comparison(chosen, scenario, out, data, tuple(seeds or chosen.seeds), events)
    cells, left_out = finished_cells(chosen, scenario, out, data)
    if left_out:
        _console().print(f"left out, of other settings or images: {', '.join(left_out)}")
    summary = summarise(chosen, cells)
    write_summary(summary, out)
    return summary_table(summary)


def _compare_segmentation(
    path: Path, out: Path, data: Path | None, seeds: list[int] | None
) -> Table:
    from sonofed_server.study.report import this_machine
    from sonofed_simulations.segmentation_comparison import (
        finished_scores,
        read_mask_comparison,
        run_mask_comparison,
    )
    from sonofed_simulations.segmentation_summary import summarise_masks
    from sonofed_simulations.segmentation_tables import mask_table, write_mask_summary

    chosen, scenario = read_mask_comparison(path)
    with progress_listener() as listener:
        events = Events(listeners=[listener])
        run_mask_comparison(chosen, scenario, out, data, tuple(seeds or chosen.seeds), events)
        scores = finished_scores(chosen, scenario, out, events)
    summary = summarise_masks(chosen, scores, this_machine())
    write_mask_summary(summary, out)
    return mask_table(summary)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def _run(
    name: str, data: Path | None, out: Path, engine: Engine, seed: int | None, enclaves: Enclaves
) -> None:
    from sonofed_simulations.report.table import tabulate
    from sonofed_simulations.simulation import simulate

    scenario = read_scenario(name)
    seed = scenario.study.seed if seed is None else seed
    with progress_listener() as listener:
        events = Events(listeners=[listener])
        results = simulate(scenario, out, data, engine, seed, events, enclaves)
    _console().print(tabulate(results))
    _console().print(f"report: {out / 'report.html'}\nresults: {out / 'results.json'}")
