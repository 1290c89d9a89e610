"""How much worse reconstructions of the hospitals' images are than those of the source's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sonofed_simulations.statistics import (
    Contrast,
    Effect,
    Floats,
    PatientDraws,
    contrast,
    group_effect,
    holm,
)
from sonofed_simulations.tables.redrawn import MEASURES, SOURCE, WAYS, Cells

Means = Mapping[tuple[str, str, str], Floats]
"""Means over images and seeds (1 + R,) by way, site and measure; the estimate first."""
Drops = Mapping[tuple[str, str, str], Contrast]
"""Differences to the source, by the same keys."""
Effects = Mapping[tuple[str, str, str], Effect]
"""Of these differences."""


def means_of(cells: Cells) -> Means:
    """Each measure at each site, in bootstrap samples of its patients."""
    draws = PatientDraws((site, found[0].patients) for (_, site), found in cells.items())
    means = {}
    for (way, site), found in cells.items():
        weights = draws.weights(site, found[0].patients)
        total = weights.sum(axis=1)
        for measure in MEASURES:
            values = np.mean([cell.quality[measure] for cell in found], axis=0)
            means[way, site, measure] = np.asarray(weights @ values / total)
    return means


def drops_of(means: Means) -> Drops:
    """What each hospital has less or more than the source; p by Holm over all of one way."""
    drops: dict[tuple[str, str, str], Contrast] = {}
    for way in WAYS:
        family = {
            f"{site}/{measure}": contrast(values, means[way, SOURCE, measure])
            for (name, site, measure), values in means.items()
            if name == way and site != SOURCE and (way, SOURCE, measure) in means
        }
        for key, found in holm(family).items():
            site, _, measure = key.rpartition("/")
            drops[way, site, measure] = found
    return drops


def effects_of(cells: Cells) -> Effects:
    """Cohen's d of each hospital's images against the source's, each a mean over seeds.

    The pairs are the seeds that both sites have finished.
    """
    effects = {}
    for (way, site), found in cells.items():
        held = {cell.seed: cell for cell in cells.get((way, SOURCE), ())}
        own = [cell for cell in found if cell.seed in held]
        if site == SOURCE or not own:
            continue
        for measure in MEASURES:
            one = np.stack([cell.quality[measure] for cell in own])
            two = np.stack([held[cell.seed].quality[measure] for cell in own])
            higher = int((one.mean(axis=1) > two.mean(axis=1)).sum())
            d = group_effect(one.mean(axis=0), two.mean(axis=0))
            effects[way, site, measure] = Effect(d=d, higher=higher, pairs=len(own))
    return effects
