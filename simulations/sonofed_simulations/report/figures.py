"""The figures' one style, and the figures of the measures: before and after, budget curve."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sonofed_common.contract.results import (
    STAGES,
    Estimate,
    Results,
    SiteResults,
    Stage,
    compared_sites,
    estimate,
    mean_over_sites,
    over_classifiers,
    site_estimate,
)
from sonofed_simulations.report.format import decimal

INK, SOFT, FAINT = "#1f2933", "#66717d", "#d9dee3"
CHOSEN, REST, SOURCE = "#c8501e", "#8fa3b5", "#b9bfc6"
STAGE_COLOURS: dict[Stage, str] = {
    "source": "#7b8794",
    "bn_adapted": "#c58a1c",
    "adapted": "#0b6aa8",
}
STAGE_NAMES: dict[Stage, str] = {
    "source": "source only",
    "bn_adapted": "re-normalised, no labels",
    "adapted": "adapted with labels",
}
STAGE_MARKERS: dict[Stage, str] = {"source": "o", "bn_adapted": "D", "adapted": "o"}
SITE_COLOURS = ("#0b6aa8", "#00856f", "#a23b83", "#8a6d00", "#4a56b0", "#c8501e", "#2f7d32")
SITE_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 8.6

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#edf0f2",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.hashsalt": "sonofed",
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """Open an empty figure in the report's style, free of pyplot's global state.

    Parameters
    ----------
    width, height : float
        Inches.
    """
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def data_uri(figure: Figure, kind: str = "svg") -> str:
    """Encode a figure as ``svg`` (lines and text) or ``png`` (many points)."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=170, metadata=metadata)
    mime = "image/svg+xml" if kind == "svg" else "image/png"
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def site_colours(names: Sequence[str]) -> dict[str, str]:
    """Colour of each site, the same in every figure."""
    return {name: SITE_COLOURS[i % len(SITE_COLOURS)] for i, name in enumerate(names)}


def before_after(results: Results) -> str | None:
    """AUROC of the stages with 95% intervals, a row a site, the mean last.

    Returns
    -------
    str or None
        An SVG data URI; None where no site reports a measure.
    """
    rows: list[tuple[str, dict[Stage, Estimate | None]]] = [
        (name, {stage: site_estimate(site, stage) for stage in STAGES})
        for name, site in results.sites.items()
        if site.classifiers
    ]
    if not rows:
        return None
    if len(compared_sites(results)) > 1:
        rows.append(("Mean", {stage: mean_over_sites(results, stage) for stage in STAGES}))
    with drawing(WIDTH, 0.9 + 0.62 * len(rows)) as figure:
        axes = figure.subplots()
        for row, (_, estimates) in enumerate(rows):
            for offset, stage in zip((-0.2, 0.0, 0.2), STAGES, strict=True):
                _whisker(axes, row + offset, estimates[stage], stage)
        if rows and rows[-1][0] == "Mean":
            axes.axhline(len(rows) - 1.5, color=FAINT, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], color=INK, fontsize=9)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        _auroc_axis(axes, [e for _, es in rows for e in es.values()], vertical=False)
        _stage_legend(figure, [s for s in STAGES if any(es[s] for _, es in rows)])
        return data_uri(figure)


def budget_curve(results: Results) -> str | None:
    """AUROC against labels, a panel a site; an SVG data URI, or None where there is no curve."""
    curves = {
        name: points for name, site in results.sites.items() if len(points := _curve(site)) > 1
    }
    if not curves:
        return None
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    with drawing(WIDTH, 0.5 + 2.15 * rows) as figure:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        colours = site_colours(list(results.sites))
        for axes in grid.flat[len(curves) :]:
            axes.set_visible(False)
        for axes, (name, points) in zip(grid.flat, curves.items(), strict=False):
            _curve_panel(axes, points, colours[name])
            control = site_estimate(results.sites[name], "bn_adapted")
            if control is not None:
                style = {"color": STAGE_COLOURS["bn_adapted"], "linewidth": 1.1, "zorder": 1}
                axes.axhline(control.value, linestyle=(0, (3, 2)), **style)
            axes.set_title(name, color=colours[name])
        shown = [e for points in curves.values() for _, e in points]
        _auroc_axis(grid[0, 0], shown, vertical=True)
        figure.supxlabel("labelled images at this site", fontsize=8.5, color=SOFT)
        return data_uri(figure)


