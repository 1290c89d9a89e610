"""What our strategies are worth at each hospital: a preset is judged where it was not chosen."""

from __future__ import annotations

from sonofed_common.contract.configuration import Model
from sonofed_simulations.rivals import STUDY_PRESET, TWO_VIEW_RANDOM
from sonofed_simulations.statistics import Contrast, contrast, holm
from sonofed_simulations.tables.pages import contrast_text, markdown
from sonofed_simulations.tables.preset import PRESET
from sonofed_simulations.tables.selection_replicates import METRICS, NAMES, Key, SelectionReplicates
from sonofed_simulations.tables.settings import RANDOM

JUDGED = (STUDY_PRESET, PRESET, TWO_VIEW_RANDOM)


class SiteGain(Model):
    """One strategy's difference to a reference at one site, by metric; see `Row`."""

    strategy: str
    site: str
    against: str
    gains: dict[str, Contrast]


def site_gains(
    replicates: SelectionReplicates, budget: float, rival: str | None
) -> tuple[SiteGain, ...]:
    """Set our strategies against Random and the best rival at each site.

    Parameters
    ----------
    replicates : SelectionReplicates
        Of all rows.
    budget : float
        At which they are compared.
    rival : str or None
        The best rival.

    Returns
    -------
    tuple of SiteGain
        On the splits that both have; p is corrected over strategies and sites, for each reference
        and metric.
    """
    found: list[SiteGain] = []
    for against in (RANDOM, *([] if rival is None else [rival])):
        gains = [
            gain
            for name in JUDGED
            for gain in _gains((name, "federated", budget), against, replicates)
        ]
        for metric in METRICS:
            corrected = holm({str(n): gain.gains[metric] for n, gain in enumerate(gains)})
            for n, one in corrected.items():
                gains[int(n)].gains[metric] = one
        found += gains
    return tuple(found)


def site_gain_table(gains: tuple[SiteGain, ...]) -> list[str]:
    """Return one line a strategy and site."""
    held = {(gain.strategy, gain.site, gain.against): gain.gains for gain in gains}
    references = list(dict.fromkeys(gain.against for gain in gains))
    header = [f"{NAMES[m]} over {against}" for against in references for m in METRICS]
    rows = [
        [
            strategy,
            site,
            *(
                contrast_text(held.get((strategy, site, against), {}).get(metric))
                for against in references
                for metric in METRICS
            ),
        ]
        for strategy, site in dict.fromkeys((gain.strategy, gain.site) for gain in gains)
    ]
    return markdown(("strategy", "site", *header), rows)


def _gains(key: Key, against: str, replicates: SelectionReplicates) -> list[SiteGain]:
    other = (against, key[1], key[2])
    if key not in replicates.by_key or other not in replicates.by_key:
        return []
    splits = replicates.splits(key, other)
    if not splits:
        return []
    values, reference = (replicates.mean(k, splits) for k in (key, other))
    sites = replicates.by_key[key][splits[0]][0].predictions
    return [
        SiteGain(
            strategy=key[0],
            site=site,
            against=against,
            gains={m: contrast(values[i, n], reference[i, n]) for i, m in enumerate(METRICS)},
        )
        for n, site in enumerate(sites)
    ]
