"""How reconstruction moves the hospitals' distributions of similarity to the source's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sonofed_simulations.statistics import (
    Contrast,
    Effect,
    Floats,
    PatientDraws,
    contrast,
    effect_of,
    holm,
)
from sonofed_simulations.tables.distances import overlap, wasserstein
from sonofed_simulations.tables.redrawn import SOURCE, WAYS, Cells

DISTANCES = {"Wasserstein-1": wasserstein, "overlap": overlap}

Key = tuple[str, str, str]
"""Way, hospital and distance."""
Measure = Callable[[Floats, Floats, Floats, Floats], Floats]


@dataclass(frozen=True)
class Moved:
    """How a hospital's distribution lies to the source's, or the mean of several does.

    Attributes
    ----------
    before, after : float
        Of its images, and of their reconstructions, to the source's held-out images.
    both : float
        Of its reconstructions to the reconstructions of the source's held-out images.
    change, shared : Contrast
        ``after`` and ``both``, each less ``before``, in the same bootstrap samples.
    change_effect, shared_effect : Effect
        Of these changes in the seeds, or in the hospitals.
    """

    before: float
    after: float
    both: float
    change: Contrast
    shared: Contrast
    change_effect: Effect
    shared_effect: Effect


@dataclass(frozen=True)
class Distances:
    """Distances of a hospital (1 + R,): before, and by seed (S, 1 + R) after and of both."""

    before: Floats
    after: Floats
    both: Floats


Measured = Mapping[tuple[str, str], Mapping[str, Distances]]
"""Distances of each hospital by way and distance's name."""


def measured_of(cells: Cells) -> Measured:
    """Measure each hospital; a way of which the source's cells have not run is left out."""
    draws = PatientDraws((site, found[0].patients) for (_, site), found in cells.items())
    measured: dict[tuple[str, str], dict[str, Distances]] = {}
    for way in WAYS:
        for name, measure in DISTANCES.items():
            found = {
                site: distances
                for other, site in cells
                if other == way and site != SOURCE
                if (distances := _distances(cells, way, site, measure, draws)) is not None
            }
            if found:
                measured[way, name] = found
    return measured


def moves_of(measured: Measured) -> dict[Key, Moved]:
    """How reconstruction moves each hospital; p by Holm over the hospitals of a way and distance.

    The effects' pairs are seeds.
    """
    moves: dict[Key, Moved] = {}
    for (way, name), found in measured.items():
        own = {site: _moved(d.before, d.after, d.both) for site, d in found.items()}
        changes = holm({site: move.change for site, move in own.items()})
        shared = holm({site: move.shared for site, move in own.items()})
        for site, move in own.items():
            parts = {"change": changes[site], "shared": shared[site]}
            moves[way, site, name] = Moved(**{**vars(move), **parts})
    return moves


def mean_moves(measured: Measured) -> dict[tuple[str, str], Moved]:
    """How reconstruction moves the hospitals' mean, by way and distance; p is not corrected.

    The effects' pairs are hospitals, each a mean over seeds.
    """
    means = {}
    for key, found in measured.items():
        before = np.stack([d.before for d in found.values()])
        after, both = (
            np.stack([getattr(d, part).mean(axis=0) for d in found.values()])
            for part in ("after", "both")
        )
        means[key] = _moved(before, after, both)
    return means


def _distances(
    cells: Cells, way: str, site: str, measure: Measure, draws: PatientDraws
) -> Distances | None:
    held = {cell.seed: cell for cell in cells.get((way, SOURCE), ())}
    pairs = [(cell, held[cell.seed]) for cell in cells[way, site] if cell.seed in held]
    if not pairs:
        return None
    at = draws.weights(site, pairs[0][0].patients)
    source = draws.weights(SOURCE, pairs[0][1].patients)
    return Distances(
        # What does not depend on the seed is the same in all of them.
        before=measure(pairs[0][0].before, at, pairs[0][1].before, source),
        after=np.stack([measure(c.after, at, s.before, source) for c, s in pairs]),
        both=np.stack([measure(c.after, at, s.after, source) for c, s in pairs]),
    )


def _moved(before: Floats, after: Floats, both: Floats) -> Moved:
    """Changes of means over pairs (P, 1 + R), and what the pairs tell; ``before`` may be (1 + R,).

    The first of the 1 + R is the estimate.
    """
    start = np.atleast_2d(before)
    mean = start.mean(axis=0)
    return Moved(
        float(mean[0]),
        float(after.mean(axis=0)[0]),
        float(both.mean(axis=0)[0]),
        contrast(after.mean(axis=0), mean),
        contrast(both.mean(axis=0), mean),
        effect_of((after - start)[:, 0].tolist()),
        effect_of((both - start)[:, 0].tolist()),
    )
