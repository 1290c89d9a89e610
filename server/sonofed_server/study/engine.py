"""The study engine: runs the phases in order, saves after every round, and always ends readably."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import httpx
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import RunNotRunningException
from structlog.contextvars import bind_contextvars, bound_contextvars, unbind_contextvars

from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.errors import ConfigurationError, EngineError, SonoFedError
from sonofed_common.contract.results import PhaseCost, Results, write_results
from sonofed_common.contract.study import Phase, read_study
from sonofed_common.log import log_event
from sonofed_common.runtime import Events
from sonofed_common.security import load_signing_key, public_hex
from sonofed_server.phases.annotate import annotate
from sonofed_server.phases.classifier import classifier
from sonofed_server.phases.cluster import cluster
from sonofed_server.phases.embed import embed
from sonofed_server.phases.enrol import enrol
from sonofed_server.phases.ensemble import ensemble
from sonofed_server.phases.evaluate import evaluate
from sonofed_server.phases.pretrain import pretrain
from sonofed_server.phases.pseudo_label import pseudo_label
from sonofed_server.phases.publish import publish
from sonofed_server.phases.reconstruct import reconstruct
from sonofed_server.phases.select import select
from sonofed_server.phases.ship import ship
from sonofed_server.phases.supervise import supervise
from sonofed_server.phases.synthesise import synthesise
from sonofed_server.study.cost import PhaseMeter
from sonofed_server.study.exchange import Exchange
from sonofed_server.study.failure import Failure, write_failure
from sonofed_server.study.report import study_results
from sonofed_server.study.run import StudyRun
from sonofed_server.study.workspace import StudyState, Workspace, identity_of

INTERNAL = "the coordinator met an error of its own; see its log, and run the study again to go on"
CUT_OFF = "the SuperLink was lost or gave the run up; the study goes on when it is back"

CUTS = (httpx.HTTPError, ObjectPushError, RunNotRunningException)
"""What Flower raises then; the last is no `Exception`."""

PHASES: dict[Phase, Callable[[StudyRun], None]] = {
    "enrol": enrol,
    "ship": ship,
    "reconstruct": reconstruct,
    "embed": embed,
    "cluster": cluster,
    "select": select,
    "annotate": annotate,
    "synthesise": synthesise,
    "classifier": classifier,
    "pretrain": pretrain,
    "supervise": supervise,
    "pseudo_label": pseudo_label,
    "ensemble": ensemble,
    "evaluate": evaluate,
    "publish": publish,
}


def run_study(
    workspace: Workspace, grid: Grid, engine: str = "deployment", events: Events | None = None
) -> Results:
    """Run a study to its end, from its last checkpoint if it has one.

    Parameters
    ----------
    workspace : Workspace
        Holds the study file, the bundle and the coordinator's key.
    grid : Grid
        Flower's way to the nodes.
    engine : str
        What runs the nodes, for the results.
    events : Events, optional
        Default: the workspace's event file.

    Raises
    ------
    SonoFedError
        The study failed; the reason also stands in the workspace's ``failure.json``.
    """
    events = events or Events(workspace.events, [log_event])
    workspace.failure.unlink(missing_ok=True)
    workspace.results.unlink(missing_ok=True)
    try:
        results = _run(workspace, grid, engine, events)
    except (Exception, RunNotRunningException) as error:
        if isinstance(error, CUTS):
            error = EngineError(CUT_OFF)
        # The text of an error that is not of the catalogue may hold anything; it stays in the log.
        message = error.message if isinstance(error, SonoFedError) else INTERNAL
        code = error.code if isinstance(error, SonoFedError) else SonoFedError.code
        write_failure(workspace, Failure(error=code, message=message))
        events.emit("study-failed", error=code, message=message)
        raise error
    else:
        events.emit("study-completed", seconds=round(results.seconds, 1))
        return results
    finally:
        unbind_contextvars("study")


def _run(workspace: Workspace, grid: Grid, engine: str, events: Events) -> Results:
    study = read_study(workspace.study)
    bind_contextvars(study=study.name)
    key = load_signing_key(workspace.key)
    bundle = Bundle.open(workspace.bundle, public_hex(key))
    state = StudyState.load(workspace.checkpoint, identity_of(study, bundle.id))
    if workspace.checkpoint.exists() and not state.facts:
        raise ConfigurationError(
            f"study {study.name} began with another bundle or study file; put back what it began "
            "with, or choose another name for a study with these"
        )
    state.facts.setdefault("started", datetime.now(UTC).isoformat(timespec="seconds"))
    state.facts.setdefault("phases", [])
    state.facts["engine"] = engine
    exchange = Exchange(grid, study.cohort, events)
    run = StudyRun(study, workspace, bundle, exchange, state, events)
    for phase in study.phases:
        # Nodes are known to this process alone, so enrolment is repeated by a resumed study.
        if phase in state.done and phase != "enrol":
            continue
        with bound_contextvars(phase=phase):
            _run_phase(run, phase)
    results = study_results(run)
    write_results(results, workspace.results)
    return results


def _run_phase(run: StudyRun, phase: Phase) -> None:
    run.meter = PhaseMeter(_cost_before(run, phase), run.exchange.traffic)
    run.events.emit("phase-started", phase=phase)
    if phase not in run.state.done:
        run.exchange.go_on(run.state.missing, run.state.forgiven)
    try:
        PHASES[phase](run)
    except SonoFedError:
        # A repeated enrolment that fails says nothing of the interrupted phase.
        if phase not in run.state.done:
            run.forget_missing()
        raise
    failed = run.exchange.failed()
    for site, reason in failed.items():
        run.site_facts(site)["missing"] = f"{phase}: {reason}"
    # A repeated enrolment leaves alone where the interrupted phase stands, and is no progress.
    if phase not in run.state.done:
        # Who only receives the final bundle has not come back to the study.
        for site in run.exchange.sites() if phase != "publish" else ():
            if site not in failed:
                run.site_facts(site).pop("missing", None)
        run.state.done.append(phase)
        run.state.position = {}
        run.exchange.new_phase()
        run.save()
    run.events.emit("phase-finished", phase=phase, seconds=run.meter.read().seconds)


def _cost_before(run: StudyRun, phase: Phase) -> PhaseCost:
    kept = {cost["name"]: cost for cost in run.state.facts["phases"]}
    # An enrolment that is repeated is measured by itself.
    if phase in kept and phase not in run.state.done:
        return PhaseCost.model_validate(kept[phase])
    return PhaseCost(name=phase, seconds=0.0)