def _curve(site: SiteResults) -> list[tuple[int, Estimate]]:
    zero = site_estimate(site, "source")
    points = [] if zero is None else [(0, zero)]
    classifiers = list(site.classifiers.values())
    shared = zip(*(c.curve for c in classifiers), strict=False)
    for parts in shared:
        mean = over_classifiers(estimate(part.metrics) for part in parts)
        if mean is not None:
            points.append((parts[0].labels, mean))
    return points


def _curve_panel(axes: Axes, points: list[tuple[int, Estimate]], colour: str) -> None:
    labels = [n for n, _ in points]
    values = [e.value for _, e in points]
    bounded = [(n, e.low, e.high) for n, e in points if e.low is not None and e.high is not None]
    axes.vlines(
        [n for n, _, _ in bounded],
        [low for _, low, _ in bounded],
        [high for _, _, high in bounded],
        color=colour,
        alpha=0.35,
        linewidth=3,
    )
    axes.plot(labels, values, color=colour, linewidth=1.6, marker="o", markersize=5)
    axes.plot(0, values[0], marker="o", markersize=5, color=colour, markerfacecolor="white")
    axes.annotate(
        decimal(values[-1]),
        (labels[-1], values[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold",
        color=colour,
    )
    axes.set_xticks(_apart(sorted(set(labels))))
    axes.margins(x=0.16)
    axes.grid(axis="y")


def _apart(labels: list[int]) -> list[int]:
    kept: list[int] = []
    for label in reversed(labels):
        if not kept or kept[-1] - label >= 0.16 * labels[-1]:
            kept.append(label)
    return kept


def _whisker(axes: Axes, row: float, found: Estimate | None, stage: Stage) -> None:
    if found is None:
        return
    colour = STAGE_COLOURS[stage]
    if found.low is not None and found.high is not None:
        axes.hlines(row, found.low, found.high, color=colour, linewidth=1.6, alpha=0.75)
    face = colour if stage == "adapted" else "white"
    style: dict[str, Any] = {
        "markersize": 6.5 if stage == "adapted" else 5.5,
        "markeredgewidth": 1.4,
    }
    axes.plot(found.value, row, STAGE_MARKERS[stage], color=colour, markerfacecolor=face, **style)


def _auroc_axis(axes: Axes, estimates: Sequence[Estimate | None], vertical: bool) -> None:
    known = [e for e in estimates if e is not None]
    lowest = min((v for e in known for v in (e.value, e.low) if v is not None), default=0.5)
    limits = (min(0.5, lowest) - 0.02, 1.01)
    if vertical:
        axes.set_ylim(*limits)
        axes.set_ylabel("AUROC")
        axes.yaxis.set_major_formatter(lambda value, _: decimal(value, 1))
    else:
        axes.set_xlim(*limits)
        axes.set_xlabel("AUROC on the site's own test patients   (.5 is a coin toss, 1 is perfect)")
        axes.xaxis.set_major_formatter(lambda value, _: decimal(value, 1))
        axes.grid(axis="x")


def _stage_legend(figure: Figure, stages: Sequence[Stage]) -> None:
    handles = [
        matplotlib.lines.Line2D(
            [],
            [],
            color=STAGE_COLOURS[stage],
            marker=STAGE_MARKERS[stage],
            markerfacecolor=STAGE_COLOURS[stage] if stage == "adapted" else "white",
            linewidth=1.6,
            label=STAGE_NAMES[stage],
        )
        for stage in stages
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(stages))
