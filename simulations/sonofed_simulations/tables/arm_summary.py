"""What a table of arms shows: rows by site, paired differences, Holm's correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.results import Machine
from sonofed_server.study.report import this_machine
from sonofed_simulations.statistics import (
    Contrast,
    Floats,
    Interval,
    contrast,
    holm,
    interval,
    paired_effect,
)
from sonofed_simulations.tables.arms import Arm, ArmCell, Outcome
from sonofed_simulations.tables.replicates import Replicates

METRICS = ("accuracy", "balanced_accuracy", "auroc")
MEAN = "mean over sites"
"""Stands beside the sites' names where there are several."""

WORST = "worst site"
"""Stands there too where there are three or more: the lowest of the sites' means over seeds."""


class ArmContrast(Contrast):
    """An arm's difference to another, over the seeds that both have finished.

    Notes
    -----
    The interval and p are of the test patients; ``effect``, Cohen's d over seeds, and ``higher``,
    the number of seeds in which the arm is higher, tell what the seeds do.
    """

    seeds: int
    effect: float | None
    higher: int


class ArmRow(Model):
    """One arm over the seeds that it has finished.

    Notes
    -----
    ``values`` and ``differences`` are by site, then by metric. ``gap`` (by metric) is the value at
    the arm's home less the mean over the other sites; ``facts`` have a value a seed that knows it.
    """

    arm: str
    against: str | None
    published: str
    seeds: int
    seconds: float
    values: dict[str, dict[str, Interval]]
    gap: dict[str, Interval]
    differences: dict[str, dict[str, ArmContrast]]
    facts: dict[str, tuple[float, ...]]


class ArmSummary(Model):
    """A table of arms in numbers; ``wanted`` leaves out the cells that were ``refused``."""

    machine: Machine
    cells: int
    wanted: int
    refused: tuple[str, ...] = ()
    seconds: float
    sites: tuple[str, ...]
    rows: tuple[ArmRow, ...]


ArmReplicates = Replicates[str, int, Outcome]


def summarise_arms(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    cells: Sequence[ArmCell],
    refused: Sequence[str] = (),
) -> ArmSummary:
    """Summarise finished cells.

    Parameters
    ----------
    arms, seeds : sequence
        What the whole table has.
    cells : sequence of ArmCell
        What has finished of it.
    refused : sequence of str
        Arm, seed and reason of each cell whose synthetic images were refused.

    Returns
    -------
    ArmSummary
        Rows in the order of ``arms``, without those that have not begun. p is corrected over the
        rows of each site and metric.
    """
    by_key: dict[str, dict[int, ArmCell]] = {}
    for cell in cells:
        by_key.setdefault(cell.arm.name, {})[cell.seed] = cell
    replicates = ArmReplicates(
        {name: {seed: c.draws for seed, c in found.items()} for name, found in by_key.items()},
        METRICS,
    )
    rows = [_row(arm, by_key[arm.name], replicates) for arm in arms if arm.name in by_key]
    sites = tuple(dict.fromkeys(site for cell in cells for site in cell.outcome.predictions))
    return ArmSummary(
        machine=this_machine(),
        cells=len(cells),
        wanted=len(arms) * len(seeds) - len(refused),
        refused=tuple(refused),
        seconds=sum(cell.seconds for cell in cells),
        sites=(*sites, *_beside(sites)),
        rows=tuple(_corrected(rows)),
    )


def _row(arm: Arm, by_seed: Mapping[int, ArmCell], replicates: ArmReplicates) -> ArmRow:
    seeds = replicates.splits(arm.name)
    cells = [by_seed[seed] for seed in seeds]
    names = list(cells[0].outcome.predictions)
    sites = _by_site(replicates.mean(arm.name, seeds), names)
    differences = {}
    common = replicates.splits(arm.name, arm.against) if arm.against is not None else []
    if common and arm.against is not None:
        differences = _differences(arm.name, arm.against, common, replicates, names)
    facts = {name for cell in cells for name in cell.outcome.facts}
    return ArmRow(
        arm=arm.name,
        against=arm.against,
        published=arm.published,
        seeds=len(seeds),
        seconds=sum(cell.seconds for cell in cells) / len(cells),
        values={
            site: {metric: interval(found[n]) for n, metric in enumerate(METRICS)}
            for site, found in sites.items()
        },
        gap=_gap(arm, sites, names),
        differences=differences,
        facts={
            name: tuple(c.outcome.facts[name] for c in cells if name in c.outcome.facts)
            for name in sorted(facts)
        },
    )


def _by_site(values: Floats, names: Sequence[str]) -> dict[str, Floats]:
    """Arrays (metrics, 1 + R) of each site, and of their mean."""
    sites = {name: values[:, n] for n, name in enumerate(names)}
    beside = {MEAN: values.mean(axis=1), WORST: values.min(axis=1)}
    return {**sites, **{name: beside[name] for name in _beside(names)}}


def _beside(names: Sequence[str]) -> tuple[str, ...]:
    return (MEAN, WORST)[: max(len(names) - 1, 0)]


def _gap(arm: Arm, sites: dict[str, Floats], names: Sequence[str]) -> dict[str, Interval]:
    if arm.home is None or len(names) < 2:
        return {}
    away = np.mean([sites[name] for name in names if name != arm.home], axis=0)
    return {m: interval(sites[arm.home][n] - away[n]) for n, m in enumerate(METRICS)}


def _differences(
    name: str, other: str, seeds: Sequence[int], replicates: ArmReplicates, names: Sequence[str]
) -> dict[str, dict[str, ArmContrast]]:
    one, two = (_by_site(replicates.mean(key, seeds), names) for key in (name, other))
    alone = {
        key: [_by_site(replicates.values[key, s][:, :, :1], names) for s in seeds]
        for key in (name, other)
    }
    found: dict[str, dict[str, ArmContrast]] = {}
    for site in one:
        for n, metric in enumerate(METRICS):
            by_seed = [
                float(a[site][n, 0] - b[site][n, 0])
                for a, b in zip(alone[name], alone[other], strict=True)
            ]
            found.setdefault(site, {})[metric] = ArmContrast(
                **contrast(one[site][n], two[site][n]).model_dump(),
                seeds=len(seeds),
                # There the difference is of means over seeds, whose worst site may be another.
                effect=None if site == WORST else paired_effect(by_seed),
                higher=sum(value > 0 for value in by_seed),
            )
    return found


def _corrected(rows: Sequence[ArmRow]) -> list[ArmRow]:
    """Correct p over the rows of each site and metric."""
    found = {row.arm: {site: dict(of) for site, of in row.differences.items()} for row in rows}
    for site, metric in {(s, m) for of in found.values() for s in of for m in of[s]}:
        family = {arm: of[site][metric] for arm, of in found.items() if site in of}
        for arm, corrected in holm(family).items():
            found[arm][site][metric] = corrected
    return [row.model_copy(update={"differences": found[row.arm]}) for row in rows]
