"""What a segmentation comparison showed: means over sites and seeds, and paired differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.results import Machine
from sonofed_common.runtime import write_atomically
from sonofed_simulations.paired import (
    Contrast,
    Floats,
    Interval,
    PatientDraws,
    contrast,
    holm,
    interval,
)
from sonofed_simulations.segmentation_comparison import MaskScores, SegmentationComparison

SOURCE, SUPERVISED = "control/source-only", "control/supervised"


class MaskSummaryRow(Model):
    """One method over its finished seeds; Dice and NSD in [0, 1], HD95 in pixels."""

    name: str
    seeds: tuple[int, ...]
    dice: Interval
    nsd: float
    hd95: float
    worst_site: str
    worst_site_dice: float
    sites: dict[str, Interval]
    over_baseline: Contrast | None = None
    way_to_supervised: float | None = None


class PlugIn(Contrast):
    """What a method adds to the one that it started from."""

    method: str
    start: str


class MaskSummary(Model):
    """A segmentation comparison's numbers.

    Notes
    -----
    ``dice`` is the mean over seeds and sites of each site's mean over its test images. Intervals
    come from 2,000 bootstrap samples of patients: a patient's images, in the test sets of all
    seeds, are drawn together. They cover the choice of patients, not of seeds. Differences are in
    the same samples and seeds; p is two-sided; Holm's correction is over the differences to the
    baseline, and over those of ``plug_in``. ``way_to_supervised`` is the gain over source-only as a
    share of that of the supervised control.
    """

    name: str
    machine: Machine
    baseline: str
    rows: tuple[MaskSummaryRow, ...]
    plug_in: tuple[PlugIn, ...]


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
    """
    draws = PatientDraws(
        (site, patients)
        for seeds in scores.values()
        for found in seeds.values()
        for site, patients in found.patients.items()
    )
    curves = {
        (row, seed): {site: _means(found, site, draws) for site in found.patients}
        for row, seeds in scores.items()
        for seed, found in seeds.items()
    }
    rows = [
        _row(comparison, name, scores[name], curves) for name in comparison.rows if name in scores
    ]
    tested = {r.name: r.over_baseline for r in rows if r.over_baseline is not None}
    corrected = holm(tested)
    return MaskSummary(
        name=comparison.name,
        machine=machine,
        baseline=comparison.baseline,
        rows=tuple(r.model_copy(update={"over_baseline": corrected.get(r.name)}) for r in rows),
        plug_in=_plug_in(comparison, scores, curves),
    )


def mask_table(summary: MaskSummary) -> Table:
    """Return the summary for a terminal."""
    table = Table(*HEADER)
    for row in summary.rows:
        table.add_row(*_cells(row))
    return table


def write_mask_summary(summary: MaskSummary, out: Path) -> None:
    """Write ``comparison.json`` and ``comparison.md``."""
    text = json.dumps(summary.model_dump(mode="json"), indent=2)
    write_atomically(out / "comparison.json", f"{text}\n".encode())
    sites = list(summary.rows[0].sites) if summary.rows else []
    lines = [
        *_markdown(HEADER, [_cells(row) for row in summary.rows]),
        "",
        "Dice by site:",
        "",
        *_markdown(
            ("method", *sites),
            [[row.name, *(_text(row.sites[site]) for site in sites)] for row in summary.rows],
        ),
        "",
        "What the plug-in adds:",
        "",
        *_markdown(
            ("method", "over", "Dice gained (95%)", "p Holm"),
            [[p.method, p.start, _text(p, "+"), f"{p.p_holm:.3f}"] for p in summary.plug_in],
        ),
    ]
    write_atomically(out / "comparison.md", ("\n".join(lines) + "\n").encode())


HEADER = (
    "method",
    "seeds",
    "Dice (95%)",
    "worst site",
    "NSD",
    "HD95",
    "over baseline (95%), p Holm",
    "of the way to supervised",
)


def _cells(row: MaskSummaryRow) -> list[str]:
    over = row.over_baseline
    way = row.way_to_supervised
    return [
        row.name,
        str(len(row.seeds)),
        _text(row.dice),
        f"{row.worst_site_dice:.3f}, {row.worst_site}",
        f"{row.nsd:.3f}",
        f"{row.hd95:.1f}",
        "" if over is None else f"{_text(over, '+')}, {over.p_holm:.3f}",
        "" if way is None else f"{way:.0%}",
    ]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _text(found: Interval, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def _means(found: MaskScores, site: str, draws: PatientDraws) -> Floats:
    """Mean Dice (1 + R,) of a site: the estimate first, then one value a sample."""
    weights = draws.weights(site, found.patients[site])
    means: Floats = weights @ found.measures[site]["dice"] / weights.sum(axis=1)
    return means


def _row(
    comparison: SegmentationComparison,
    name: str,
    found: Mapping[int, MaskScores],
    curves: Mapping[tuple[str, int], Mapping[str, Floats]],
) -> MaskSummaryRow:
    seeds = list(found)
    first = found[seeds[0]]
    sites = {s: np.mean([curves[name, seed][s] for seed in seeds], axis=0) for s in first.patients}
    mean = _over(curves, name, seeds)
    worst = min(sites, key=lambda site: float(sites[site][0]))
    rows = {where: row for row, where in comparison.rows.items()}
    bounds = [rows.get(SOURCE), rows.get(SUPERVISED)]
    low, high = (
        float(_over(curves, bound, seeds)[0]) if bound and _has(curves, bound, seeds) else None
        for bound in bounds
    )
    way = None if low is None or high is None or high <= low else (mean[0] - low) / (high - low)
    return MaskSummaryRow(
        name=name,
        seeds=tuple(seeds),
        dice=interval(mean),
        nsd=_average(found, "nsd"),
        hd95=_average(found, "hd95"),
        worst_site=worst,
        worst_site_dice=float(sites[worst][0]),
        sites={site: interval(values) for site, values in sites.items()},
        over_baseline=(
            None
            if name == comparison.baseline or not _has(curves, comparison.baseline, seeds)
            else contrast(mean, _over(curves, comparison.baseline, seeds))
        ),
        way_to_supervised=way,
    )


def _plug_in(
    comparison: SegmentationComparison,
    scores: Mapping[str, Mapping[int, MaskScores]],
    curves: Mapping[tuple[str, int], Mapping[str, Floats]],
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


def _over(
    curves: Mapping[tuple[str, int], Mapping[str, Floats]], name: str, seeds: Sequence[int]
) -> Floats:
    """Mean over sites and seeds (1 + R,)."""
    values: Floats = np.mean([list(curves[name, seed].values()) for seed in seeds], axis=(0, 1))
    return values


def _has(
    curves: Mapping[tuple[str, int], Mapping[str, Floats]], name: str, seeds: Sequence[int]
) -> bool:
    return all((name, seed) in curves for seed in seeds)


def _average(found: Mapping[int, MaskScores], measure: str) -> float:
    means = [
        np.mean(site[measure]) for scores in found.values() for site in scores.measures.values()
    ]
    return float(np.mean(means))
