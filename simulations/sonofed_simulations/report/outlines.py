"""Finished runs of segmentation side by side: a page of Markdown and its numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.results import (
    SEGMENTATION_METRICS,
    Estimate,
    Results,
    SegmentationStage,
    gain,
)
from sonofed_common.runtime import write_atomically
from sonofed_simulations.report.format import ABSENT, duration
from sonofed_simulations.report.segmentation import (
    MEAN,
    STAGE_NAMES,
    STAGE_WORDS,
    mask_estimate,
    mask_rows,
    mean_mask_estimate,
    reported_stages,
    segments,
)
from sonofed_simulations.report.segmentation_summary import mask_explanation, mask_headline

TITLE = "Outlines without labels: runs side by side"
HEADER = ("hospital", "stage", "Dice (95%)", "NSD (95%)", "HD95, pixels (95%)", "ECE (95%)",
          "Dice over re-normalised (95%)")  # fmt: skip
FORMS = {"dice": ".3f", "nsd": ".3f", "hd95": ".1f", "ece": ".3f"}

READ = (
    "Means over a hospital's test images, with 95% intervals from resampling its patients; the "
    "mean counts each hospital the same. A difference's interval treats both models as "
    "independent, though they saw the same patients: it is cautious, and a comparison of paired "
    "differences says more. The result is a study's last stage, never its best. Times are by the "
    "clock, whatever else the machine did."
)


def write_outlines(runs: Sequence[Results], page: Path) -> None:
    """Write the page, and the results that it was made of beside it as JSON.

    Parameters
    ----------
    runs : sequence of Results
        In the order of the page.
    page : Path
        Ends in ``.md``; the numbers are in the file of the same name in ``.json``.

    Raises
    ------
    ConfigurationError
        The page does not end in ``.md``, there is no run, or one has no segmentation.
    """
    if page.suffix != ".md":
        raise ConfigurationError(f"the page '{page.name}' must end in .md")
    if not runs:
        raise ConfigurationError("a page of runs needs one; name the folders of finished runs")
    for run in runs:
        if not segments(run):
            raise ConfigurationError(
                f"study {run.study} has no segmentation; this page is of outlines alone"
            )
    values = json.dumps([run.model_dump(mode="json") for run in runs], indent=1)
    write_atomically(page.with_suffix(".json"), f"{values}\n".encode())
    write_atomically(page, ("\n".join(outlines(runs)) + "\n").encode())


def outlines(runs: Sequence[Results]) -> list[str]:
    """Return the page's lines."""
    stages = dict.fromkeys(stage for run in runs for stage in reported_stages(run))
    lines = [f"# {TITLE}", "", READ, ""]
    lines += [f"- {STAGE_NAMES[stage]}: {STAGE_WORDS[stage]}." for stage in stages]
    for run in runs:
        lines += ["", *_section(run)]
    return lines


def _section(run: Results) -> list[str]:
    machine = run.machine
    costs = ", ".join(f"{cost.name} {duration(cost.seconds)}" for cost in run.phases)
    tested = ", ".join(
        f"{name} {site.test_masks}" for name, site in run.sites.items() if site.segmentation
    )
    return [
        f"## {run.study}, seed {run.seed}",
        "",
        *(f"- {note}" for note in run.notes),
        f"- Test images with a mask: {tested}.",
        f"- {machine.cpu}, {machine.cores} cores, {machine.device}, torch {machine.torch}; engine "
        f"{run.engine}; {duration(run.seconds)} ({costs}), the source's training not counted.",
        "",
        " ".join([mask_headline(run), *mask_explanation(run)]),
        "",
        _line(HEADER),
        _line(["---"] * len(HEADER)),
        *(_row(run, *found) for found in mask_rows(run)),
    ]


def _row(
    run: Results,
    name: str,
    stage: SegmentationStage,
    found: Sequence[tuple[Estimate | None, int]],
) -> str:
    control = (
        mean_mask_estimate(run, "bn_adapted")
        if name == MEAN
        else mask_estimate(run, name, "bn_adapted")
    )
    measures = dict(zip(SEGMENTATION_METRICS, (item for item, _ in found), strict=True))
    over = None if stage == "bn_adapted" else gain(control, measures["dice"])
    cells = [_text(item, FORMS[metric]) for metric, item in measures.items()]
    last = "" if over is None else _text(over, "+.3f")
    return _line([name, STAGE_NAMES[stage].lower(), *cells, last])


def _text(found: Estimate | None, form: str) -> str:
    if found is None:
        return ABSENT
    bounds = "" if found.low is None else f" ({found.low:{form}} to {found.high:{form}})"
    return f"{found.value:{form}}{bounds}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
