"""What a segmentation comparison showed: means over sites and seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.results import Machine
from sonofed_common.segmentation_metrics import weighted_metrics
from sonofed_simulations.segmentation_comparison import SegmentationComparison
from sonofed_simulations.segmentation_scores import MaskScores
from sonofed_simulations.statistics import (
    Contrast,
    Floats,
    Interval,
    PatientDraws,
    contrast,
    holm,
    interval,
)

SOURCE, SUPERVISED = "control/source-only", "control/supervised"
Curves = Mapping[tuple[str, int], Mapping[str, Mapping[str, Floats]]]
"""By row and seed, site and metric: (1 + R,), the estimate first, then one value a sample."""


class MaskSummaryRow(Model):
    """One method over its finished seeds; Dice, NSD and ECE in [0, 1], HD95 in pixels.

    ``sites`` is Dice, as ``sites_over_baseline`` is.
    """

    name: str
    seeds: tuple[int, ...]
    dice: Interval
    nsd: Interval
    hd95: Interval
    ece: Interval
    worst_site: str
    worst_site_dice: float
    sites: dict[str, Interval]
    sites_nsd: dict[str, Interval] = Field(default={})
    sites_hd95: dict[str, Interval] = Field(default={})
    sites_ece: dict[str, Interval] = Field(default={})
    over_baseline: Contrast | None = None
    sites_over_baseline: dict[str, Interval] = Field(default={})
    way_to_supervised: Interval | None = None


class PlugIn(Contrast):
    """What a method adds to the one that it started from."""

    method: str
    start: str


class MaskSummary(Model):
    """A segmentation comparison's numbers.

    Notes
    -----
    ``dice`` is the mean over seeds and sites of each site's mean over its test images; ``nsd``,
    ``hd95`` and ``ece`` (see `segmentation_metrics`) are means over seeds and sites too. Intervals
    come from 2,000 bootstrap samples of patients: a patient's images, in the test sets of all
    seeds, are drawn together. They cover the choice of patients, not of seeds. Differences are in
    the same samples and seeds; p is two-sided; Holm's correction is over the differences to the
    baseline, and over those of ``plug_in``. ``way_to_supervised`` is the gain over source-only as a
    share of that of the supervised control. ``tested`` and ``trained`` count, for each site, the
    test images and the labelled images of the supervised control, a number a seed.
    """

    name: str
    machine: Machine
    baseline: str
    rows: tuple[MaskSummaryRow, ...]
    plug_in: tuple[PlugIn, ...]
    tested: dict[str, tuple[int, ...]]
    trained: dict[str, tuple[int, ...]]


def summarise_masks(
    comparison: SegmentationComparison,
    scores: Mapping[str, Mapping[int, MaskScores]],
    machine: Machine,
) -> MaskSummary:
    """Summarise finished cells; a method counts with the seeds that are finished.

    Parameters
    ----------
    comparison : SegmentationComparison
        Names the rows, their order and the baseline.
    scores : dict of str to dict of int to MaskScores
        By row and seed, see `finished_scores`.
    machine : Machine
        Where the studies ran.

    Raises
    ------
    ConfigurationError
        Two rows of one seed were not tested on the same images of a site.
    """
    _check_pairs(scores)
    draws = PatientDraws(
        (site, patients)
        for seeds in scores.values()
        for found in seeds.values()
        for site, patients in found.patients.items()
    )
    curves = {
        (row, seed): {site: _metrics(found, site, draws) for site in found.patients}
        for row, seeds in scores.items()
        for seed, found in seeds.items()
    }
    rows = [
        _row(comparison, name, scores[name], curves) for name in comparison.rows if name in scores
    ]
    tested = {r.name: r.over_baseline for r in rows if r.over_baseline is not None}
    corrected = holm(tested)
    rows_of = {where: row for row, where in comparison.rows.items()}
    by_seed = {seed: found for seeds in scores.values() for seed, found in seeds.items()}
    tests = [by_seed[seed] for seed in sorted(by_seed)]
    bound = [found for _, found in sorted(scores.get(rows_of.get(SUPERVISED, ""), {}).items())]
    return MaskSummary(
        name=comparison.name,
        machine=machine,
        baseline=comparison.baseline,
        rows=tuple(r.model_copy(update={"over_baseline": corrected.get(r.name)}) for r in rows),
        plug_in=_plug_in(comparison, scores, curves),
        tested=_counts([{s: len(p) for s, p in found.patients.items()} for found in tests]),
        trained=_counts([found.trained for found in bound]),
    )


def _counts(seeds: Sequence[Mapping[str, int]]) -> dict[str, tuple[int, ...]]:
    sites = dict.fromkeys(site for counts in seeds for site in counts)
    return {site: tuple(counts.get(site, 0) for counts in seeds) for site in sites}


def _check_pairs(scores: Mapping[str, Mapping[int, MaskScores]]) -> None:
    tested: dict[tuple[int, str], tuple[str, list[str]]] = {}
    for row, seeds in scores.items():
        for seed, found in seeds.items():
            for site, patients in found.patients.items():
                other, known = tested.setdefault((seed, site), (row, patients))
                if patients != known:
                    raise ConfigurationError(
                        f"rows '{other}' and '{row}' of seed {seed} were tested on other patients "
                        f"of {site}; delete the folder seed-{seed} and run the comparison again"
                    )


def _metrics(found: MaskScores, site: str, draws: PatientDraws) -> dict[str, Floats]:
    """Each metric (1 + R,) of a site: the estimate first, then one value a sample."""
    with np.errstate(invalid="ignore"):
        return weighted_metrics(found.scores[site], draws.weights(site, found.patients[site]))


def _row(
    comparison: SegmentationComparison,
    name: str,
    found: Mapping[int, MaskScores],
    curves: Curves,
) -> MaskSummaryRow:
    seeds = list(found)
    first = found[seeds[0]]
    sites = {site: _at(curves, name, seeds, site) for site in first.patients}
    mean = _over(curves, name, seeds)
    worst = min(sites, key=lambda site: float(sites[site][0]))
    rows = {where: row for row, where in comparison.rows.items()}
    bounds = [rows.get(SOURCE), rows.get(SUPERVISED)]
    low, high = (
        _over(curves, bound, seeds) if bound and _has(curves, bound, seeds) else None
        for bound in bounds
    )
    baseline = comparison.baseline
    paired = name != baseline and _has(curves, baseline, seeds)
    return MaskSummaryRow(
        name=name,
        seeds=tuple(seeds),
        dice=interval(mean),
        nsd=interval(_over(curves, name, seeds, "nsd")),
        hd95=interval(_over(curves, name, seeds, "hd95")),
        ece=interval(_over(curves, name, seeds, "ece")),
        worst_site=worst,
        worst_site_dice=float(sites[worst][0]),
        sites={site: interval(values) for site, values in sites.items()},
        sites_nsd={site: interval(_at(curves, name, seeds, site, "nsd")) for site in sites},
        sites_hd95={site: interval(_at(curves, name, seeds, site, "hd95")) for site in sites},
        sites_ece={site: interval(_at(curves, name, seeds, site, "ece")) for site in sites},
        over_baseline=contrast(mean, _over(curves, baseline, seeds)) if paired else None,
        sites_over_baseline=(
            {s: interval(own - _at(curves, baseline, seeds, s)) for s, own in sites.items()}
            if paired
            else {}
        ),
        way_to_supervised=None if low is None or high is None else _way(mean, low, high),
    )


def _way(mean: Floats, low: Floats, high: Floats) -> Interval | None:
    """Share of the way from low to high; samples in which there is no way are left out."""
    if high[0] <= low[0]:
        return None
    way = np.where(high > low, high - low, np.nan)
    return interval((mean - low) / way)


def _plug_in(
    comparison: SegmentationComparison,
    scores: Mapping[str, Mapping[int, MaskScores]],
    curves: Curves,
) -> tuple[PlugIn, ...]:
    found: dict[str, Contrast] = {}
    for method, start in comparison.plug_in.items():
        seeds = [seed for seed in scores.get(method, {}) if seed in scores.get(start, {})]
        if seeds:
            found[method] = contrast(_over(curves, method, seeds), _over(curves, start, seeds))
    return tuple(
        PlugIn(method=method, start=comparison.plug_in[method], **gained.model_dump())
        for method, gained in holm(found).items()
    )


def _over(curves: Curves, name: str, seeds: Sequence[int], metric: str = "dice") -> Floats:
    """Mean over sites and seeds (1 + R,)."""
    found = [[site[metric] for site in curves[name, seed].values()] for seed in seeds]
    values: Floats = np.mean(found, axis=(0, 1))
    return values


def _at(curves: Curves, name: str, seeds: Sequence[int], site: str, metric: str = "dice") -> Floats:
    """Mean of a site over seeds (1 + R,)."""
    values: Floats = np.mean([curves[name, seed][site][metric] for seed in seeds], axis=0)
    return values


def _has(curves: Curves, name: str, seeds: Sequence[int]) -> bool:
    return all((name, seed) in curves for seed in seeds)
