"""Budget curves of a selection table, as a figure."""

from __future__ import annotations

import io

from sonofed_simulations.report.figures import REST, SITE_COLOURS, SITE_MARKERS, SOFT, drawing
from sonofed_simulations.statistics import Interval
from sonofed_simulations.tables.selection_curves import Curve
from sonofed_simulations.tables.selection_summary import Summary
from sonofed_simulations.tables.settings import ALL_LABELS, BASELINE, RANDOM

DRAWN = 6
"""Strategies of the figure that have a colour of their own."""


def budget_curves(summary: Summary) -> bytes:
    """Draw the federated curves (SVG), the best by area in colours."""
    curves = [curve for curve in summary.curves if curve.mode == "federated"]
    ordered = sorted(curves, key=lambda curve: -curve.area.value)
    coloured = [curve for curve in ordered if curve.strategy != RANDOM][:DRAWN]
    buffer = io.BytesIO()
    with drawing(7.2, 4.2) as figure:
        axes = figure.subplots()
        for curve in ordered:
            x, y = [float(b) * 100 for b in curve.accuracy], [v.value for v in _values(curve)]
            if curve.strategy == RANDOM:
                low, high = ([getattr(v, end) for v in _values(curve)] for end in ("low", "high"))
                axes.fill_between(x, low, high, color=REST, alpha=0.2, linewidth=0)
                axes.plot(x, y, "--", color=SOFT, label="random, with its 95% interval")
            elif curve in coloured:
                n = coloured.index(curve)
                axes.plot(x, y, color=SITE_COLOURS[n], marker=SITE_MARKERS[n], label=curve.strategy)
            else:
                axes.plot(x, y, color=REST, linewidth=0.7)
        for row in (row for row in summary.rows if row.strategy in (BASELINE, ALL_LABELS)):
            axes.axhline(row.accuracy.value, color=SOFT, linewidth=0.7, linestyle=":")
            axes.annotate(row.strategy, (1, row.accuracy.value), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", color=SOFT)  # fmt: skip
        axes.set(xlabel="labels, % of the pools", ylabel="accuracy, mean over sites")
        axes.grid(axis="y")
        axes.legend(loc="lower right", ncols=2)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _values(curve: Curve) -> list[Interval]:
    return list(curve.accuracy.values())
