"""What the page's section on segmentation is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sonofed_common.contract.results import SEGMENTATION_METRICS, Results
from sonofed_simulations.report import masks, segmentation
from sonofed_simulations.report.segmentation_figures import dice_by_stage
from sonofed_simulations.report.segmentation_summary import mask_explanation, mask_headline
from sonofed_simulations.report.view import SegmentationView

TOLERANCE = "1/64 of the image's side"


def mask_parts(results: Results, views: Sequence[SegmentationView]) -> dict[str, Any]:
    """Sentences, rows, chart and pictures of the section.

    Parameters
    ----------
    results : Results
        Of a study with segmentation.
    views : sequence of SegmentationView
        What a simulation can show; empty in a deployment.
    """
    shown = [view for view in views if len(view.images)]
    classes = masks.foreground_classes(shown)
    return {
        "headline": mask_headline(results),
        "explanation": mask_explanation(results),
        "chart": dice_by_stage(results),
        "comparisons": list(segmentation.mask_comparisons(results)),
        "key_stages": segmentation.key_stages(results),
        "stages": segmentation.reported_stages(results),
        "stage_names": segmentation.STAGE_NAMES,
        "stage_words": segmentation.STAGE_WORDS,
        "measures": [segmentation.MEASURES[name] for name in SEGMENTATION_METRICS],
        "rows": list(segmentation.mask_rows(results)),
        "mean": segmentation.MEAN,
        "tolerance": _tolerance(results),
        "classes": masks.class_colours(classes),
        "gradient": masks.confidence_gradient(),
        "views": [_pictures(view, classes) for view in shown],
    }


def _tolerance(results: Results) -> str:
    size = results.settings.get("image_size")
    return f"{TOLERANCE} ({size / 64:g} px)" if isinstance(size, int) else TOLERANCE


def _pictures(view: SegmentationView, classes: int) -> dict[str, Any]:
    cases = masks.cases(view, classes)
    ranked = int(np.isfinite(view.dice_ours).sum())
    return {
        "name": view.name,
        "cases": cases,
        "columns": [column for column, _ in cases[0].tiles] if cases else [],
        "branches": masks.branch_colours(view.branches),
        "ranked": ranked,
        "unranked": len(view.images) - ranked,
    }
