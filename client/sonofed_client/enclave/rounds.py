"""What a site keeps of a study from round to round, so that rounds may be done again alike."""

from __future__ import annotations

from sonofed_client.enclave.site import Site
from sonofed_common.contract.records import Records


def kept_before(site: Site, study: str, name: str, round: int) -> Records | None:
    """Return what a site kept in the last round that it did before this one.

    Parameters
    ----------
    site : Site
        Keeps it under ``study/<study>/<name>/<round>``.
    study, name : str
        The study, and what is kept.
    round : int
        At hand. The first one forgets what an earlier study of this name left.

    Notes
    -----
    A round that is done again finds what it found before, and the next new one finds the last that
    was done: these two stay, in whatever order rounds are asked for.
    """
    prefix = _name(site, study, name)
    if round == 0:
        site.store.remove(prefix)
    names, own = sorted(site.store.names(prefix)), _name(site, study, name, round)
    earlier = [kept for kept in names if kept < own]
    later = [kept for kept in names if kept > own]
    for passed in (*earlier[:-1], *later[:-1]):
        site.store.remove(passed)
    return site.store.get(earlier[-1]) if earlier else None


def kept_last(site: Site, study: str, name: str) -> Records | None:
    """Return what a site kept in the last round that it did; see `kept_before`."""
    names = site.store.names(_name(site, study, name))
    return site.store.get(max(names)) if names else None


def keep(site: Site, study: str, name: str, round: int, records: Records) -> None:
    """Keep records for the next round."""
    site.store.put(_name(site, study, name, round), records)


def _name(site: Site, study: str, name: str, round: int | None = None) -> str:
    number = "" if round is None else f"{round:04d}"
    return site.study_artifact(study, f"{name}/{number}")
