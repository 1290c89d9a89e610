"""The report: one page of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sonofed_common.contract.results import Results
from sonofed_common.runtime import write_atomically
from sonofed_simulations.report import clouds, figures, format, pictures, projections, rows
from sonofed_simulations.report.summary import explanation, headline, labels_and_images
from sonofed_simulations.report.view import SiteView, SourceView

HERE = Path(__file__).parent


def build_report(
    results: Results,
    out: Path,
    sites: Sequence[SiteView] = (),
    source: SourceView | None = None,
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
        **_numbers(results),
        **_views([view for view in sites if len(view.images)], source, results.seed),
    )
    path = out / "report.html"
    write_atomically(path, text.encode())
    return path


def _numbers(results: Results) -> dict[str, Any]:
    selection = results.settings.get("selection")
    chosen_at_random = isinstance(selection, dict) and selection.get("strategy") == "random"
    labels, images = labels_and_images(results)
    classifiers = sorted({name for site in results.sites.values() for name in site.classifiers})
    return {
        "headline": headline(results),
        "explanation": explanation(results),
        "labels": labels,
        "images": images,
        "classifiers": classifiers,
        "comparisons": list(rows.comparisons(results)),
        "classifier_rows": list(rows.classifier_rows(results)) if len(classifiers) > 1 else [],
        "measures": [rows.MEASURES[name] for name in rows.measures(results)],
        "measure_rows": list(rows.measure_rows(results)),
        "phases": rows.phase_rows(results),
        "settings": rows.setting_rows(results),
        "chosen_at_random": chosen_at_random,
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
    shown["scores"] = clouds.scores(sites)
    shown["sphere"], shown["variance"] = projections.sphere(sites)
    shown["tsne"] = projections.tsne(sites, source, seed)
    if source is not None:
        shown["similarity"] = rows.similarity_rows(sites, source)
        shown["similarity_sentence"] = rows.similarity_sentence(shown["similarity"])
        shown["densities"] = clouds.similarity_densities(sites, source)
    return shown
