"""The end-of-run table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from sonofed_common.contract.results import (
    STAGES,
    Estimate,
    Results,
    compared_sites,
    gain,
    mean_over_sites,
    site_estimate,
)
from sonofed_simulations.report.format import decimal, signed, with_interval
from sonofed_simulations.report.summary import headline, labels_and_images


def tabulate(results: Results) -> Table:
    """Lay out before and after, a row a site.

    Parameters
    ----------
    results : Results
        A study's results.

    Returns
    -------
    rich.table.Table
        Site, labels, AUROC before and after with 95% intervals by patient, the control, the gain of
        the adapted model over the source's; the mean over the compared sites stands last.
    """
    table = Table(title=f"Study {results.study}", caption=headline(results), box=box.SIMPLE_HEAD)
    table.add_column("Site", min_width=9, overflow="fold")
    for name in ("Labels", "Source AUROC", "BN-adapted", "Adapted", "Gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, site in results.sites.items():
        estimates = [site_estimate(site, stage) for stage in STAGES]
        labels = f"{site.selected} of {site.images}"
        if not any(estimates):
            fate = "no result" if site.missing_reason is None else "lost"
            table.add_row(name, labels, fate, style="dim")
            continue
        table.add_row(name, labels, *_cells(estimates))
    if len(compared_sites(results)) > 1:
        labelled, images = labels_and_images(results)
        means = [mean_over_sites(results, stage) for stage in STAGES]
        table.add_section()
        table.add_row("Mean", f"{labelled} of {images}", *_cells(means), style="bold")
    return table


def _cells(stages: Sequence[Estimate | None]) -> list[str]:
    source, control, adapted = stages
    change = gain(source, adapted)
    return [
        _compact(source),
        decimal(control.value if control else None),
        _compact(adapted),
        signed(change.value if change else None),
    ]


def _compact(estimate: Estimate | None) -> str:
    return with_interval(estimate).replace(" to ", "–")
