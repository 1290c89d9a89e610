"""Rows of the page's tables, from results and views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sonofed_common.contract.results import (
    METRICS,
    STAGES,
    Estimate,
    Results,
    Stage,
    compared_sites,
    estimate,
    gain,
    mean_over_sites,
    site_estimate,
    worst_site,
)
from sonofed_simulations.report.clouds import similarity, similarity_row
from sonofed_simulations.report.format import decimal
from sonofed_simulations.report.view import SiteView, SourceView

PHASES = {
    "enrol": "Ask each hospital whether it is there, and with what",
    "ship": "Send the source-trained weights",
    "reconstruct": "Redraw each image in the source's style, on site",
    "embed": "Learn to place images on a sphere, together",
    "cluster": "Find the groups on the sphere, from sums only",
    "select": "Agree which images are worth an expert's time",
    "annotate": "Wait for the labels",
    "synthesise": "Share images that each hospital's own GANs drew, behind a gate",
    "classifier": "Fine-tune the classifiers, and test them on site",
    "pretrain": "Learn from each hospital's unlabelled images, together",
    "supervise": "Train a segmenter on the source's masks, from what was learnt",
    "pseudo_label": "Adapt the segmenters on their own predictions, on site",
    "ensemble": "Learn how far to trust each segmenter",
    "evaluate": "Test the segmenters, on site",
    "publish": "Sign the adapted weights and send them out",
}

SHORT_NAMES: dict[Stage, str] = {
    "source": "source",
    "bn_adapted": "re-normalised",
    "adapted": "adapted",
}

MEASURES = {
    "auroc": "AUROC",
    "balanced_accuracy": "Balanced accuracy",
    "accuracy": "Accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "sensitivity_at_specificity_90": "Sensitivity at 90% specificity",
    "ece": "Calibration error",
    "brier": "Brier score",
}


@dataclass(frozen=True)
class Comparison:
    """AUROC of one row before and after; gains over the source and over the control."""

    name: str
    kind: str
    test_images: int | None
    labels: int | None
    source: Estimate | None
    bn_adapted: Estimate | None
    adapted: Estimate | None

    @property
    def gain(self) -> Estimate | None:
        """Adapted over source."""
        return gain(self.source, self.adapted)

    @property
    def gain_over_control(self) -> Estimate | None:
        """Adapted over re-normalised."""
        return gain(self.bn_adapted, self.adapted)


def comparisons(results: Results) -> Iterator[Comparison]:
    """Rows of the first table: sites, then their mean and the worst of them."""
    for name, site in results.sites.items():
        if site.classifiers:
            estimates = [site_estimate(site, stage) for stage in STAGES]
            yield Comparison(name, "site", site.test_images, site.labelled, *estimates)
    if len(compared_sites(results)) > 1:
        means = [mean_over_sites(results, stage) for stage in STAGES]
        yield Comparison("Mean of the hospitals", "mean", None, None, *means)
        worst = [worst_site(results, stage) for stage in STAGES]
        estimates = [None if found is None else found[1] for found in worst]
        yield Comparison("Worst hospital at each step", "worst", None, None, *estimates)


def classifier_rows(results: Results) -> Iterator[Comparison]:
    """One row for each classifier at each site."""
    for site_name, site in results.sites.items():
        for name, found in site.classifiers.items():
            stages = [estimate(found.source), estimate(found.bn_adapted), estimate(found.adapted)]
            yield Comparison(name, site_name, site.test_images, site.labelled, *stages)


def measure_rows(results: Results) -> Iterator[tuple[str, str, list[Estimate | None]]]:
    """Site, stage and every measure."""
    for name, site in results.sites.items():
        for stage in STAGES:
            found = [site_estimate(site, stage, metric) for metric in measures(results)]
            if any(found):
                yield name, SHORT_NAMES[stage], found


def measures(results: Results) -> list[str]:
    """Measures that some site reports, in the page's order."""
    stages: tuple[Stage, ...] = STAGES
    return [
        metric
        for metric in MEASURES
        if metric in METRICS
        and any(site_estimate(s, stage, metric) for s in results.sites.values() for stage in stages)
    ]


def phase_rows(results: Results) -> list[dict[str, Any]]:
    """Phases with their share of the longest time and of the highest memory, percent."""
    longest = max((p.seconds for p in results.phases), default=0) or 1
    highest = max((p.peak_memory_bytes or 0 for p in results.phases), default=0) or 1
    return [
        {
            "cost": phase,
            "words": PHASES.get(phase.name, ""),
            "time_share": round(100 * phase.seconds / longest, 1),
            "memory_share": round(100 * (phase.peak_memory_bytes or 0) / highest, 1),
        }
        for phase in results.phases
    ]


def setting_rows(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings as sections of name and value."""
    loose = [(k, _plain(v)) for k, v in results.settings.items() if not isinstance(v, dict)]
    sections = [
        (name, [(k, _plain(v)) for k, v in values.items()])
        for name, values in results.settings.items()
        if isinstance(values, dict)
    ]
    return ([("study", loose)] if loose else []) + sections


def composition_rows(sites: Sequence[SiteView]) -> list[dict[str, Any]]:
    """Share of malignant images in the pool and among the chosen, where labels are known."""
    rows = []
    for view in sites:
        if view.labels is None or not view.selected.any():
            continue
        malignant = view.labels == 1
        rows.append(
            {
                "name": view.name,
                "pool": int(malignant.sum()),
                "pool_size": len(malignant),
                "pool_share": float(malignant.mean()),
                "chosen": int(malignant[view.selected].sum()),
                "chosen_size": int(view.selected.sum()),
                "chosen_share": float(malignant[view.selected].mean()),
            }
        )
    return rows


def similarity_rows(sites: Sequence[SiteView], source: SourceView) -> list[dict[str, Any]]:
    """Similarity to the source before and after reconstruction (ADAptation, Table 1)."""
    own = similarity(source.features, source)
    rows: list[dict[str, Any]] = [
        {"name": "Source itself", "before": similarity_row(own, own), "after": None}
    ]
    for view in sites:
        redrawn = view.reconstruction_features
        after = None if redrawn is None else similarity_row(similarity(redrawn, source), own)
        before = similarity_row(similarity(view.features, source), own)
        rows.append({"name": view.name, "before": before, "after": after})
    return rows


def similarity_sentence(rows: Sequence[dict[str, Any]]) -> str:
    """Say at how many sites reconstruction brought the images nearer to the source."""
    redrawn = [row for row in rows if row["after"] is not None]
    nearer = sum(row["after"]["distance"] < row["before"]["distance"] for row in redrawn)
    where = f"{nearer} of {len(redrawn)} hospitals" if len(redrawn) > 1 else redrawn[0]["name"]
    if nearer == 0:
        return "Redrawing brought the images nearer to the source at no hospital."
    mean = [np.mean([row[key]["distance"] for row in redrawn]) for key in ("before", "after")]
    return (
        f"Redrawing brought the images nearer to the source at {where}: the mean distance went "
        f"from {decimal(float(mean[0]), 3)} to {decimal(float(mean[1]), 3)}."
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not set"}[value]
    return str(value)
