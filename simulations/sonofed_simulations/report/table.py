"""The end-of-run table for the terminal."""

from __future__ import annotations

from rich.table import Table

from sonofed_common.contract.results import (
    STAGES,
    Results,
    compared_sites,
    gain,
    mean_over_sites,
    site_estimate,
)
from sonofed_simulations.report.format import signed, with_interval
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
        Site, images, labels, AUROC at each stage with its 95% interval by patient, and the gain of
        the adapted model over the source's; the mean over the compared sites stands last.
    """
    table = Table(title=f"Study {results.study}", caption=headline(results))
    table.add_column("Site")
    for name in ("Images", "Labels"):
        table.add_column(name, justify="right")
    for name in ("Source AUROC", "BN-adapted", "Adapted", "Gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, site in results.sites.items():
        estimates = [site_estimate(site, stage) for stage in STAGES]
        if not any(estimates):
            fate = "no result" if site.missing_reason is None else "lost"
            table.add_row(name, str(site.images), str(site.selected), fate, style="dim")
            continue
        change = gain(estimates[0], estimates[-1])
        cells = [*map(with_interval, estimates), signed(change.value if change else None)]
        table.add_row(name, str(site.images), str(site.selected), *cells)
    if len(compared_sites(results)) > 1:
        means = [mean_over_sites(results, stage) for stage in STAGES]
        change = gain(means[0], means[-1])
        labels, images = labels_and_images(results)
        cells = [*map(with_interval, means), signed(change.value if change else None)]
        table.add_section()
        table.add_row("Mean over sites", str(images), str(labels), *cells, style="bold")
    return table
