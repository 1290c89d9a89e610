"""The figure of the segmentation track: Dice at every stage, a panel a hospital."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from sonofed_common.contract.results import Estimate, Results, SegmentationStage
from sonofed_simulations.report.figures import FAINT, INK, STAGE_COLOURS, WIDTH, data_uri, drawing
from sonofed_simulations.report.format import decimal
from sonofed_simulations.report.segmentation import (
    STAGE_NAMES,
    compared_hospitals,
    mask_estimate,
    mean_mask_estimate,
    reported_stages,
)

COLOURS: dict[SegmentationStage, str] = {
    "source": STAGE_COLOURS["source"],
    "bn_adapted": STAGE_COLOURS["bn_adapted"],
}
OTHER = STAGE_COLOURS["adapted"]


def dice_by_stage(results: Results) -> str | None:
    """Dice with 95% intervals, a panel a hospital and a row a stage, the mean last.

    Returns
    -------
    str or None
        An SVG data URI; None where no hospital reports Dice.
    """
    stages = reported_stages(results)
    panels = [
        (name, {stage: mask_estimate(results, name, stage) for stage in stages})
        for name, site in results.sites.items()
        if site.segmentation
    ]
    if not stages:
        return None
    if len(compared_hospitals(results)) > 1:
        means = {stage: mean_mask_estimate(results, stage) for stage in stages}
        panels.append(("Mean", means))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    with drawing(WIDTH, rows * (0.55 + 0.27 * len(stages)) + 0.3) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (name, estimates) in zip(grid.flat, panels, strict=False):
            _panel(axes, estimates)
            axes.set_title(name)
            # A column's last panel may not stand in the last row, whose axis all would share.
            axes.xaxis.set_tick_params(labelbottom=True)
        shown = [e for _, estimates in panels for e in estimates.values() if e is not None]
        lowest = min(e.value if e.low is None else e.low for e in shown)
        highest = max(e.value if e.high is None else e.high for e in shown)
        margin = 0.1 * max(highest - lowest, 0.1)
        grid[0, 0].set_xlim(max(lowest - margin, 0.0), min(highest + 3 * margin, 1.12))
        grid[0, 0].xaxis.set_major_formatter(lambda value, _: decimal(value, 1))
        grid[0, 0].set_yticks(range(len(stages)), [STAGE_NAMES[s] for s in stages], color=INK)
        grid[0, 0].set_ylim(len(stages) - 0.5, -0.6)
        figure.supxlabel("Dice on the hospital's own test images   (1 is perfect)", fontsize=8.5)
        return data_uri(figure)


def _panel(axes: Axes, estimates: dict[SegmentationStage, Estimate | None]) -> None:
    control = estimates.get("bn_adapted")
    if control is not None:
        style: Any = {"color": COLOURS["bn_adapted"], "linewidth": 1.0, "zorder": 1}
        axes.axvline(control.value, linestyle=(0, (3, 2)), **style)
    last = list(estimates)[-1]
    for row, (stage, found) in enumerate(estimates.items()):
        if found is None:
            continue
        colour = COLOURS.get(stage, OTHER)
        if found.low is not None and found.high is not None:
            axes.hlines(row, found.low, found.high, color=colour, linewidth=1.6, alpha=0.75)
        face = colour if stage == last else "white"
        axes.plot(found.value, row, "o", color=colour, markerfacecolor=face, markersize=5.5)
        if stage == last:
            right = found.value if found.high is None else found.high
            axes.annotate(
                decimal(found.value),
                (right, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontweight="bold",
            )
    axes.grid(axis="x")
    axes.spines["left"].set_color(FAINT)
