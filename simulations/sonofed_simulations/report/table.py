"""The end-of-run tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from sonofed_common.contract.results import (
    STAGES,
    Estimate,
    Results,
    Stage,
    compared_sites,
    gain,
    mean_over_sites,
    site_estimate,
)
from sonofed_simulations.report.format import decimal, signed, with_interval
from sonofed_simulations.report.segmentation import (
    STAGE_NAMES,
    MaskComparison,
    classifies,
    key_stages,
    mask_comparisons,
    segments,
)
from sonofed_simulations.report.segmentation_summary import mask_headline
from sonofed_simulations.report.summary import baseline, headline, labels_and_images


def tabulate(results: Results) -> Group:
    """Lay out what a study found: a table of the classifiers, one of the masks, or both.

    Parameters
    ----------
    results : Results
        A study's results.

    Returns
    -------
    rich.console.Group
        `classifier_table` and `mask_table`, each where the study has such results; a study
        without any gets the former, which names the lost sites.
    """
    tables = [classifier_table(results)] if classifies(results) else []
    return Group(*tables, *([mask_table(results)] if segments(results) else []))


def classifier_table(results: Results) -> Table:
    """Lay out AUROC before and after, a row a site.

    Parameters
    ----------
    results : Results
        A study's results.

    Returns
    -------
    rich.table.Table
        Site, labels, AUROC before and after with 95% intervals by patient, the control, the gain of
        the adapted model over the control, or over the source's without one; the mean over the
        compared sites stands last.
    """
    table = Table(title=f"Study {results.study}", caption=headline(results), box=box.SIMPLE_HEAD)
    table.add_column("Site", min_width=9, overflow="fold")
    stage = baseline(results)
    over = "Over BN" if stage == "bn_adapted" else "Over source"
    for name in ("Labels", "Source AUROC", "BN-adapted", "Adapted", over):
        table.add_column(name, justify="right", no_wrap=True)
    for name, site in results.sites.items():
        estimates = [site_estimate(site, stage) for stage in STAGES]
        labels = f"{site.labelled} of {site.images}"
        if not any(estimates):
            fate = "no result" if site.missing_reason is None else "lost"
            table.add_row(name, labels, fate, style="dim")
            continue
        table.add_row(name, labels, *_cells(estimates, stage))
    if len(compared_sites(results)) > 1:
        labelled, images = labels_and_images(results)
        means = [mean_over_sites(results, stage) for stage in STAGES]
        table.add_section()
        table.add_row("Mean", f"{labelled} of {images}", *_cells(means, stage), style="bold")
    return table


def mask_table(results: Results) -> Table:
    """Lay out Dice of source, control and result, a row a site.

    Parameters
    ----------
    results : Results
        Results of a study with segmentation.

    Returns
    -------
    rich.table.Table
        Site, Dice with 95% intervals by patient at source, with normalisation re-estimated and at
        the last stage, which the column names, and its gain over the re-estimated normalisation;
        mean and worst over the compared sites stand last.
    """
    stages = key_stages(results)
    title = f"Study {results.study}: Dice"
    table = Table(title=title, caption=mask_headline(results), box=box.SIMPLE_HEAD)
    table.add_column("Site", min_width=9, overflow="fold")
    for stage in stages:
        name = "BN-adapted" if stage == "bn_adapted" else STAGE_NAMES[stage]
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Over BN", justify="right", no_wrap=True)
    rows = {row.name: row for row in mask_comparisons(results)}
    for name, site in results.sites.items():
        row = rows.pop(name, None)
        if row is None:
            fate = "no result" if site.missing_reason is None else "lost"
            table.add_row(name, fate, style="dim")
            continue
        table.add_row(name, *_mask_cells(row))
    for row in rows.values():
        if row.kind == "mean":
            table.add_section()
        table.add_row(row.kind.capitalize(), *_mask_cells(row), style="bold")
    return table


def _mask_cells(row: MaskComparison) -> list[str]:
    change = row.gain_over_control
    values = [_compact(found) for found in row.dice.values()]
    return [*values, signed(change.value if change else None)]


def _cells(stages: Sequence[Estimate | None], baseline: Stage) -> list[str]:
    source, control, adapted = stages
    change = gain(stages[STAGES.index(baseline)], adapted)
    return [
        _compact(source),
        decimal(control.value if control else None),
        _compact(adapted),
        signed(change.value if change else None),
    ]


def _compact(estimate: Estimate | None) -> str:
    return with_interval(estimate).replace(" to ", "–")
