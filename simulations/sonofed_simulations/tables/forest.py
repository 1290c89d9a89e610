"""The figure of differences: a forest plot, one panel a measure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from sonofed_simulations.report.figures import CHOSEN, SITE_COLOURS, SOFT, drawing
from sonofed_simulations.statistics import Interval

LEGEND = "Orange: the 95% interval leaves 0 out, before any correction for the number of rows."


def forest(labels: Sequence[str], panels: Mapping[str, Sequence[Interval]], width: float) -> bytes:
    """Draw differences with their intervals as an SVG; those that exclude 0 stand out.

    Parameters
    ----------
    labels : sequence of str
        One a line, from the top.
    panels : mapping of str to sequence of Interval
        By the panel's title, a difference a line.
    width : float
        Inches.
    """
    buffer = io.BytesIO()
    with drawing(width, 1.1 + 0.24 * len(labels)) as figure:
        drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, found) in zip(drawn, panels.items(), strict=True):
            for n, one in enumerate(found):
                clear = not one.low <= 0 <= one.high
                colour = CHOSEN if clear else SITE_COLOURS[0]
                axes.plot((one.low, one.high), (n, n), color=colour, linewidth=1.4)
                axes.plot(one.value, n, "o", color=colour, markersize=4)
            axes.axvline(0, color=SOFT, linewidth=0.8)
            axes.set(title=title, xlabel="difference (95%)")
            axes.grid(axis="x")
            axes.locator_params(axis="x", nbins=4)
        drawn[0].set_yticks(range(len(labels)), labels)
        drawn[0].invert_yaxis()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
