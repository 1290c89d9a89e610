"""What a comparison showed: means over sites and seeds, and differences paired by patient."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.results import Machine, Results
from sonofed_common.metrics import weighted_auroc
from sonofed_common.runtime import write_atomically
from sonofed_simulations.comparison import Cell, Comparison

REPLICATES = 2000
Floats = NDArray[np.float64]


class Interval(Model):
    """A number with its 95% interval, in AUROC or accuracy units."""

    value: float
    low: float
    high: float


class Row(Model):
    """One variant over all finished seeds."""

    variant: str
    seeds: tuple[int, ...]
    labels: float
    auroc: Interval
    accuracy: float
    worst_site_auroc: float
    sites: dict[str, Interval]
    gain: Interval | None


class Summary(Model):
    """A comparison's numbers.

    Notes
    -----
    ``auroc`` is the mean over sites and seeds of each site's own AUROC. Intervals come from 2,000
    bootstrap samples of patients: a patient's images, in all seeds' test sets, are drawn together.
    ``gain`` is the difference to the mean of the reference variants in the same samples.
    """

    name: str
    machine: Machine
    seconds: float
    reference: tuple[str, ...]
    rows: tuple[Row, ...]


def summarise(comparison: Comparison, cells: Sequence[Cell]) -> Summary:
    """Summarise finished cells; a variant counts with the seeds that are finished."""
    drawn = _draw(cells)
    replicates = {(c.variant, c.seed): _replicates(c, drawn) for c in cells}
    rows = [*_untrained(cells)]
    for variant in comparison.variants:
        own = [cell for cell in cells if cell.variant == variant]
        if own:
            rows.append(_row(variant, own, replicates, comparison.reference))
    first = cells[0].results if cells else None
    return Summary(
        name=comparison.name,
        machine=first.machine if first else Machine(),
        seconds=sum(cell.results.seconds for cell in cells),
        reference=comparison.reference,
        rows=tuple(rows),
    )


def summary_table(summary: Summary) -> Table:
    """Return the summary for a terminal."""
    table = Table(
        "variant", "seeds", "labels", "AUROC", "worst site", "accuracy", "gain over reference"
    )
    for row in summary.rows:
        table.add_row(*_cells(row))
    return table


def write_summary(summary: Summary, out: Path) -> None:
    """Write ``comparison.json`` and ``comparison.md``."""
    text = json.dumps(summary.model_dump(mode="json"), indent=2)
    write_atomically(out / "comparison.json", f"{text}\n".encode())
    header = ["variant", "seeds", "labels", "AUROC (95%)", "worst site", "accuracy", "gain (95%)"]
    lines = [
        f"Machine: {summary.machine.cpu}, {summary.machine.cores} cores, {summary.machine.device}; "
        f"{summary.seconds / 3600:.1f} hours of studies.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(_cells(row)) + " |" for row in summary.rows),
        "",
        "AUROC by site:",
        "",
    ]
    sites = list(summary.rows[0].sites) if summary.rows else []
    lines += ["| variant | " + " | ".join(sites) + " |", "|" + "---|" * (len(sites) + 1)]
    for row in summary.rows:
        lines.append("| " + " | ".join([row.variant, *(_text(row.sites[s]) for s in sites)]) + " |")
    write_atomically(out / "comparison.md", ("\n".join(lines) + "\n").encode())


def _cells(row: Row) -> list[str]:
    gain = "" if row.gain is None else _text(row.gain, "+")
    return [
        row.variant,
        str(len(row.seeds)),
        f"{row.labels:.0f}",
        _text(row.auroc),
        f"{row.worst_site_auroc:.3f}",
        f"{row.accuracy:.3f}",
        gain,
    ]


def _text(interval: Interval, sign: str = "") -> str:
    return f"{interval.value:{sign}.3f} ({interval.low:{sign}.3f} to {interval.high:{sign}.3f})"


def _draw(cells: Sequence[Cell]) -> dict[str, tuple[dict[str, int], Floats]]:
    """For each site, how often each patient is drawn in each replicate."""
    patients: dict[str, set[str]] = {}
    for cell in cells:
        for site, (_, _, groups) in cell.predictions.items():
            patients.setdefault(site, set()).update(groups.tolist())
    drawn = {}
    for number, (site, names) in enumerate(sorted(patients.items())):
        order = {name: n for n, name in enumerate(sorted(names))}
        generator = np.random.default_rng(number)
        counts = generator.multinomial(len(order), np.full(len(order), 1 / len(order)), REPLICATES)
        drawn[site] = (order, counts.astype(np.float64))
    return drawn


def _replicates(cell: Cell, drawn: dict[str, tuple[dict[str, int], Floats]]) -> dict[str, Floats]:
    """AUROC of each site: the estimate first, then one value a replicate."""
    values = {}
    for site, (labels, probabilities, groups) in cell.predictions.items():
        order, counts = drawn[site]
        weights = counts[:, [order[g] for g in groups.tolist()]]
        weights = np.vstack([np.ones(len(labels)), weights])
        values[site] = weighted_auroc(labels, probabilities, weights)
    return values


def _row(
    variant: str,
    cells: Sequence[Cell],
    replicates: dict[tuple[str, int], dict[str, Floats]],
    reference: Sequence[str],
) -> Row:
    seeds = [cell.seed for cell in cells]
    sites = list(cells[0].predictions)
    by_site = {
        site: np.nanmean([replicates[variant, seed][site] for seed in seeds], axis=0)
        for site in sites
    }
    mean = np.mean(list(by_site.values()), axis=0)
    gain = None
    paired = [
        np.mean(
            [np.nanmean([replicates[r, s][site] for s in seeds], axis=0) for site in sites], axis=0
        )
        for r in reference
        if all((r, s) in replicates for s in seeds)
    ]
    if paired and variant not in reference:
        gain = _interval(mean - np.mean(paired, axis=0))
    return Row(
        variant=variant,
        seeds=tuple(seeds),
        labels=float(np.mean([_labels(cell.results) for cell in cells])),
        auroc=_interval(mean),
        accuracy=float(np.mean([_accuracy(cell) for cell in cells])),
        worst_site_auroc=float(min(values[0] for values in by_site.values())),
        sites={site: _interval(values) for site, values in by_site.items()},
        gain=gain,
    )


def _interval(values: Floats) -> Interval:
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return Interval(value=float(values[0]), low=float(low), high=float(high))


def _labels(results: Results) -> int:
    return sum(site.selected for site in results.sites.values())


def _accuracy(cell: Cell) -> float:
    return float(
        np.mean([np.mean((p >= 0.5) == (y == 1)) for y, p, _ in cell.predictions.values()])
    )


def _untrained(cells: Sequence[Cell]) -> list[Row]:
    """Rows without labels: weights as shipped, and with re-estimated normalisation."""
    seeds = {cell.seed: cell for cell in cells}
    rows = []
    for stage in ("source", "bn_adapted"):
        measured: dict[str, list[dict[str, float | None]]] = {}
        for cell in seeds.values():
            for name, site in cell.results.sites.items():
                classifier = next(iter(site.classifiers.values()))
                measured.setdefault(name, []).append(getattr(classifier, stage))
        sites = {name: _pooled([_measure(m, "auroc") for m in ms]) for name, ms in measured.items()}
        if sites:
            values = [site.value for site in sites.values()]
            rows.append(
                Row(
                    variant=stage,
                    seeds=tuple(seeds),
                    labels=0,
                    auroc=_pooled(list(sites.values())),
                    accuracy=float(
                        np.mean(
                            [_measure(m, "accuracy").value for ms in measured.values() for m in ms]
                        )
                    ),
                    worst_site_auroc=min(values),
                    sites=sites,
                    gain=None,
                )
            )
    return rows


def _measure(metrics: dict[str, float | None], name: str) -> Interval:
    value, low, high = (metrics.get(k) for k in (name, f"{name}_low", f"{name}_high"))
    return Interval(value=value or 0.0, low=low or 0.0, high=high or 0.0)


def _pooled(intervals: Sequence[Interval]) -> Interval:
    """Mean of estimates on different patients; standard errors add in squares."""
    value = float(np.mean([i.value for i in intervals]))
    half = float(np.sqrt(np.sum([((i.high - i.low) / 2) ** 2 for i in intervals])) / len(intervals))
    return Interval(value=value, low=value - half, high=value + half)
