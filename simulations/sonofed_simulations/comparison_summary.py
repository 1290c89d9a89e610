"""What a comparison showed: means over sites and seeds, and differences paired by patient."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.results import Machine
from sonofed_common.metrics import weighted_auroc
from sonofed_common.runtime import write_atomically
from sonofed_simulations.comparison import CONTROLS, Cell, Comparison
from sonofed_simulations.statistics import (
    Contrast,
    Floats,
    Interval,
    PatientDraws,
    contrast,
    holm,
    interval,
)

SOURCE, BASELINE = CONTROLS


class Row(Model):
    """One variant or control over its finished seeds."""

    variant: str
    seeds: tuple[int, ...]
    labels: float
    auroc: Interval
    worst_site_auroc: float
    accuracy: float
    balanced_accuracy: float
    sites: dict[str, Interval]
    over_reference: Contrast | None = None
    over_baseline: Contrast | None = None


class Summary(Model):
    """A comparison's numbers.

    Notes
    -----
    ``auroc`` is the mean over seeds and sites of each site's own AUROC. Intervals come from 2,000
    bootstrap samples of patients: a patient's images, in the test sets of all seeds, are drawn
    together, and a sample that leaves a site with one class is left out. They cover the choice of
    patients, not of seeds. ``over_reference`` is the difference to the mean of the reference
    variants and ``over_baseline`` to normalisation re-estimated without labels, in the same
    samples and seeds; p is two-sided, and Holm's correction is over the variants' contrasts with
    the reference. ``differences`` are those of two rows, over the seeds that both have finished:
    what re-estimated normalisation brings over the weights as shipped, and each variant over its
    counterpart; they are not corrected.
    """

    name: str
    machine: Machine
    study_seconds: float
    reference: tuple[str, ...]
    rows: tuple[Row, ...]
    differences: dict[str, Contrast]


def summarise(comparison: Comparison, cells: Sequence[Cell]) -> Summary:
    """Summarise finished cells; a variant counts with the seeds that are finished."""
    draws = PatientDraws(
        (site, groups.tolist())
        for cell in cells
        for site, (_, _, groups) in cell.predictions.items()
    )
    curves = {(cell.variant, cell.seed): _replicates(cell, draws) for cell in cells}
    rows = []
    for variant in [*CONTROLS, *comparison.variants]:
        own = [cell for cell in cells if cell.variant == variant]
        if own:
            rows.append(_row(variant, own, curves, comparison.reference))
    results = [cell.results for cell in cells if cell.results is not None]
    return Summary(
        name=comparison.name,
        machine=results[0].machine if results else Machine(),
        study_seconds=sum(result.seconds for result in results),
        reference=comparison.reference,
        rows=_corrected(rows),
        differences=_differences(comparison, curves),
    )


def summary_table(summary: Summary) -> Table:
    """Return the summary for a terminal."""
    table = Table(*HEADER)
    for row in summary.rows:
        table.add_row(*_cells(row))
    return table


def write_summary(summary: Summary, out: Path) -> None:
    """Write ``comparison.json`` and ``comparison.md``."""
    text = json.dumps(summary.model_dump(mode="json"), indent=2)
    write_atomically(out / "comparison.json", f"{text}\n".encode())
    sites = list(summary.rows[0].sites) if summary.rows else []
    lines = [
        f"Machine: {summary.machine.cpu}, {summary.machine.cores} cores, {summary.machine.device}; "
        f"{summary.study_seconds / 3600:.1f} hours of studies.",
        "",
        *_table(HEADER, [_cells(row) for row in summary.rows]),
        "",
        "AUROC by site:",
        "",
        *_table(
            ("variant", *sites),
            [[row.variant, *(_text(row.sites[site]) for site in sites)] for row in summary.rows],
        ),
        "",
        "Differences of two rows:",
        "",
        *_table(
            ("difference", "AUROC (95%)", "p"),
            [[name, _text(d, "+"), f"{d.p:.3f}"] for name, d in summary.differences.items()],
        ),
    ]
    write_atomically(out / "comparison.md", ("\n".join(lines) + "\n").encode())


HEADER = (
    "variant",
    "seeds",
    "labels",
    "AUROC (95%)",
    "worst site",
    "accuracy",
    "balanced accuracy",
    "over reference (95%), p Holm",
    "over BN-adapted (95%)",
)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cells(row: Row) -> list[str]:
    reference = "" if row.over_reference is None else _text(row.over_reference, "+")
    if row.over_reference is not None and row.over_reference.p_holm is not None:
        reference += f", {row.over_reference.p_holm:.2f}"
    return [
        row.variant,
        str(len(row.seeds)),
        f"{row.labels:.0f}",
        _text(row.auroc),
        f"{row.worst_site_auroc:.3f}",
        f"{row.accuracy:.3f}",
        f"{row.balanced_accuracy:.3f}",
        reference,
        "" if row.over_baseline is None else _text(row.over_baseline, "+"),
    ]


def _text(interval: Interval, sign: str = "") -> str:
    return f"{interval.value:{sign}.3f} ({interval.low:{sign}.3f} to {interval.high:{sign}.3f})"


def _replicates(cell: Cell, draws: PatientDraws) -> dict[str, Floats]:
    """AUROC of each site: the estimate first, then one value a replicate."""
    return {
        site: weighted_auroc(labels, probabilities, draws.weights(site, groups.tolist()))
        for site, (labels, probabilities, groups) in cell.predictions.items()
    }


def _row(
    variant: str,
    cells: Sequence[Cell],
    curves: dict[tuple[str, int], dict[str, Floats]],
    reference: Sequence[str],
) -> Row:
    seeds = [cell.seed for cell in cells]
    sites = list(cells[0].predictions)
    by_site = {s: np.mean([curves[variant, seed][s] for seed in seeds], axis=0) for s in sites}
    mean = np.mean(list(by_site.values()), axis=0)
    correct = [_accuracies(cell) for cell in cells]
    return Row(
        variant=variant,
        seeds=tuple(seeds),
        labels=float(np.mean([_labels(cell) for cell in cells])),
        auroc=interval(mean),
        worst_site_auroc=float(min(values[0] for values in by_site.values())),
        accuracy=float(np.mean([plain for plain, _ in correct])),
        balanced_accuracy=float(np.mean([balanced for _, balanced in correct])),
        sites={site: interval(values) for site, values in by_site.items()},
        over_reference=_contrast(mean, variant, reference, seeds, curves),
        over_baseline=_contrast(mean, variant, [BASELINE], seeds, curves),
    )


def _contrast(
    mean: Floats,
    variant: str,
    others: Sequence[str],
    seeds: Sequence[int],
    curves: dict[tuple[str, int], dict[str, Floats]],
) -> Contrast | None:
    """Difference to the mean of other variants, where they are finished for the same seeds."""
    paired = [
        np.mean([np.mean(list(curves[o, s].values()), axis=0) for s in seeds], axis=0)
        for o in others
        if all((o, s) in curves for s in seeds)
    ]
    if variant in others or variant in CONTROLS or len(paired) < len(others):
        return None
    return contrast(mean, np.mean(paired, axis=0))


def _differences(
    comparison: Comparison, curves: dict[tuple[str, int], dict[str, Floats]]
) -> dict[str, Contrast]:
    found = {}
    for variant, other in [(BASELINE, SOURCE), *comparison.counterparts.items()]:
        seeds = [s for s in comparison.seeds if {(variant, s), (other, s)} <= curves.keys()]
        if seeds:
            means = [
                np.mean([np.mean(list(curves[v, s].values()), axis=0) for s in seeds], axis=0)
                for v in (variant, other)
            ]
            found[f"{variant} over {other}"] = contrast(means[0], means[1])
    return found


def _corrected(rows: Sequence[Row]) -> tuple[Row, ...]:
    found = holm({r.variant: r.over_reference for r in rows if r.over_reference is not None})
    return tuple(r.model_copy(update={"over_reference": found.get(r.variant)}) for r in rows)


def _labels(cell: Cell) -> int:
    return sum(s.labelled for s in cell.results.sites.values()) if cell.results else 0


def _accuracies(cell: Cell) -> tuple[float, float]:
    """Accuracy and balanced accuracy at 0.5, each the mean over sites."""
    plain, balanced = [], []
    for labels, probabilities, _ in cell.predictions.values():
        correct = (probabilities >= 0.5) == (labels == 1)
        plain.append(np.mean(correct))
        balanced.append(np.mean([np.mean(correct[labels == label]) for label in (0, 1)]))
    return float(np.mean(plain)), float(np.mean(balanced))
