"""The report: one page of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sonofed_common.contract.results import Results
from sonofed_common.runtime import write_atomically
from sonofed_simulations.report import clouds, figures, format, pictures, projections, rows
from sonofed_simulations.report.mask_parts import mask_parts
from sonofed_simulations.report.segmentation import classifies, segments
from sonofed_simulations.report.segmentation_summary import mask_headline
from sonofed_simulations.report.summary import (
    explanation,
    headline,
    labels_and_images,
    missing,
)
from sonofed_simulations.report.view import (
    ScoredView,
    SegmentationView,
    SiteView,
    SourceView,
)

HERE = Path(__file__).parent
SECTIONS = {
    "before-after": "Before and after",
    "labels": "Labels and accuracy",
    "chosen": "Chosen images",
    "redrawn": "Redrawn images",
    "segmentation": "Segmentation",
    "run": "How it ran",
    "limits": "What this shows",
}
TEMPLATES = {
    "before-after": "classification.html.j2",
    "chosen": "selection.html.j2",
    "redrawn": "reconstruction.html.j2",
    "segmentation": "segmentation.html.j2",
}


def build_report(
    results: Results,
    out: Path,
    sites: Sequence[SiteView] = (),
    source: SourceView | None = None,
    segmentation_views: Sequence[SegmentationView] = (),
) -> Path:
    """Write a study's report.

    Parameters
    ----------
    results : Results
        What the study found.
    out : Path
        Folder to write ``report.html`` to.
    sites : sequence of SiteView
        What a simulation can show; empty in a deployment, where pictures stay in the hospitals.
    source : SourceView or None
        The source's features.
    segmentation_views : sequence of SegmentationView
        Test images with their masks; empty in a deployment.

    Returns
    -------
    Path
        The page: one file, every picture inside it, no script.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        decimal=format.decimal,
        signed=format.signed,
        interval=format.interval,
        size=format.size,
        duration=format.duration,
        count=format.count,
        thousands=format.thousands,
    )
    text = environment.get_template("template.html.j2").render(
        results=results,
        style=(HERE / "style.css").read_text(encoding="utf-8"),
        classifies=classifies(results),
        masks=mask_parts(results, segmentation_views) if segments(results) else None,
        **_contents(results, sites),
        **_numbers(results),
        **_views([view for view in sites if len(view.images)], source, results.seed),
    )
    path = out / "report.html"
    write_atomically(path, text.encode())
    return path


def _contents(results: Results, views: Sequence[SiteView]) -> dict[str, Any]:
    anchors = ["segmentation"] if segments(results) else []
    if classifies(results):
        anchors += ["before-after", "labels", "chosen"]
    if views or any(site.selected_by_budget for site in results.sites.values()):
        anchors.append("chosen")
    if any(site.reconstruction for site in results.sites.values()):
        anchors.append("redrawn")
    sections = [(a, t) for a, t in SECTIONS.items() if a in (*anchors, "run", "limits")]
    return {
        "sections": sections,
        "numbers": {anchor: number for number, (anchor, _) in enumerate(sections, 1)},
        "templates": [TEMPLATES[anchor] for anchor, _ in sections if anchor in TEMPLATES],
    }


def _numbers(results: Results) -> dict[str, Any]:
    given = results.settings.get("selection")
    selection = given if isinstance(given, dict) else {}
    labels, images = labels_and_images(results)
    classifiers = sorted({name for site in results.sites.values() for name in site.classifiers})
    return {
        "headline": headline(results) if classifies(results) else mask_headline(results),
        "explanation": explanation(results) if classifies(results) else missing(results),
        "labels": labels,
        "images": images,
        "classifiers": classifiers,
        "comparisons": list(rows.comparisons(results)),
        "classifier_rows": list(rows.classifier_rows(results)) if len(classifiers) > 1 else [],
        "measures": [rows.MEASURES[name] for name in rows.measures(results)],
        "measure_rows": list(rows.measure_rows(results)),
        "phases": rows.phase_rows(results),
        "settings": rows.setting_rows(results),
        "strategy": selection.get("strategy", "dual_score"),
        "scope": selection.get("scope", "global"),
        "steps": results.settings.get("phases", ()),
        "before_after": figures.before_after(results),
        "budget_curve": figures.budget_curve(results),
    }


def _views(sites: Sequence[SiteView], source: SourceView | None, seed: int) -> dict[str, Any]:
    shown: dict[str, Any] = dict.fromkeys(("scores", "sphere", "tsne", "densities"))
    shown.update(sheets=[], composition=[], similarity=[], similarity_sentence="", variance=0.0)
    if not sites:
        return shown
    count, columns = pictures.tiles(sites)
    shown["sheets"] = [
        {
            "name": view.name,
            "chosen": pictures.chosen(view, count, columns),
            "left": pictures.left(view, count, columns),
            "redrawn": pictures.reconstructions(view, 2 * columns),
        }
        for view in sites
    ]
    shown["composition"] = rows.composition_rows(sites)
    if scored := [view for view in sites if isinstance(view, ScoredView)]:
        shown["scores"] = clouds.scores(scored)
        shown["sphere"], shown["variance"] = projections.sphere(scored)
    shown["tsne"] = projections.tsne(sites, source, seed)
    if source is not None and any(view.reconstruction_features is not None for view in sites):
        shown["similarity"] = rows.similarity_rows(sites, source)
        shown["similarity_sentence"] = rows.similarity_sentence(shown["similarity"])
        shown["densities"] = clouds.similarity_densities(sites, source)
    return shown
