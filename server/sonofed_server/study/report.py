"""The results of a study, assembled from its state."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

from sonofed_common.contract.results import (
    ClassifierResults,
    CurvePoint,
    Machine,
    PhaseCost,
    ReconstructionQuality,
    Results,
    SiteResults,
)
from sonofed_server.study.run import StudyRun


def study_results(run: StudyRun) -> Results:
    """Assemble what the study has found so far."""
    facts = run.state.facts
    sites = site_results(run)
    return Results(
        study=run.study.name,
        study_digest=run.study.digest(),
        seed=run.study.seed,
        engine=str(facts.get("engine", "deployment")),
        machine=this_machine(),
        started=str(facts["started"]),
        seconds=sum(phase["seconds"] for phase in facts["phases"]),
        phases=tuple(PhaseCost.model_validate(phase) for phase in facts["phases"]),
        budgets=run.study.selection.budgets,
        sites=sites,
        clusters=tuple(facts.get("clusters", ())),
        converged=facts.get("converged"),
        missing_sites=tuple(name for name, site in sites.items() if site.missing_reason),
        settings=run.study.model_dump(mode="json"),
    )


def site_results(run: StudyRun) -> dict[str, SiteResults]:
    """Results of each site of the cohort, in the cohort's order."""
    return {site: _site(run, run.site_facts(site)) for site in run.study.cohort.sites}


def _site(run: StudyRun, facts: dict[str, Any]) -> SiteResults:
    selected = facts.get("selected", [])
    # Of a study that ends with the experts' work, what they did.
    labels = facts.get("labels", {"": facts.get("labelled", 0)})
    quality = facts.get("reconstruction")
    return SiteResults(
        images=facts.get("images", 0),
        test_images=facts.get("test_images", 0),
        selected=selected[-1] if selected else 0,
        labelled=list(labels.values())[-1],
        selected_by_budget=tuple(selected),
        synthetic=facts.get("synthetic"),
        classifiers={
            name: _classifier(run, name, stages, labels)
            for name, stages in facts.get("classifiers", {}).items()
        },
        test_masks=facts.get("test_masks", 0),
        segmentation={
            stage: _measures(metrics) for stage, metrics in facts.get("segmentation", {}).items()
        },
        reconstruction=ReconstructionQuality.model_validate(quality) if quality else None,
        missing_reason=facts.get("missing"),
    )


def _classifier(
    run: StudyRun, name: str, stages: dict[str, Any], labels: dict[str, int]
) -> ClassifierResults:
    budgets = run.study.selection.budgets
    curve = [
        CurvePoint(
            budget=share, labels=labels[str(n)], metrics=_measures(stages[f"{name}, budget {n}"])
        )
        for n, share in enumerate(budgets)
        if f"{name}, budget {n}" in stages and str(n) in labels
    ]
    return ClassifierResults(
        source=_measures(stages["source"]),
        bn_adapted=_measures(stages["bn_adapted"]) if "bn_adapted" in stages else None,
        adapted=curve[-1].metrics if len(curve) == len(budgets) else None,
        curve=tuple(curve),
    )


def _measures(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name not in ("images", "loss")}


def this_machine() -> Machine:
    """Describe the machine that this process runs on."""
    return Machine(
        python=platform.python_version(),
        torch=version("torch"),
        flwr=version("flwr"),
        cpu=_processor(),
        cores=os.cpu_count() or 1,
        device=_device(),
    )


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
