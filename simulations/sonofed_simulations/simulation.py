"""One simulated study from data to report."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from sonofed_client.settings import read_site
from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.results import PhaseCost, Results, write_results
from sonofed_common.contract.study import Study
from sonofed_common.runtime import Events
from sonofed_simulations.enclaves import enclave_processes
from sonofed_simulations.engines import Enclaves, Engine
from sonofed_simulations.engines.flower import run_flower
from sonofed_simulations.engines.inline import run_inline
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.memory import MemoryWatch
from sonofed_simulations.report.page import build_report
from sonofed_simulations.scenarios.scenario import Scenario
from sonofed_simulations.segmentation_views import segmentation_views
from sonofed_simulations.views import site_views, source_quality, source_view


def simulate(
    scenario: Scenario,
    out: Path,
    data: Path | None,
    engine: Engine,
    seed: int,
    events: Events,
    enclaves: Enclaves = "library",
) -> Results:
    """Run a scenario and write ``results.json`` and ``report.html`` into ``out``.

    Parameters
    ----------
    scenario : Scenario
        What to run.
    out : Path
        Everything is written below it; what is already there and fits is reused.
    data : Path or None
        Folder of the real data sets.
    engine : {"inline", "flower"}
        Where the sites run.
    seed : int
        Seed of the study and of the splits.
    events : Events
        Progress.
    enclaves : {"library", "process"}
        Whether each site's enclave runs inside the engine or as a process of its own, behind its
        socket and without a network.

    Raises
    ------
    SonoFedError
        Bad data, or the study failed.
    """
    laboratory = Laboratory(scenario, out, data, events)
    for name in ("results.json", "report.html"):
        (out / name).unlink(missing_ok=True)
    # Sites first: bad data of a hospital is then met before the source is trained.
    sites = laboratory.prepare_sites(seed)
    bundle = laboratory.prepare_source()
    study = scenario.study.model_copy(update={"seed": seed})
    workspace = laboratory.workspace(study, bundle, out / "study")
    watch = MemoryWatch()
    events.listeners.append(watch.listen)
    try:
        served = enclave_processes(sites) if enclaves == "process" else nullcontext(sites)
        with watch.running(), served as asked:
            if engine == "flower":
                results = run_flower(workspace, asked, events, scenario.threads)
            else:
                results = run_inline(workspace, asked, events)
    finally:
        events.listeners.remove(watch.listen)
    identity = Bundle.open(bundle, check_blobs=False).id
    sites = [path for path in sites if _took_part(results, study, read_site(path).name)]
    place = (scenario, laboratory.source_data, sites, study, identity)
    redrawn = source_quality(*place) if sites and "reconstruct" in study.phases else None
    results = results.model_copy(
        update={
            "phases": _with_memory(results, watch),
            "notes": scenario.notes,
            "source_reconstruction": redrawn,
        }
    )
    write_results(results, out / "results.json")
    events.progress("report", 0, 1)
    views = site_views(workspace, study, identity, sites)
    source = source_view(*place) if views else None
    segmented = [path for path in sites if results.sites[read_site(path).name].segmentation]
    masks = segmentation_views(workspace, study, identity, segmented)
    build_report(results, out, views, source, masks)
    events.progress("report", 1, 1)
    return results


def _took_part(results: Results, study: Study, site: str) -> bool:
    selected = results.sites[site].selected_by_budget or "select" not in study.phases
    return site not in results.missing_sites and bool(selected)


def _with_memory(results: Results, watch: MemoryWatch) -> tuple[PhaseCost, ...]:
    return tuple(
        phase.model_copy(
            update={"peak_memory_bytes": watch.peaks.get(phase.name, phase.peak_memory_bytes)}
        )
        for phase in results.phases
    )
