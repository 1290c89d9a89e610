"""What the hospitals of a table of outlines gain, one beside the other."""

from __future__ import annotations

from collections.abc import Sequence

from sonofed_simulations.segmentation_summary import MaskSummaryRow, PlugIn
from sonofed_simulations.statistics import Effect, effect_of


def over_baseline(row: MaskSummaryRow) -> Effect | None:
    """Effect of the hospitals' Dice differences to the baseline, each a mean over seeds."""
    if row.over_baseline is None:
        return None
    return effect_of(gain.value for gain in row.sites_over_baseline.values())


def over_start(gain: PlugIn, rows: Sequence[MaskSummaryRow]) -> Effect | None:
    """Effect of the hospitals' Dice differences to what a method started from.

    None where the two rows have finished other seeds: their hospitals' means are no pairs.
    """
    by_name = {row.name: row for row in rows}
    if not {gain.method, gain.start} <= by_name.keys():
        return None
    own, start = by_name[gain.method], by_name[gain.start]
    if own.seeds != start.seeds:
        return None
    return effect_of(own.sites[site].value - start.sites[site].value for site in start.sites)
